"""Images that may be more than memory holds: shuffled in blocks, and read before they are needed.

Read one by one from all over a file, such images cost a seek each, and a system that reads ahead reads what nobody
asked for. A block is read in one piece; batches are drawn from many blocks at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# Fixed numbers, not shares of a machine's memory: the same seed gives the same order everywhere.
BLOCKWISE_ABOVE = 1 << 30  # bytes of images that are shuffled without a thought; more of them go by blocks
BLOCK_BYTES = 1 << 20  # bytes that are read in one piece
BLOCKS_TOGETHER = 256  # that are shuffled together


class Mapped:
    """A file of 8-bit images of this shape, (N, C, H, W) from the byte `start`, as a tensor that is read when it is
    needed: images."""

    def __init__(self, path: Path, start: int, shape: tuple[int, ...]) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_RANDOM"):  # what lies beside an image in the file is not what is needed next
            self._map.madvise(mmap.MADV_RANDOM)
        self._start, self._row_bytes = start, prod(shape[1:])
        self.images = torch.frombuffer(self._map, dtype=torch.uint8, offset=start, count=prod(shape)).view(shape)

    def will_need(self, first: int, last: int) -> None:
        """Ask the system to read the rows from first to last now, without waiting for them; some systems cannot."""
        if hasattr(mmap, "MADV_WILLNEED"):
            begin = self._start + first * self._row_bytes
            begin -= begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, begin, self._start + (last + 1) * self._row_bytes - begin)

    def shuffled(self, index: Tensor, generator: torch.Generator, batch_size: int, skip: int) -> Iterator[Tensor]:
        """Yield the positions 0 ... len(index) - 1 in batches, without the first `skip`, and have the rows of the file
        at index (n,) read ahead."""
        images = max(1, BLOCK_BYTES // self._row_bytes)  # in a block
        blocks = index.argsort().split(images)
        blocks = [blocks[number] for number in torch.randperm(len(blocks), generator=generator).tolist()]
        together = torch.cat(blocks).split(images * BLOCKS_TOGETHER)
        order = torch.cat([group[torch.randperm(len(group), generator=generator)] for group in together])
        asked = skip * batch_size // (images * BLOCKS_TOGETHER) * BLOCKS_TOGETHER
        for number, positions in enumerate(order.split(batch_size)[skip:], start=skip):
            # All that this batch may draw from, and some more for the disk to be at.
            for block in blocks[asked : (number + 1) * batch_size // images + BLOCKS_TOGETHER * 5 // 4]:
                first, last = index[block[[0, -1]]].tolist()
                self.will_need(first, last)
                asked += 1
            yield positions
