"""Many runs: launchers, Slurm, studies, searches, and their progress."""

__all__ = ["job", "launcher", "progress", "reporter", "runner", "search", "slurm", "space", "study", "trials"]
