"""Python's garbage collector: how often it searches for unused objects that refer to each other."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

USUAL = gc.get_threshold()
RARE = 50_000  # new objects between two searches


def collect_rarely() -> None:
    """Run the collector rarely, and not at exit: importing torch creates a million objects that are never freed."""
    gc.set_threshold(RARE)
    atexit.register(gc.freeze)


def collect_as_usual() -> None:
    """Run the collector as often as Python does by default, but ignore objects that already exist, such as modules.

    Long training runs need this: an object that refers to itself may keep tensors in memory until the next collection.
    """
    _freeze_once()
    gc.set_threshold(*USUAL)


@cache
def _freeze_once() -> None:
    gc.freeze()  # a second time, in a later run of a sweep, it would keep what is left of the earlier runs for good


@contextmanager
def reading_many() -> Iterator[None]:
    """Pause the collector while many files are read; otherwise it would repeatedly scan everything read so far."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
