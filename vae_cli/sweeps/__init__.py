"""Sweeps over many runs: launchers, Slurm, studies, searches and progress bars."""

__all__ = ["job", "launcher", "progress", "reporter", "runner", "search", "slurm", "space", "study", "trials"]
