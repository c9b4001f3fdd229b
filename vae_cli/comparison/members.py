"""The runs of a comparison, and the checks that they can be compared with each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path
from typing import Any

from vae_cli.config.naming import hparams, show
from vae_cli.core.errors import UserError
from vae_cli.runs.find import last_written
from vae_cli.runs.folder import RunDir

LISTED = 4  # runs that a message names
MUST_AGREE = ("dataset", "likelihood")
EVALUATED_ALIKE = {"images": "fingerprint of the images", "weights": "weights evaluated", "seed": "evaluation seed"}
NO_SETTING = frozenset(["seed", "experiment"])


@dataclass(frozen=True)
class Member:
    """One run of a comparison: its settings without the seed, and its evaluation if it has one."""

    folder: RunDir
    settings: dict[str, Any]
    seed: int
    summary: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] | None = None  # names of the metrics that its study needs; None: all

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """The figures of the evaluation, by name."""
        found: dict[str, dict[str, Any]] = self.evaluation.get("figures", {})
        return found

    @property
    def noise(self) -> frozenset[str]:
        """The properties of the encoder's noise (see `provides` of vae_cli.axes.sigma.Sigma); before the run is
        evaluated, only that there is noise."""
        return frozenset(map(str, self.evaluation.get("noise", ["noise"])))

    def scalar(self, name: str) -> float | None:
        """Return the value of a figure that is a single number; None if the run has no such figure."""
        value = self.figures.get(name, {}).get("value")
        return float(value) if isinstance(value, int | float) else None

    def curve(self, name: str) -> list[float] | None:
        """Return the values of a figure that is a list of numbers; None if the run has no such figure."""
        value = self.figures.get(name, {}).get("value")
        return value if isinstance(value, list) and value else None


def read_member(folder: RunDir, summary: dict[str, Any] | None = None) -> Member:
    """Read the settings of a finished run, and its summary if it is not given. Raises UserError or Failure if a file is
    missing or damaged."""
    config = folder.config()
    settings: dict[str, Any] = {**hparams(config), "epochs": config.get("epochs")}
    # Components that need the number of latent dimensions repeat it in their settings.
    repeated = [k for k, v in settings.items() if k.endswith(".latent") and v == settings.get("latent")]
    kept = {k: v for k, v in settings.items() if k not in NO_SETTING and k not in repeated and v is not None}
    named = config.get("metrics")
    metrics = [str(name) for name in named] if isinstance(named, list) else None
    summary = folder.summary() if summary is None else summary
    return Member(folder, kept, int(config.get("seed", 0)), summary, metrics=metrics)


def drop_twins(members: Sequence[Member]) -> tuple[list[Member], list[tuple[Member, Member]]]:
    """Keep the first of several runs with the same settings and seed; also return pairs (dropped run, kept run)."""
    kept: dict[Any, Member] = {}
    twins = []
    for member in members:
        key = (tuple(sorted(member.settings.items(), key=str)), member.seed)
        if key in kept:
            twins.append((member, kept[key]))
        kept.setdefault(key, member)
    return list(kept.values()), twins


def refuse_incomparable(members: Sequence[Member]) -> None:
    """Raise UserError unless all runs have the same dataset, split and likelihood, and all evaluations used the same
    images, seed and weights (best or last). The message lists the values that differ and the runs that have them."""
    shared = [_must_agree(member) for member in members]
    differing = [key for key in all_keys(shared) if len({one.get(key) for one in shared}) > 1]
    if not differing:
        return
    lines = []
    for key in differing:
        lines.append(f"  {key}:")
        values = list(dict.fromkeys(one.get(key) for one in shared))
        for value in values:
            having = [m for m, one in zip(members, shared, strict=True) if one.get(key) == value]
            lines.append(f"    {'not set' if value is None else show(value)} in {_named(having)}")
    raise UserError(
        "These runs cannot be compared, because their figures come from different data, likelihoods or evaluations:\n"
        + "\n".join(lines)
        + f"\nCompare runs that agree in these settings, for example: {_suggestion(members, shared, differing)}"
    )


def like_the_newest(members: Sequence[Member]) -> tuple[list[Member], str | None]:
    """Keep the runs that can be compared with the newest; also return a note on the runs left out, or None."""
    newest = max(members, key=lambda member: last_written(member.folder.path))
    wanted = _must_agree(newest)
    kept = [member for member in members if _must_agree(member) == wanted]
    others = [member for member in members if _must_agree(member) != wanted]
    if not others:
        return kept, None
    keys = all_keys([wanted, *map(_must_agree, others)])
    differing = [key for key in keys if any(_must_agree(member).get(key) != wanted.get(key) for member in others)]
    return kept, (
        f"Left out: {_named(others)}. They cannot be compared with the newest run, {newest.folder.path}, because they "
        f"differ from it in {', '.join(differing)}."
    )


def _must_agree(member: Member) -> dict[str, Any]:
    """Return the settings, and the conditions of evaluation, that must be the same in all runs of a comparison."""
    same = {k: v for k, v in member.settings.items() if k.partition(".")[0] in MUST_AGREE}
    return same | {word: member.evaluation[key] for key, word in EVALUATED_ALIKE.items() if key in member.evaluation}


def _suggestion(members: Sequence[Member], shared: Sequence[Mapping[str, Any]], differing: Sequence[str]) -> str:
    """Return a command that compares the largest set of comparable runs, by folder if the folder contains no others."""
    keys = [tuple(one.get(key) for key in differing) for one in shared]
    most = Counter(keys).most_common(1)[0][0]
    own = [m.folder.path for m, key in zip(members, keys, strict=True) if key == most]
    others = [m.folder.path for m, key in zip(members, keys, strict=True) if key != most]
    parent = common_folder(own)
    if parent != Path() and not any(parent in path.parents for path in others):
        return f"vae compare {parent}"
    return "vae compare " + " ".join(str(path) for path in own[:LISTED]) + (" ..." if len(own) > LISTED else "")


def common_folder(paths: Sequence[Path]) -> Path:
    """Return the innermost folder that contains all of these runs; for a single run, its parent."""
    is_mixed = len({path.is_absolute() for path in paths}) > 1
    return Path(commonpath([(path.absolute() if is_mixed else path).parent for path in paths]))


def _named(members: Sequence[Member]) -> str:
    names = ", ".join(str(member.folder.path) for member in members[:LISTED])
    more = f" and {len(members) - LISTED} more" if len(members) > LISTED else ""
    return f"{len(members)} run{'s' if len(members) > 1 else ''}: {names}{more}"


def all_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys of all rows, each once, in the order of their first occurrence.

    >>> all_keys([{"a": 1, "b": 2}, {"c": 3, "a": 4}])
    ['a', 'b', 'c']
    """
    return list(dict.fromkeys(key for row in rows for key in row))
