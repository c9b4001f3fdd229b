"""Stop training between two steps: a signal is only recorded when it arrives, and the training loop checks for it."""

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
from vae_cli.machine.signals import HANG_UP, STOPS, leave_terminals, printing, terminals

# Slurm and other launchers send one of these when a job's time is nearly up. submitit has a handler that requeues the
# job and ends the process.
TIME_WARNINGS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
AT_ONCE = 2.0  # seconds in which a second signal is ignored: torchrun may forward one that was received directly


class Interruption:
    """A context in which the first SIGINT, SIGTERM or SIGHUP is only recorded, while a second one stops the process.

    A further SIGHUP is ignored, because the system and the shell both send one when a terminal is closed. From the
    first one on, nothing is printed to the terminal. A signal that the process already ignored stays ignored. SIGUSR1
    and SIGUSR2 are also recorded if they have a handler, which `stop_if_asked` calls later. If several processes train
    the run, each records its own signals, and all of them must call `arrived` and `stop_if_asked`, in which they agree
    on a signal. `overwrites`: the run was started with overwrite=true, which must be left out to resume it.
    """

    def __init__(self, overwrites: bool = False) -> None:
        self._but = ", without overwrite=true," if overwrites else ""
        self.signal: int | None = None
        self._recorded_at = 0.0
        self._previous: dict[int, Any] = {}
        self._terminals = terminals()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python sets signal handlers only in this thread
            stops = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
            warnings = [number for number in TIME_WARNINGS if callable(signal.getsignal(number))]
            for number in (*stops, *warnings):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        several = distributed.count() > 1
        if number == HANG_UP:
            self._previous[number] = signal.SIG_IGN
            leave_terminals(self._terminals)
            if self.signal is not None:
                return
        if self.signal in TIME_WARNINGS:
            return  # some clusters send SIGTERM too, but the job must be requeued
        if self.signal is not None and number not in TIME_WARNINGS:
            if several and time.monotonic() - self._recorded_at < AT_ONCE:
                return
            if number != signal.SIGINT:
                raise SystemExit(128 + number)
            raise KeyboardInterrupt
        self.signal, self._recorded_at = number, time.monotonic()
        # Only a plain write is safe here: the signal may have interrupted a print.
        again = b"" if number in TIME_WARNINGS else b" (Ctrl-C again stops at once)"
        when = b"at the next logged step" if several else b"after this step"
        if distributed.is_first():
            with printing(self._terminals):
                os.write(2, b"\nstopping " + when + again + b"\n")

    def arrived(self) -> bool:
        """Return whether any process has received a signal."""
        agreed = distributed.greatest(self.signal or 0)
        if agreed and self.signal is None:
            self.signal = agreed
        return agreed > 0

    def stop_if_asked(self, message: str) -> None:
        """If a signal arrived, print the message and exit with 128 plus the signal's number, such as 130 for SIGINT.

        For SIGUSR1 and SIGUSR2, the signal's own handler decides how the process ends; if it returns, training
        continues. Raises Stopped if the handler raises an error.
        """
        if not self.arrived():
            return
        assert self.signal is not None
        if self.signal in self._previous and self.signal in TIME_WARNINGS:
            self._hand_over(self.signal, message)
            return
        if distributed.is_first():
            with printing(self._terminals):
                print(f"{message}; type the same command again{self._but} to resume", file=sys.stderr, flush=True)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signal)

    def _hand_over(self, number: int, message: str) -> None:
        handler = self._previous[number]
        self.__exit__(None, None, None)  # Slurm may also send SIGTERM now; submitit's own handler must receive it
        print(message, file=sys.stderr)
        try:
            handler(number, None)
        except Exception as error:
            raise Stopped(f"{message}: {error} Type the same command again{self._but} to resume.") from error
        self.signal = None
        self.__enter__()
