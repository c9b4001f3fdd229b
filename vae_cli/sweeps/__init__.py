"""Many runs: launchers, Slurm, studies, searches, and their progress."""

__all__ = ["launcher", "progress", "runner", "search", "slurm", "space", "study", "trials"]
