"""One training step; on a GPU, it is replayed as a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from vae_cli.axes.optimizer import clip_gradient
from vae_cli.config.build import Experiment
from vae_cli.core.errors import first_line
from vae_cli.machine import distributed, graphs
from vae_cli.model.loss import Terms, loss_and_terms

log = logging.getLogger(__name__)

WARM_UP = 3  # eager steps before a graph is captured, in which libraries allocate their memory


class Step:
    """A training step: compute the loss of a batch and its gradient, and update the parameters."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.model, self.regularizer = distributed.wrap(experiment.model), distributed.wrap(experiment.regularizer)
        # Clipped apart from each other: a critic's gradient says nothing about the model's.
        self.clipped = [list(self.model.parameters()), list(self.regularizer.parameters())]
        self.parameters = [parameter for parameters in self.clipped for parameter in parameters]
        self.replayed: Replayed | None = None
        if experiment.splits.train.images.is_cuda and distributed.count() == 1:
            self.replayed = Replayed(experiment.config["batch_size"])

    def __call__(self, positions: Tensor) -> Terms:
        """Train on the images at these positions (B,) in the training set; return the loss terms before the update."""
        self.experiment.optimizer.set_rates()
        return self.eager(positions) if self.replayed is None else self.replayed(self, positions)

    def eager(self, positions: Tensor) -> Terms:
        """Take the step by launching its operations one by one."""
        terms = self.compute(positions)
        self.update()
        return terms

    def compute(self, positions: Tensor) -> Terms:
        """Compute the loss of the images at these positions (B,) and its gradient; return the terms of the loss."""
        compiled = self.experiment.compiled_loss
        regularizer = self.experiment.regularizer
        with distributed.share(positions, regularizer.draws) as own:
            x = self.experiment.splits.train.batch(own)
            if compiled is not None and len(x) == self.experiment.config["batch_size"]:
                loss, terms = compiled(x)
            else:
                loss, terms = loss_and_terms(self.model, self.regularizer, x, regularizer.samples)
        self.experiment.optimizer.zero_grad()
        loss.backward()
        return terms

    def update(self) -> None:
        """Update the parameters by their gradients."""
        for parameters in filter(None, self.clipped):
            clip_gradient(parameters, self.experiment.config["max_grad_norm"])
        self.experiment.optimizer.step()


class Replayed:
    """A step as a replayed CUDA graph: one launch instead of about a hundred.

    A small network keeps a GPU busy for less time than the CPU needs to launch its operations one by one. The graph
    contains the whole step for a batch of `batch_size` images, which must be on the GPU: the gathering of the images,
    both passes and, if the optimizer is Adam with one fused kernel, the update. Other optimizers update the parameters
    after the replay, from the gradients that the graph writes. A smaller last batch is computed eagerly, and so is
    every batch if the step cannot be captured. The results are bit-identical to those of the eager step.
    """

    positions: Tensor  # the graph's input, (B,)
    names: tuple[str, ...]  # of the terms
    terms: Tensor  # output of the graph, (number of terms, B)
    gradients: list[Tensor | None]  # output of the graph, for each parameter

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.warm_up = WARM_UP
        self.replay: Callable[[], None] | None = None
        self.has_update = False

    def __call__(self, step: Step, positions: Tensor) -> Terms:
        """Take a step on the images at these positions (B,); return the terms of the loss, each (B,)."""
        if len(positions) != self.batch_size or self.warm_up < 0:
            return step.eager(positions)
        if self.warm_up > 0:
            self.warm_up -= 1
            return graphs.beside(lambda: step.eager(positions))
        if self.replay is None and not self._is_captured(step, positions):
            return step.eager(positions)
        assert self.replay is not None
        self.positions.copy_(positions)
        self.replay()
        if not self.has_update:
            for parameter, gradient in zip(step.parameters, self.gradients, strict=True):
                parameter.grad = gradient  # set again each time, because an eager step replaces it
            step.update()
        return dict(zip(self.names, self.terms.clone(), strict=True))

    def _is_captured(self, step: Step, positions: Tensor) -> bool:
        """Capture the step and return whether that succeeded; if it failed, never try again."""
        self.positions = positions.clone()
        self.has_update = step.experiment.optimizer.is_capturable

        def whole() -> tuple[tuple[str, ...], Tensor]:
            terms = (step.eager if self.has_update else step.compute)(self.positions)
            return tuple(terms), torch.stack(list(terms.values()))

        try:
            (self.names, self.terms), self.replay = graphs.capture(whole)
        except Exception as error:  # a user's own class may do anything
            self.warm_up = -1
            log.warning(
                "The training step is not captured as a CUDA graph, and its operations are launched one by one, which "
                "is slower: %s",
                first_line(error),
            )
            return False
        self.gradients = [parameter.grad for parameter in step.parameters]
        return True
