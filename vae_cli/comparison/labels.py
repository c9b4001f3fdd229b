"""Labels of arms, such as 'fixed 1.0, beta 0': only the settings that distinguish the arms of a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vae_cli.comparison.members import all_keys
from vae_cli.config import catalog
from vae_cli.config.naming import AXES, digest, show

BETA = "regularizer.beta"
LONGEST = 40  # characters of a value
FIRST_WORDS = ("sigma", "prior", "regularizer", "network", "optimizer")  # labels start with these groups


def labels_of(rows: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a short label for each arm, given the settings that differ between arms and all settings of each."""
    keys = _needed(rows)
    usual = {key: usual_value(key, rows) for key in keys}
    labels = [
        _label(row, whole, keys, usual) or _label(row, whole, keys, {})
        for row, whole in zip(rows, settings, strict=True)
    ]
    if len(rows) == 1:
        return [str(settings[0].get("sigma", "all runs"))]
    if len(set(labels)) < len(labels):
        labels = [", ".join(f"{k} {_brief(v)}" for k, v in row.items() if v is not None) or "the rest" for row in rows]
    return labels


def _needed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of the settings that labels must mention. A key is left out if the arms can be distinguished
    without it, unless it is the choice of a component, the level of the noise or the regularizer's weight."""
    keys = sorted(all_keys(rows), key=lambda key: (key not in AXES, key != BETA, key))
    for key in reversed(list(keys)):
        rest = [other for other in keys if other != key]
        if key in AXES or key in (BETA, "sigma.value"):
            continue
        if len({tuple(row.get(k) for k in rest) for row in rows}) == len(rows):
            keys = rest
    return keys


def usual_value(key: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the most common value of a setting, which labels need not mention. If several values are equally common,
    return the default (for the regularizer's weight: 1, as in the ELBO), or None if the default is not one of them."""
    counts = Counter(row.get(key) for row in rows if row.get(key) is not None)
    most = max(counts.values(), default=0)
    tied = [value for value, count in counts.items() if count == most]
    if len(tied) == 1:
        return tied[0]
    default = catalog.defaults().get(key)
    own = 1 if key == BETA else None if default is None else default.default
    return own if own in tied else None


def _label(row: Mapping[str, Any], whole: Mapping[str, Any], keys: Sequence[str], usual: Mapping[str, Any]) -> str:
    axes = list(dict.fromkeys([*FIRST_WORDS, *(key.partition(".")[0] for key in keys)]))
    parts = []
    for axis in axes:
        words = []
        of_axis = [key for key in keys if key.partition(".")[0] == axis]
        for key in sorted(of_axis, key=lambda key: (key != axis, not key.endswith(".value"), key)):
            value = row.get(key)
            if value is None or (axis != "sigma" and value == usual.get(key)):
                continue
            name = key.rpartition(".")[2]
            if key == axis and axis in AXES:
                words.append(_brief(value))
            elif name == "value":
                words += [_brief(value)] if words else [_brief(whole.get(axis, axis)), _brief(value)]
            else:
                words.append(f"{name} {_brief(value)}")
        if words:
            parts.append(" ".join(words))
    return ", ".join(parts)


def _brief(value: Any) -> str:
    """Return a value as it is typed, shortened so that it fits into a table and stays distinguishable."""
    text = show(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 10]}…{digest(text)}"
