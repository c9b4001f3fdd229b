"""Datasets that may not fit into memory: images are shuffled in blocks and prefetched from their file.

Reading single images at random positions in the file would cost one seek per image and waste the system's read-ahead.
Instead, whole blocks of neighboring images are read, and each batch is drawn from many blocks.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# Fixed numbers, not fractions of a machine's memory, so that a seed gives the same order on every machine.
BLOCKWISE_ABOVE = 1 << 30  # bytes of images; a larger file is shuffled in blocks
BLOCK_BYTES = 1 << 20  # bytes of a block of images, which is read at once
BLOCKS_TOGETHER = 256  # blocks whose images are shuffled together


class Mapped:
    """A file of 8-bit images, memory-mapped.

    start   byte offset of the first image
    images  uint8 of the given shape (N, C, H, W), read from the file on access; changes are not written back
    """

    def __init__(self, path: Path, start: int, shape: tuple[int, ...]) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(
            mmap, "MADV_RANDOM"
        ):  # turns off the system's read-ahead: the next images of the file are not needed next
            self._map.madvise(mmap.MADV_RANDOM)
        self._start, self._row_bytes = start, prod(shape[1:])
        self.images = torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=prod(shape)).view(shape)

    def will_need(self, first: int, last: int) -> None:
        """Ask the operating system, if it supports this, to prefetch rows `first` to `last` (inclusive)."""
        if hasattr(mmap, "MADV_WILLNEED"):
            begin = self._start + first * self._row_bytes
            begin -= begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, begin, self._start + (last + 1) * self._row_bytes - begin)

    def shuffled(self, index: Tensor, generator: torch.Generator, batch_size: int, skip: int) -> Iterator[Tensor]:
        """Yield the positions 0 ... n - 1 in random order, in batches (B,), skipping the first `skip` batches.

        Position i stands for row index[i] of the file; index is (n,). Rows are prefetched before a batch needs them.
        Blocks are taken in random order, and the images of BLOCKS_TOGETHER blocks are shuffled together.
        """
        images = max(1, BLOCK_BYTES // self._row_bytes)  # per block
        blocks = index.argsort().split(images)
        blocks = [blocks[number] for number in torch.randperm(len(blocks), generator=generator).tolist()]
        together = torch.cat(blocks).split(images * BLOCKS_TOGETHER)
        order = torch.cat([group[torch.randperm(len(group), generator=generator)] for group in together])
        requested = skip * batch_size // (images * BLOCKS_TOGETHER) * BLOCKS_TOGETHER
        for number, positions in enumerate(order.split(batch_size)[skip:], start=skip):
            # Every block that this batch may draw from, and some more to keep the disk busy.
            for block in blocks[requested : (number + 1) * batch_size // images + BLOCKS_TOGETHER * 5 // 4]:
                first, last = index[block[[0, -1]]].tolist()
                self.will_need(first, last)
                requested += 1
            yield positions
