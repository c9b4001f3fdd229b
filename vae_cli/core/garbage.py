"""Python's garbage collector: how often it searches for unused objects that refer to each other."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()
RARE = 50_000  # new objects between two searches


def collect_rarely() -> None:
    """Search rarely, and not when Python exits: importing torch creates a million objects that are used to the end."""
    gc.set_threshold(RARE)
    atexit.register(gc.freeze)


def collect_as_usual() -> None:
    """Search as often as Python does by default, except through the objects of now, such as imported modules.

    A long training needs this: an object that refers to itself may keep tensors in memory until the next search.
    """
    gc.freeze()
    gc.set_threshold(*USUAL)


@contextmanager
def reading_many() -> Iterator[None]:
    """Pause the collector while many files are read: it would repeatedly search everything read so far."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
