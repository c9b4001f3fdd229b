"""A study: several sweeps that belong together, the `arms` of a preset, each written as it would be typed."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from vae_cli.core.errors import UserError


def jobs_of_study(job: Sequence[str], arms: Sequence[str]) -> list[list[str]]:
    """The jobs that the arms of a study make of one job, all as overrides, each once.

    What the job sets itself narrows the study: of the arms that set the same key only those with the same value are
    left. Raises UserError where none is.
    """
    own = dict(_split(word) for word in job)
    found: dict[frozenset[str], list[str]] = {}
    for arm in arms:
        for words in _sweep(arm):
            if all(own.get(key, value) == value for key, value in map(_split, words)):
                whole = [*(word for word in words if _split(word)[0] not in own), *job]
                found.setdefault(frozenset(whole), whole)
    if not found:
        keys = {key for arm in arms for words in _sweep(arm) for key, _ in map(_split, words)}
        asked = " ".join(word for word in job if _split(word)[0] in keys)
        raise UserError(f"no arm of this study has {asked}. It has: {'; '.join(arms)}.")
    return list(found.values())


def _sweep(arm: str) -> list[list[str]]:
    """Every combination of the values in an arm, such as `sigma=fixed sigma.value=0.5,1`."""
    return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(arm.split()), None)[0]


def _split(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key, value
