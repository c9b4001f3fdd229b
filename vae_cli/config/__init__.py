"""From words to objects: the catalog of choices, Hydra, names, checks, and the experiment they build."""

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
