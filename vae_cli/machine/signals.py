"""The signals that stop a process, and what to do if its terminal is closed or its parent has ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

HANG_UP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows does not have this signal
STOPS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number is not None)


def terminals() -> list[int]:
    """Return the file descriptors of standard output and standard error that are terminals."""
    return [number for number in (1, 2) if os.isatty(number)]


def leave_terminals(outputs: Sequence[int]) -> None:
    """Redirect these file descriptors to nowhere: printing to a terminal that has been closed raises an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in outputs:
        os.dup2(nowhere, number)
    os.close(nowhere)


@contextmanager
def printing(outputs: Sequence[int]) -> Iterator[None]:
    """Print inside this context; if the terminal has been closed, leave it, instead of raising OSError."""
    try:
        yield
    except OSError:
        leave_terminals(outputs)


_watches = False  # whether this process stops when its parent ends


PARENT = "VAE_SWEEP_PID"  # the environment variable with the number of the process that runs a sweep


def stop_with_parent(grace: float) -> None:
    """Make this process save and stop, as on SIGTERM, when its parent ends, and end it after `grace` seconds more.

    For processes that multiprocessing did not start. The parent's number is in the environment, since the parent may
    have ended before this is called. Works only on POSIX systems, which give an orphan a new parent.
    """
    global _watches
    if _watches or os.name != "posix":
        return
    _watches, parent = True, int(os.environ.get(PARENT) or os.getppid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_parent() -> None:
    """Make this process, which multiprocessing has started, end when its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
