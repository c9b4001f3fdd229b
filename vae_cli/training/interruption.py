"""Stop a training between two steps: signals are noted, and the loop asks for them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from vae_cli.core.errors import Stopped
from vae_cli.machine import distributed

# A launcher that has a handler for one of these sends it when a job's time is nearly over; submitit's puts the job
# into the queue again, and ends it.
WARNINGS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
AT_ONCE = 2.0  # seconds: torchrun passes a signal on to processes that may have had it already


class Interruption:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second one stops at once. One that was ignored
    before stays ignored.

    A SIGUSR1 or SIGUSR2 for which there is a handler is noted too: the handler is called when the loop asks. Of several
    processes each notes what comes to it; in `came` and `raise_noted`, which all have to call, they agree.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._noted = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there can signals be handled
            stops = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
            warnings = [number for number in WARNINGS if callable(signal.getsignal(number))]
            for number in (*stops, *warnings):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        several = distributed.count() > 1
        if self.signal in WARNINGS:
            return  # some clusters send SIGTERM too, and a job that is put into the queue again is what is wanted
        if self.signal is not None and number not in WARNINGS:
            if several and time.monotonic() - self._noted < AT_ONCE:
                return
            raise KeyboardInterrupt
        self.signal, self._noted = number, time.monotonic()
        # Nothing but a plain write is safe here: the signal may have come in the middle of a print.
        again = b"" if number in WARNINGS else b" (Ctrl-C again stops at once)"
        if not several:
            os.write(2, b"\nstopping after this step" + again + b"\n")
        elif distributed.is_first():
            os.write(2, b"\nstopping at the next point of the curves" + again + b"\n")

    def came(self) -> bool:
        """Whether a signal has come, to any process."""
        agreed = distributed.greatest(self.signal or 0)
        if agreed and self.signal is None:
            self.signal = agreed
        return agreed > 0

    def raise_noted(self, said: str) -> None:
        """Where a signal came, say what was done and end as the signal would have: 130 for SIGINT, 143 for SIGTERM.

        A handler of SIGUSR1 or SIGUSR2 ends the process as it likes; where it returns, the training goes on. Raises
        Stopped where it refuses to.
        """
        if not self.came():
            return
        assert self.signal is not None
        if self.signal in self._previous and self.signal in WARNINGS:
            self._hand_over(self.signal, said)
            return
        if distributed.is_first():
            print(f"{said}; type the same command again to go on", file=sys.stderr)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)

    def _hand_over(self, number: int, said: str) -> None:
        handler = self._previous[number]
        self.__exit__(None, None, None)  # while submitit's handler is at it, Slurm sends SIGTERM, which has one too
        print(said, file=sys.stderr)
        try:
            handler(number, None)
        except Exception as error:
            raise Stopped(f"{said}: {error} Type the same command again to go on.") from error
        self.signal = None
        self.__enter__()
