"""The interface of datasets: images in three disjoint splits, drawn with `split_seed`, not with the run's seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_cli.axes.dataset.mapped import Mapped
from vae_cli.core.errors import UserError
from vae_cli.core.rng import numpy_generator
from vae_cli.core.values import Natural
from vae_cli.machine.memory import free_memory

MEAN_BYTES = 1 << 20  # bytes of pixels per step of Split.mean: they fit into the processor's cache
STEPS_AHEAD = 32  # Split.mean reads a file this many steps ahead


class Factor(NamedTuple):
    """A known factor of variation: the name and the meaning of a column of `Split.factors`.

    kind  "categorical": whole numbers that stand for classes; "continuous"; or "circular": from 0 to 1, where 1 means
          the same as 0
    """

    name: str
    kind: Literal["categorical", "continuous", "circular"]


@dataclass(frozen=True, eq=False)
class Split:
    """The training, validation or test images: some rows of an array of images.

    images  uint8 levels or float32 (N, C, H, W), in memory or memory-mapped; other splits may share the array
    labels  int64 (N,), or None
    index   int64 (n,), the rows of `images` in this split
    mapped  the file of the images if they may not fit into memory, else None
    target  the device that batches are delivered on; None for the device of the images
    factors float32 (N, F), the known factors of variation, or None; the columns are described by `Splits.factors`

    Positions number the images within the split, 0 ... n - 1. Index, labels, factors and positions are on the device of
    the images. Images that do not fit onto a GPU stay in CPU memory, and `target` is the GPU.
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor
    mapped: Mapped | None = None
    target: torch.device | None = None
    factors: Tensor | None = None

    def __len__(self) -> int:
        return self.index.shape[0]

    def shuffled(self, generator: torch.Generator, batch_size: int, skip: int = 0) -> Iterator[Tensor]:
        """Yield every position once, in random order, in batches (B,), skipping the first `skip` batches.

        The order depends only on the generator. Images that may not fit into memory are shuffled in blocks.
        """
        if self.mapped is None:
            order = torch.randperm(len(self), generator=generator).to(self.images.device)
            yield from order.split(batch_size)[skip:]
            return
        for positions in self.mapped.shuffled(self.index.cpu(), generator, batch_size, skip):
            yield positions.to(self.images.device)

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """Yield every position once, in ascending order, in batches (B,)."""
        for positions in torch.arange(len(self), device=self.images.device).split(batch_size):
            if self.mapped is not None:
                # All rows are requested first: reading them one by one would wait for each.
                for row in self._rows(positions).tolist():
                    self.mapped.will_need(row, row)
            yield positions

    def batch(self, positions: Tensor) -> Tensor:
        """Return the images at positions (B,), float32 (B, C, H, W); 8-bit levels are divided by 255."""
        images = self._on_target(self.images, self._rows(positions))
        return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images

    def batch_labels(self, positions: Tensor) -> Tensor:
        """Return the labels at positions (B,), int64 (B,). Raises ValueError if the images have no labels."""
        if self.labels is None:
            raise ValueError("these images have no labels")
        return self._on_target(self.labels, self._rows(positions))

    def batch_factors(self, positions: Tensor) -> Tensor:
        """Return the factors of variation at positions (B,), float32 (B, F). Raises ValueError if they are unknown."""
        if self.factors is None:
            raise ValueError("the factors of variation of these images are not known")
        return self._on_target(self.factors, self._rows(positions))

    def mean(self) -> Tensor:
        """Return the mean image, float32 (C, H, W), in the units of `batch`. Raises ValueError for an empty split."""
        if len(self) == 0:
            raise ValueError("an empty split has no mean image")
        total = torch.zeros(self.images.shape[1:], dtype=torch.float64)
        images_per_step = max(1, MEAN_BYTES // (total.numel() * self.images.element_size()))
        # A file is read fastest from beginning to end. Sums of 8-bit levels are exact, so their order does not matter.
        rows_in_order = self.index.sort().values if self.images.dtype == torch.uint8 else self.index
        chunks = rows_in_order.split(images_per_step)
        for number, rows in enumerate(chunks):
            if self.mapped is not None:
                ahead = chunks[min(number + STEPS_AHEAD, len(chunks) - 1)]
                self.mapped.will_need(int(ahead[0]), int(ahead[-1]))
            total += self.images.index_select(0, rows).cpu().sum(0, dtype=torch.float64)
        if self.images.dtype == torch.uint8:
            total /= 255
        return (total / len(self)).to(self.target or self.images.device, torch.float32)

    def to(self, device: torch.device | str) -> Split:
        """Return a split that delivers batches on `device`.

        The images are moved there if they fill at most half of the device's free memory.
        """
        target = torch.device(device)
        there = free_memory(target) if target != self.images.device else None
        if there is not None and 2 * self.images.numel() * self.images.element_size() > there:
            return replace(self, target=target)
        labels, factors = (None if values is None else values.to(target) for values in (self.labels, self.factors))
        return Split(self.images.to(target), labels, self.index.to(target), self.mapped, factors=factors)

    def _rows(self, positions: Tensor) -> Tensor:
        return self.index.index_select(0, positions.to(self.index.device))

    def _on_target(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return rows of `values` (images, labels or factors), on the device that batches are delivered on."""
        if self.target is None or self.target == values.device:
            return values.index_select(0, rows)
        # A GPU copies from page-locked memory while the CPU continues; torch reuses this memory only after the copy.
        some = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype, pin_memory=self.target.type == "cuda")
        return torch.index_select(values, 0, rows, out=some).to(self.target, non_blocking=True)


class Splits(NamedTuple):
    """The training, validation (may be empty) and test images.

    classes  the class names, or None if there are no classes
    files    the fingerprint of the files that the images were read from (see Dataset.fingerprint_of_files)
    digest   a hash of all pixels, if it is known
    factors  the known factors of variation, one for each column of `Split.factors`, or None
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] | None
    files: str | None = None
    digest: str | None = None
    factors: tuple[Factor, ...] | None = None

    def to(self, device: torch.device | str) -> Splits:
        """Return splits that deliver batches on `device`. An array shared by several splits is moved only once."""
        train = self.train.to(device)
        validation, test = (
            replace(train, index=split.index.to(train.index.device))
            if split.images is self.train.images
            else split.to(device)
            for split in (self.validation, self.test)
        )
        return self._replace(train=train, validation=validation, test=test)


class Dataset(ABC):
    """A source of images.

    provides  properties that a likelihood or metric may need: "unit_interval" (values between 0 and 1), "levels"
              (values are 8-bit levels divided by 255), "labels"
    """

    provides: frozenset[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of the images, known before they are loaded."""

    def check(self) -> None:  # noqa: B027 (most choices have nothing to check)
        """Raise UserError for mistakes that can be found without loading an image, such as a missing folder."""

    def fingerprint_of_files(self) -> str | None:
        """Return a fingerprint of the files of the user's own images, found without opening them.

        None for images that do not change, such as published ones.
        """
        return None

    @abstractmethod
    def load(self) -> Splits:
        """Return the splits, which are disjoint and always the same for a given split_seed.

        Raises UserError if settings do not match the images, Failure if the images cannot be read or downloaded.
        """


def partition(count: int, validation: Natural, split_seed: Natural, test: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the training, validation and test images among `count` images, each int64 (n,).

    The test images are the head of a random permutation, the validation images its tail. So changing the size of one
    set does not change the images of the other, and a smaller test or validation set is a subset of a larger one.
    Raises UserError if no image is left to train on.

    >>> train, validation, test = partition(10, validation=2, split_seed=0, test=3)
    >>> train.tolist(), validation.tolist(), test.tolist()
    ([5, 3, 8, 7, 9], [2, 4], [6, 1, 0])
    """
    if test >= count:
        raise UserError(
            f"dataset.test={test} leaves no images to train on: the dataset has only {count}. Set dataset.test "
            f"to a smaller number or a fraction."
        )
    if validation >= count - test:
        raise UserError(
            f"dataset.validation={validation} leaves no images to train on: there are only {count - test} images for "
            f"training and validation. Set dataset.validation to a number between 0 and {count - test - 1}."
        )
    rows = torch.from_numpy(numpy_generator(split_seed).permutation(count).astype(np.int64))
    return rows[test : count - validation], rows[count - validation :], rows[:test]


def fingerprint(splits: Splits) -> str:
    """Return a fingerprint of the splits' sizes and rows and of the pixels of some images (32 hex digits), followed by
    the digest of all pixels if it is known."""
    digest = hashlib.blake2b(digest_size=16)
    for split in (splits.train, splits.validation, splits.test):
        digest.update(split.index.cpu().numpy().tobytes())
        some = split.index[:: max(1, len(split) // 16)]
        digest.update(split.images[some.to(split.images.device)].cpu().numpy().tobytes())
    return digest.hexdigest() + (f"-{splits.digest}" if splits.digest else "")


def is_fingerprint_of(found: object, splits: Splits) -> bool:
    """Return whether a stored fingerprint belongs to these splits. Earlier versions stored no digest of all pixels."""
    if not isinstance(found, str):
        return False
    (start, _, digest), (own_start, _, own_digest) = found.partition("-"), fingerprint(splits).partition("-")
    return start == own_start and (digest == own_digest or not digest or not own_digest)
