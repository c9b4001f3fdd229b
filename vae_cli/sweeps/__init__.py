"""Many runs: launchers, Slurm, studies and searches."""

__all__ = ["job", "launcher", "progress", "reporter", "runner", "search", "slurm", "space", "study", "trials"]
