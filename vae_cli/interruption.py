"""Stop a training between two steps: Ctrl-C and SIGTERM are noted, and the loop asks for them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from vae_cli import processes

AT_ONCE = 2.0  # seconds: torchrun passes a signal on to processes that may have had it already


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second one stops at once.

    Of several processes each notes what comes to it; in `came` and `raise_noted`, which all have to call, they agree.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._noted = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        several = processes.count() > 1
        if self.signal is not None:
            if several and time.monotonic() - self._noted < AT_ONCE:
                return
            raise KeyboardInterrupt
        self.signal, self._noted = number, time.monotonic()
        # Nothing but a plain write is safe here: the signal may have come in the middle of a print.
        if not several:
            os.write(2, b"\nstopping after this step (Ctrl-C again stops at once)\n")
        elif processes.is_first():
            os.write(2, b"\nstopping at the next point of the curves (Ctrl-C again stops at once)\n")

    def came(self) -> bool:
        """Whether a signal has come, to any process."""
        agreed = processes.greatest(self.signal or 0)
        if agreed and self.signal is None:
            self.signal = agreed
        return agreed > 0

    def raise_noted(self, said: str) -> None:
        """Where a signal came, say what was done and end as the signal would have: 130 for SIGINT, 143 for SIGTERM."""
        if not self.came():
            return
        if processes.is_first():
            print(f"{said}; type the same command again to go on", file=sys.stderr)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal or signal.SIGTERM))
