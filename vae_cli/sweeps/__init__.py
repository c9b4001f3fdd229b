"""Many runs: launchers, Slurm, studies and searches."""

__all__ = ["launcher", "progress", "runner", "search", "slurm", "space", "study", "trials"]
