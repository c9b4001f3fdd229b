"""A number that changes while a model trains: all choices of the group `schedule`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vae_cli.core.values import Count, NonNegative, Positive, Probability


class Number(nn.Module, ABC):
    """One number that the model uses: forward() gives it, 0-dimensional, and its course is shown as a curve."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The number of this moment."""


class Schedule(Number):
    """A number as a function of the epochs gone by, whole or broken.

    The number of this moment is a 0-dimensional buffer, so that it lies on the model's device, travels in the
    checkpoint, and stays what it was when a run is loaded to be evaluating.
    """

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(math.nan))

    @abstractmethod
    def at(self, epoch: float) -> float:
        """The number after so many epochs."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest number that it ever takes."""

    def advance(self, epoch: float) -> None:
        """Move to so many epochs."""
        self.value.fill_(self.at(epoch))

    def forward(self) -> Tensor:
        return self.value


class Constant(Schedule):
    """One number from beginning to end."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.number = float(value)
        self.value.fill_(self.number)

    def at(self, epoch: float) -> float:
        return self.number

    def bounds(self) -> tuple[float, float]:
        return self.number, self.number

    def advance(self, epoch: float) -> None:
        """Stay: a number that does not change costs no work in a step."""


class _Ramp(Schedule):
    """A number that moves between two others."""

    def __init__(self, start: float, stop: float) -> None:
        super().__init__()
        self.start, self.stop = float(start), float(stop)
        self.value.fill_(self.at(0.0))

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.stop), max(self.start, self.stop)

    def between(self, share: float) -> float:
        """The number at a share in [0, 1] of the way; at both ends exact."""
        return self.stop if share >= 1 else self.start + (self.stop - self.start) * share


class Linear(_Ramp):
    """A straight line from start to stop over so many epochs, then stop."""

    def __init__(self, start: float, stop: float, epochs: Positive) -> None:
        self.epochs = epochs
        super().__init__(start, stop)

    def at(self, epoch: float) -> float:
        return self.between(epoch / self.epochs)


class Cosine(_Ramp):
    """Half a cosine wave from start to stop over so many epochs, after a straight line from 0 to start."""

    def __init__(self, start: float, stop: float, epochs: Positive, warmup: NonNegative = 0) -> None:
        self.epochs, self.warmup = epochs, warmup
        super().__init__(start, stop)

    def at(self, epoch: float) -> float:
        if epoch < self.warmup:
            return self.start * epoch / self.warmup
        share = min(1.0, (epoch - self.warmup) / self.epochs)
        return self.between((1 - math.cos(math.pi * share)) / 2)

    def bounds(self) -> tuple[float, float]:
        low, high = super().bounds()
        return (min(low, 0.0), max(high, 0.0)) if self.warmup else (low, high)


class Cyclic(_Ramp):
    """Cycles of so many epochs: in each the number rises from start to stop during a share `ramp` and then stays.

    After the last cycle it stays at stop. Fu et al., Cyclical Annealing Schedule, NAACL 2019.
    """

    def __init__(self, start: float, stop: float, epochs: Positive, cycles: Count = 4, ramp: Probability = 0.5) -> None:
        self.epochs, self.cycles, self.ramp = epochs, cycles, ramp
        super().__init__(start, stop)

    def at(self, epoch: float) -> float:
        cycle, within = divmod(epoch, self.epochs)
        if cycle >= self.cycles or self.ramp == 0:
            return self.stop
        return self.between(within / self.epochs / self.ramp)


def as_schedule(number: float | Schedule) -> Schedule:
    """A number or a schedule, as a schedule."""
    return number if isinstance(number, Schedule) else Constant(number)
