"""The command `vae`, which `python -m vae_cli` runs too. Only modules that load quickly are imported here."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C: raise KeyboardInterrupt, but end at once if a module is being imported.

    An interrupted import leaves half a module behind, and libraries report that as an error of their own.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(2, b"\x1b[?25h")  # a progress display may have hidden the cursor
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background process ignores it
        signal.signal(signal.SIGINT, interrupt)
    from vae_cli.cli import main as run

    try:
        run()
    finally:  # all is done and printed; what runs at exit must not be interrupted
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
