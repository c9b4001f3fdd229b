"""The axis `optimizer`: any class of torch.optim, with a learning rate that may be a schedule."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae_cli.axes.schedule import Constant, as_schedule
from vae_cli.core.errors import UserError, nearest
from vae_cli.model.kernels import FusedAdam, without_compiler


class ScheduledOptimizer:
    """An optimizer whose learning rate follows a schedule.

    arguments are those of the class `kind`, but arguments["lr"] may also be a Schedule. Weight decay does not apply to
    the parameters in `undecayed`. Raises UserError for arguments that the class does not accept, and for classes such
    as LBFGS that need a closure.
    """

    def __init__(
        self,
        kind: type[Optimizer],
        parameters: Iterable[nn.Parameter],
        arguments: Mapping[str, Any],
        undecayed: Iterable[nn.Parameter] = (),
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
        # Some optimizers divide by the initial learning rate or reject 0, the rate at which a warm-up starts.
        rates = {"lr": self.lr.at(0.0) or self.lr.bounds()[1]}
        every, apart = list(parameters), {id(parameter) for parameter in undecayed}

        def in_one_group() -> Optimizer:
            with without_compiler():
                return kind(every, **{**arguments, **rates})

        self._in_one_group = in_one_group
        try:
            self.inner = in_one_group()
            if apart and self.inner.defaults.get("weight_decay"):
                decayed = [parameter for parameter in every if id(parameter) not in apart]
                others = [parameter for parameter in every if id(parameter) in apart]
                groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
                with without_compiler():
                    self.inner = kind(groups, **{**arguments, **rates})
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(f"{kind.__name__} does not accept these arguments: {error}") from error

    @property
    def rate(self) -> float:
        """The current learning rate."""
        return float(self.inner.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        # The optimizer's own zero_grad also records an event for the profiler, which takes longer than the rest.
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def advance(self, epoch: float) -> None:
        """Set the learning rate to the schedule's value after `epoch` epochs, which may be fractional."""
        if isinstance(self.lr, Constant):
            return
        self._set_rate(self.lr.at(epoch))

    def slow_down(self, factor: float) -> None:
        """Multiply the schedule's learning rates by this factor from now on; it replaces any earlier factor."""
        self._factor = factor
        if isinstance(self.lr, Constant):
            self._set_rate(self.lr.number)

    def _set_rate(self, rate: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = rate * self._factor

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
        versions also applied weight decay to the parameters in `undecayed`; the state of such a run is continued as it
        was begun.
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


def clip_gradient(parameters: Iterable[Tensor], norm: float | None) -> None:
    """Scale the gradient down if its Euclidean norm exceeds `norm`; do nothing if `norm` is None."""
    if norm is not None:
        nn.utils.clip_grad_norm_(parameters, norm)
