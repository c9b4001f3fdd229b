"""From overrides to an experiment: the catalog of choices, Hydra, names, checks, and the objects that they build."""

__all__ = [
    "aliases",
    "build",
    "catalog",
    "claims",
    "compose",
    "glossary",
    "hydra",
    "instantiate",
    "messages",
    "naming",
    "objective",
    "overrides",
    "settings",
]
