"""What submitit does not ask a Slurm cluster that keeps no accounts: which jobs have ended without a result."""

from __future__ import annotations

import logging
import subprocess


def watch_jobs() -> None:
    """Have submitit ask squeue how jobs stand where sacct cannot tell it.

    Else it would wait for ever for a job that was cancelled.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    logging.getLogger("submitit").setLevel(logging.ERROR)
    if _answers("sacct", "--allocations", "--noheader"):
        return

    class Queue(SlurmInfoWatcher):
        def _make_command(self) -> list[str] | None:
            waiting = self._registered - self._finished
            return ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T"] if waiting else None

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            text = string if isinstance(string, str) else string.decode()
            states = dict(line.split("|") for line in text.splitlines())
            # What the queue no longer lists has ended; submitit then looks for its result.
            return {job: {"State": states.get(job, "ENDED")} for job in self._registered - self._finished}

    SlurmJob.watcher = Queue(delay_s=600)


def _answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
