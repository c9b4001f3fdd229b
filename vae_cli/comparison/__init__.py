"""`vae compare`: arms, statistics over seeds, findings and answers, plots, and the report."""

__all__ = [
    "answers",
    "arms",
    "cache",
    "collect",
    "compare",
    "dot_plots",
    "export",
    "findings",
    "gallery",
    "labels",
    "members",
    "missing",
    "plot_layout",
    "plot_style",
    "plots",
    "report",
    "selection",
    "statistics",
    "table",
    "write",
]
