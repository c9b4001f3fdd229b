"""Stop a training between two steps: Ctrl-C and SIGTERM are noted, and the loop asks for them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second one stops at once. A signal that was
    ignored before stays ignored."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # Nothing but a plain write is safe here: the signal may have come in the middle of a print.
        os.write(2, b"\nstopping after this step (Ctrl-C again stops at once)\n")

    def raise_noted(self, said: str) -> None:
        """Where a signal came, say what was done and end as the signal would have: 130 for SIGINT, 143 for SIGTERM."""
        if self.signal is None:
            return
        print(f"{said}; type the same command again to go on", file=sys.stderr)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)
