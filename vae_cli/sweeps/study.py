"""A study: several related sweeps, listed under `arms` in a preset, each written as the user would type it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser

from vae_cli.core.errors import UserError


def jobs_of_study(job: Sequence[str], arms: Sequence[str]) -> list[list[str]]:
    """Return the jobs of a study, each combined with the overrides in `job`, without duplicates.

    `job` narrows the study: jobs of the study that set a key of `job` to a different value are left out. Raises
    UserError if no jobs remain.
    """
    own = dict(_split(word) for word in job)
    found: dict[frozenset[str], list[str]] = {}
    for arm in arms:
        for words in _combinations(arm):
            if all(own.get(key, value) == value for key, value in map(_split, words)):
                whole = [*(word for word in words if _split(word)[0] not in own), *job]
                found.setdefault(frozenset(whole), whole)
    if not found:
        keys = {key for arm in arms for words in _combinations(arm) for key, _ in map(_split, words)}
        typed = " ".join(word for word in job if _split(word)[0] in keys)
        raise UserError(f"no arm of this study has {typed}. Its arms are: {'; '.join(arms)}.")
    return list(found.values())


def _combinations(arm: str) -> list[list[str]]:
    """Return every combination of the values in an arm such as `sigma=fixed sigma.value=0.5,1`."""
    words: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(arm.split()):
        key = override.get_key_element()
        is_sweep = override.is_sweep_override()
        values = list(override.sweep_string_iterator()) if is_sweep else [override.get_value_element_as_str()]
        words[key] = [f"{key}={value}" for value in values]
    return [list(combination) for combination in product(*words.values())]


def _split(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key, value
