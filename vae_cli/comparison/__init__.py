"""What `vae compare` says: arms, statistics over seeds, findings, plots and the report."""

__all__ = [
    "answers",
    "arms",
    "cache",
    "compare",
    "findings",
    "gallery",
    "labels",
    "members",
    "missing",
    "plots",
    "report",
    "statistics",
]
