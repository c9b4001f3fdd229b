"""From overrides to an experiment: list the choices, call Hydra, name the run, check settings, build the objects."""

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
    "trust",
]
