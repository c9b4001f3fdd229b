"""The group `schedule`: numbers that change during training, as functions of the epoch.

The epoch is fractional: after s steps, at n steps per epoch, it is s / n.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor, nn

from vae_cli.core.errors import UserError
from vae_cli.core.values import Count, NonNegative, Positive, Probability


class Number(nn.Module, ABC):
    """A scalar of the model, such as a scale: forward() returns it as a 0-dimensional tensor; TensorBoard plots it."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the current number, a 0-dimensional tensor."""


class Schedule(Number):
    """A number as a function of the epoch.

    The current number is a 0-dimensional buffer, so it is on the model's device, is saved in checkpoints, and is
    restored when a run is loaded for evaluation.
    """

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(math.nan))

    @abstractmethod
    def at(self, epoch: float) -> float:
        """Return the number after `epoch` epochs, which may be fractional."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Return the smallest and the largest value of the schedule."""

    def advance(self, epoch: float) -> None:
        """Set the current number to its value after `epoch` epochs, which may be fractional."""
        self.value.fill_(self.at(epoch))

    def forward(self) -> Tensor:
        return self.value

    def times(self, quantity: Tensor) -> Tensor:
        """Return the current number times a quantity of any shape."""
        return self.value * quantity


class Constant(Schedule):
    """A number that stays the same throughout training.

    >>> Constant(2).at(7)
    2.0
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.number = float(value)
        self.value.fill_(self.number)

    def at(self, epoch: float) -> float:
        return self.number

    def bounds(self) -> tuple[float, float]:
        return self.number, self.number

    def advance(self, epoch: float) -> None:
        """Do nothing: the number never changes."""

    def times(self, quantity: Tensor) -> Tensor:
        """Return the number times a quantity of any shape: the quantity itself if the number is 1, which saves an
        operation."""
        return quantity if self.number == 1 else super().times(quantity)


class _Ramp(Schedule):
    """A schedule that goes from start to stop."""

    def __init__(self, start: float, stop: float) -> None:
        super().__init__()
        self.start, self.stop = float(start), float(stop)
        self.value.fill_(self.at(0.0))

    def bounds(self) -> tuple[float, float]:
        return min(self.start, self.stop), max(self.start, self.stop)

    def between(self, share: float) -> float:
        """Interpolate linearly between start (share = 0) and stop; return exactly stop if share >= 1."""
        return self.stop if share >= 1 else self.start + (self.stop - self.start) * share


class Linear(_Ramp):
    """A straight line from start to stop over `epochs` epochs, then constant.

    >>> warmup = Linear(0, 1, epochs=10)
    >>> [warmup.at(epoch) for epoch in (0, 5, 10, 99)]
    [0.0, 0.5, 1.0, 1.0]
    """

    def __init__(self, start: float, stop: float, epochs: Positive) -> None:
        self.epochs = epochs
        super().__init__(start, stop)

    def at(self, epoch: float) -> float:
        return self.between(epoch / self.epochs)


class Cosine(_Ramp):
    """Half a cosine wave from start to stop over `epochs` epochs, then constant.

    Before it, the number goes in a straight line from 0 to start over `warmup` epochs. Loshchilov and
    Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.

    >>> rate = Cosine(1, 0, epochs=10, warmup=2)
    >>> [round(rate.at(epoch), 2) for epoch in (0, 1, 2, 7, 12)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

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
    """Cycles of `epochs` epochs: a straight line from start to stop, then constant until the next cycle.

    ramp is the fraction of a cycle in which the number goes from start to stop. After the last cycle it stays at stop.
    Fu et al., Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing, NAACL 2019.

    >>> beta = Cyclic(0, 1, epochs=10, cycles=2, ramp=0.5)
    >>> [beta.at(epoch) for epoch in (0, 2.5, 5, 9, 10, 12.5, 20)]
    [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0]
    """

    def __init__(self, start: float, stop: float, epochs: Positive, cycles: Count = 4, ramp: Probability = 0.5) -> None:
        self.epochs, self.cycles, self.ramp = epochs, cycles, ramp
        super().__init__(start, stop)

    def at(self, epoch: float) -> float:
        cycle, within = divmod(epoch, self.epochs)
        if cycle >= self.cycles or self.ramp == 0:
            return self.stop
        return self.between(within / self.epochs / self.ramp)


class Steps(Schedule):
    """A piecewise constant number: each value lasts for its number of epochs, and the last one then stays.

    >>> rate = Steps([1e-3, 1e-4], epochs=[2, 4])
    >>> [rate.at(epoch) for epoch in (0, 1.9, 2, 9)]
    [0.001, 0.001, 0.0001, 0.0001]
    """

    def __init__(self, values: list[float], epochs: list[Positive]) -> None:
        super().__init__()
        if not values or len(values) != len(epochs):
            raise UserError(
                f"A schedule of steps needs a number of epochs for each value, but has values={values} and "
                f"epochs={epochs}; give two lists of the same length, such as [1e-3,1e-4] and [50,50]."
            )
        self.values = [float(value) for value in values]
        self.ends = list(accumulate(epochs))
        self.value.fill_(self.at(0.0))

    def at(self, epoch: float) -> float:
        return self.values[min(bisect_right(self.ends, epoch), len(self.values) - 1)]

    def bounds(self) -> tuple[float, float]:
        return min(self.values), max(self.values)


def as_schedule(number: float | Schedule) -> Schedule:
    """Convert a number to a Constant; return a schedule unchanged."""
    return number if isinstance(number, Schedule) else Constant(number)
