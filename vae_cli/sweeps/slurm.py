"""Watch jobs on a Slurm cluster that does not keep accounting records.

submitit asks only sacct for the states of jobs. Without accounting, sacct cannot answer, and submitit waits forever for
a canceled job. `watch_jobs` makes submitit ask squeue instead.

Private names of submitit: `SlurmInfoWatcher._make_command`, which `QueueWatcher` overrides. If a later version of
submitit no longer has this method, submitit will ask sacct again, and a sweep on a cluster without accounting will wait
forever for a canceled job. Sweeps on other clusters are not affected.
"""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Iterable
from typing import Any

ENDS = frozenset(
    [
        *("ENDED", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE"),
        *("OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "REVOKED"),
    ]
)
SQUEUE = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T"]


def watch_jobs() -> None:
    """Make submitit ask squeue for the states of its jobs if sacct does not answer.

    This replaces `SlurmJob.watcher`, a public attribute that all jobs share, for the rest of the process.
    """
    from submitit.slurm.slurm import SlurmJob

    logging.getLogger("submitit").setLevel(logging.ERROR)
    if not command_succeeds("sacct", "--allocations", "--noheader"):
        SlurmJob.watcher = queue_watcher()


def queue_watcher() -> Any:
    """Return a submitit watcher that asks squeue for the states of all jobs that have not ended."""
    from submitit.slurm.slurm import SlurmInfoWatcher

    class QueueWatcher(SlurmInfoWatcher):
        def __init__(self) -> None:
            super().__init__(delay_s=600)
            self._one_at_a_time = threading.RLock()
            self._jobs: set[str] = set()
            self._open: set[str] = set()  # the jobs that had not ended when squeue was last asked

        def register_job(self, job_id: str) -> None:
            self._jobs.add(job_id)
            super().register_job(job_id)

        def update_if_long_enough(self, mode: str) -> None:
            with self._one_at_a_time:  # each job has a thread that waits for it
                super().update_if_long_enough(mode)

        def _make_command(self) -> list[str] | None:
            self._open = {job for job in self._jobs.copy() if not self.is_done(job, mode="cache")}
            return SQUEUE if self._open else None

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            return states_of(self._open, string if isinstance(string, str) else string.decode())

    return QueueWatcher()


def states_of(jobs: Iterable[str], listed: str) -> dict[str, dict[str, str]]:
    """Return job states in submitit's format, given lines of squeue output such as `12|RUNNING` or `12_0|PENDING`.

    >>> states_of(["12", "13"], "12|CONFIGURING")
    {'12': {'State': 'RUNNING'}, '13': {'State': 'ENDED'}}
    """
    states = dict(line.strip().split("|") for line in listed.splitlines() if line.strip())
    # A job that squeue no longer lists has ended, and submitit then looks for its result. submitit would take a state
    # that it does not know, such as CONFIGURING, for the end of the job.
    return {job: {"State": found if (found := states.get(job, "ENDED")) in ENDS else "RUNNING"} for job in jobs}


def command_succeeds(*command: str) -> bool:
    """Run a command and return whether it succeeded."""
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
