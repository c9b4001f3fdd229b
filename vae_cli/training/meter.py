"""Means of the loss terms over training steps, read from the device only when somebody asks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vae_cli.machine import distributed

Sums = dict[str, float]


class NotFinite(Exception):
    """A term of the loss was no finite number at a step; `terms` names those terms."""

    def __init__(self, step: int, terms: list[str]) -> None:
        super().__init__(f"{' and '.join(terms)} not finite at step {step}")
        self.step = step
        self.terms = terms

    def __reduce__(self) -> tuple[type[NotFinite], tuple[int, list[str]]]:
        return NotFinite, (self.step, self.terms)  # how it comes to other processes


class Meter:
    """Sums the terms of each step, and gives their means since the last point of a curve and since the epoch began."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, list[Tensor]]] = []
        self._names: tuple[str, ...] = ()
        self._point: Sums = {}
        self._epoch: Sums = {}

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Note the terms of a step, each (B,), without waiting for the device; of a share of a batch what counts."""
        self._names = tuple(terms)
        self._pending.append((step, [distributed.counted(term.detach()) for term in terms.values()]))

    def read(self) -> None:
        """Wait for the device and add up what is pending, in all processes. Raises NotFinite, with the first step that
        was not."""
        if not self._pending:
            return
        summed = [torch.stack(terms).sum(1) for _, terms in self._pending]
        rows = distributed.total(torch.stack(summed)).tolist()
        counts = distributed.total(torch.tensor([len(terms[0]) for _, terms in self._pending])).tolist()
        for (step, _), count, row in zip(self._pending, counts, rows, strict=True):
            bad = [name for name, value in zip(self._names, row, strict=True) if not math.isfinite(value)]
            if bad:
                raise NotFinite(step, bad)
            for sums in (self._point, self._epoch):
                sums["images"] = sums.get("images", 0.0) + count
                for name, value in zip(self._names, row, strict=True):
                    sums[name] = sums.get(name, 0.0) + value
        self._pending.clear()

    def point(self) -> dict[str, float]:
        """The means since the last point, which end here."""
        self.read()
        means, self._point = _means(self._point), {}
        return means

    def epoch(self) -> dict[str, float]:
        """The means over the epoch, which ends here."""
        self.read()
        means, self._epoch = _means(self._epoch), {}
        return means

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {"point": dict(self._point), "epoch": dict(self._epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._point, self._epoch = dict(state["point"]), dict(state["epoch"])


def _means(sums: Sums) -> dict[str, float]:
    return {name: value / sums["images"] for name, value in sums.items() if name != "images"}
