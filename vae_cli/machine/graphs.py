"""CUDA graphs: a computation that is recorded once and then replayed by a single launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def capture(compute: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Record a computation on the current GPU, and return its result and a function that replays it.

    The computation is recorded, not run: the tensors of the result have no values until the first replay, and each
    replay overwrites them. Each replay reads the inputs from the same memory and draws new random numbers.

    Raises RuntimeError if the computation cannot be recorded, for example because it reads a value from the GPU. The
    state of the GPU's random generator is then restored.
    """
    random = torch.cuda.get_rng_state()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=_side_stream(torch.cuda.current_device())):
            result = compute()
    except Exception:
        torch.cuda.synchronize()
        torch.cuda.set_rng_state(random)
        raise
    return result, graph.replay


def beside(compute: Callable[[], T]) -> T:
    """Run a computation on its own CUDA stream, as torch requires before a capture, and return its result.

    Later work on the current stream waits for the computation to finish; the CPU does not wait.
    """
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = compute()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # only one, because cuBLAS takes up to 64 MB of memory for each stream
