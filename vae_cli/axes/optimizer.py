"""The axis `optimizer`: any class of torch.optim, with a learning rate that may be a schedule."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae_cli.axes.schedule import Constant, Schedule, as_schedule
from vae_cli.core.errors import UserError, nearest
from vae_cli.model.kernels import FusedAdam, without_compiler

Apart = tuple[Iterable[nn.Parameter], Mapping[str, Any]]  # parameters, and the optimizer's arguments for them


class ScheduledOptimizer:
    """An optimizer whose learning rates follow schedules.

    arguments are those of the class `kind`, but arguments["lr"] may also be a Schedule. Each item of `apart` names some
    of the parameters and arguments that replace the others for them: another weight decay, or another learning rate,
    which may also be a Schedule. Arguments in `apart` that the class does not have are ignored. Raises UserError for
    arguments that the class does not accept, and for classes such as LBFGS that need a closure.
    """

    def __init__(
        self,
        kind: type[Optimizer],
        parameters: Iterable[nn.Parameter],
        arguments: Mapping[str, Any],
        apart: Sequence[Apart] = (),
    ) -> None:
        allowed = [name for name in inspect.signature(kind).parameters if name not in ("self", "params")]
        for key in arguments:
            if key not in allowed:
                raise UserError(
                    f"optimizer.{key} is not an argument of {kind.__name__}.{nearest(key, allowed)} "
                    f"Allowed arguments: {', '.join(allowed)}."
                )
        if inspect.signature(kind.step).parameters["closure"].default is inspect.Parameter.empty:
            raise UserError(
                f"{kind.__name__} evaluates the loss several times per step, which vae does not support; "
                "type optimizer=adam."
            )
        self._factor = 1.0
        self._fused: FusedAdam | None = None
        self.lr = as_schedule(arguments.get("lr", inspect.signature(kind).parameters["lr"].default))
        every = list(parameters)

        def in_groups(groups: list[Any]) -> Optimizer:
            with without_compiler():
                return kind(groups, **{**arguments, "lr": _first_rate(self.lr)})

        self._in_one_group = lambda: in_groups(every)
        try:
            self.inner = self._in_one_group()
            groups, self._schedules = _in_groups(every, apart, self.inner.defaults, self.lr)
            if len(groups) > 1:
                self.inner = in_groups(groups)
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"{kind.__name__} does not accept these arguments: {error}") from error

    @property
    def rate(self) -> float:
        """The current learning rate of the model."""
        return float(self.inner.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        # The optimizer's own zero_grad also records an event for the profiler, which takes longer than the rest.
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def advance(self, epoch: float) -> None:
        """Set the learning rates to their schedules' values after `epoch` epochs, which may be fractional."""
        for group, lr in zip(self.inner.param_groups, self._schedules, strict=False):
            if not isinstance(lr, Constant):
                group["lr"] = lr.at(epoch) * self._factor

    def slow_down(self, factor: float) -> None:
        """Multiply the schedules' learning rates by this factor from now on; it replaces any earlier factor."""
        self._factor = factor
        for group, lr in zip(self.inner.param_groups, self._schedules, strict=False):
            if isinstance(lr, Constant):
                group["lr"] = lr.number * self._factor

    @property
    def is_capturable(self) -> bool:
        """Whether `step` can be captured as a CUDA graph, once a step has been taken; `set_rates` stays outside."""
        return self._fused is not None and self._fused.is_capturable

    def set_rates(self) -> None:
        """Make the current learning rates known to the GPU, before a step that may be replayed as a CUDA graph."""
        if self._fused is not None:
            self._fused.set_rates()

    def step(self) -> None:
        """Update the parameters, with a single fused kernel if this gives the same result (see FusedAdam)."""
        if self._fused is None:
            self._fused = FusedAdam.of(self.inner)
        if self._fused is None or not self._fused.step():
            self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the torch optimizer; the schedule depends only on the epoch, so it has no state."""
        with without_compiler():
            return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state, on the device and in the memory layout of the parameters.

        The state may come from another device, on which convolution weights have a different memory layout. torch
        keeps the layout of the saved moments, so its fused kernels would pair weights with the wrong moments. Earlier
        versions also applied weight decay to the scales and priors; the state of such a run, which has one group, is
        continued as it was begun.
        """
        if len(state["param_groups"]) == 1 < len(self.inner.param_groups):
            self.inner = self._in_one_group()
        with without_compiler():
            self.inner.load_state_dict(state)
        for parameter, held in self.inner.state.items():
            for name, value in held.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    held[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self._fused = None  # it refers to the tensors of the old state


def _first_rate(lr: Schedule) -> float:
    """Return the learning rate to create an optimizer with. Some divide by it, or reject 0, the rate at which a warm-up
    starts."""
    return lr.at(0.0) or lr.bounds()[1]


def _in_groups(
    every: Sequence[nn.Parameter], apart: Sequence[Apart], defaults: Mapping[str, Any], lr: Schedule
) -> tuple[list[dict[str, Any]], list[Schedule]]:
    """Divide parameters into groups with the same arguments; return the groups and the schedules of their rates.

    The first group has the arguments in `defaults`; so has every parameter for which `apart` changes none of them.
    """
    groups: list[dict[str, Any]] = []
    schedules, taken = [lr], set[int]()
    for parameters, arguments in apart:
        changed = {k: v for k, v in arguments.items() if k in defaults and (k == "lr" or v != defaults[k])}
        members = {id(parameter) for parameter in parameters}
        if changed and members:
            schedules.append(as_schedule(changed.get("lr", lr)))
            changed["lr"] = _first_rate(schedules[-1])
            groups.append({"params": [p for p in every if id(p) in members], **changed})
            taken |= members
    return [{"params": [p for p in every if id(p) not in taken]}, *groups], schedules


def clip_gradient(parameters: Iterable[Tensor], norm: float | None) -> None:
    """Scale the gradient down if its Euclidean norm exceeds `norm`; do nothing if `norm` is None."""
    if norm is not None:
        nn.utils.clip_grad_norm_(parameters, norm)
