"""Means of the loss terms over training steps, copied from the device only when they are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vae_cli.machine import distributed
from vae_cli.model.inference import with_derived

Sums = dict[str, float]


class NotFinite(Exception):
    """Raised if terms of the loss, or the weights, are not finite at a step; `terms` contains their names."""

    def __init__(self, step: int, terms: list[str]) -> None:
        listed = " and ".join(filter(None, [", ".join(terms[:-1]), terms[-1]]))
        super().__init__(f"{listed} became NaN or infinite at step {step}")
        self.step = step
        self.terms = terms

    def __reduce__(self) -> tuple[type[NotFinite], tuple[int, list[str]]]:
        return NotFinite, (self.step, self.terms)  # it is pickled to reach other processes


class Meter:
    """Computes means of the loss terms over an epoch, and over the steps between two points of the training curves."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, list[Tensor]]] = []
        self._names: tuple[str, ...] = ()
        self._point: Sums = {}
        self._epoch: Sums = {}

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Add the loss terms of a step, each of shape (B,), without waiting for the device."""
        self._names = tuple(terms)
        self._pending.append((step, list(terms.values())))

    def read(self) -> None:
        """Wait for the device and sum the pending steps over all processes. Raises NotFinite for the first step with a
        term that is not finite."""
        if not self._pending:
            return
        # Consecutive steps with the same number of images are summed in one operation.
        sizes = [terms[0].shape[0] for _, terms in self._pending]
        steps, summed = iter(self._pending), []
        for _, equal in groupby(sizes):
            terms = [term for _ in equal for term in next(steps)[1]]
            summed.append(torch.stack(terms).sum(1).view(-1, len(self._names)))
        rows = distributed.total(torch.cat(summed)).tolist()
        counts = distributed.total(torch.tensor(sizes)).tolist()
        for (step, _), row in zip(self._pending, rows, strict=True):
            if not all(map(math.isfinite, row)):
                named = zip(self._names, row, strict=True)
                raise NotFinite(step, [name for name, value in named if not math.isfinite(value)])
        columns = dict(zip(("images", *self._names), (counts, *zip(*rows, strict=True)), strict=True))
        for sums in (self._point, self._epoch):
            for name, values in columns.items():
                total = sums.get(name, 0.0)
                for value in values:  # one after the other, so that a checkpoint in between does not change the sum
                    total += value
                sums[name] = total
        self._pending.clear()

    def point(self) -> dict[str, float]:
        """Return the means since the last point of the training curves, and reset them."""
        self.read()
        means, self._point = _means(self._point), {}
        return means

    def epoch(self) -> dict[str, float]:
        """Return the means over the epoch, and reset them."""
        self.read()
        means, self._epoch = _means(self._epoch), {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, to be saved in a checkpoint. Raises NotFinite if a term is not finite."""
        self.read()
        return {"point": dict(self._point), "epoch": dict(self._epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the sums saved in a checkpoint."""
        self._point, self._epoch = dict(state["point"]), dict(state["epoch"])


def _means(sums: Sums) -> dict[str, float]:
    return with_derived({name: value / sums["images"] for name, value in sums.items() if name != "images"})
