"""What submitit does not ask a Slurm cluster that keeps no accounts: which jobs have ended without a result."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Iterable

ENDS = frozenset(
    [
        *("ENDED", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE"),
        *("OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "REVOKED"),
    ]
)


def watch_jobs() -> None:
    """Have submitit ask squeue how jobs stand where sacct cannot tell it.

    Else it would wait for ever for a job that was cancelled.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    logging.getLogger("submitit").setLevel(logging.ERROR)
    if _answers("sacct", "--allocations", "--noheader"):
        return

    class Queue(SlurmInfoWatcher):
        def __init__(self) -> None:
            super().__init__(delay_s=600)
            self._asking = threading.RLock()
            self._asked: set[str] = set()

        def update_if_long_enough(self, mode: str) -> None:
            with self._asking:  # a thread waits for each job
                super().update_if_long_enough(mode)

        def _make_command(self) -> list[str] | None:
            self._asked = self._registered - self._finished
            return (
                ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T"] if self._asked else None
            )

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            return states_of(self._asked, string if isinstance(string, str) else string.decode())

    SlurmJob.watcher = Queue()


def states_of(jobs: Iterable[str], listed: str) -> dict[str, dict[str, str]]:
    """How jobs stand, from squeue's lines `12|RUNNING` or `12_0|PENDING`, in submitit's words."""
    states = dict(line.strip().split("|") for line in listed.splitlines() if line.strip())
    # What the queue no longer lists has ended; submitit then looks for its result. It takes what it does not know, as
    # CONFIGURING, for an end.
    return {job: {"State": found if (found := states.get(job, "ENDED")) in ENDS else "RUNNING"} for job in jobs}


def _answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
