"""`vae compare`: finished runs side by side, as a table, files and a report that answers the five questions."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vae_cli.comparison import cache
from vae_cli.comparison.arms import Arm, Comparison, partly
from vae_cli.comparison.cache import CachedReport, Sheet
from vae_cli.comparison.findings import amount
from vae_cli.comparison.members import (
    Member,
    common_folder,
    drop_twins,
    like_the_newest,
    read_member,
    refuse_incomparable,
)
from vae_cli.comparison.missing import complete_evaluations
from vae_cli.comparison.statistics import statistic
from vae_cli.config.naming import clean
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import reading_many, write_json, write_text
from vae_cli.core.wording import digits_for
from vae_cli.metrics.record import rank
from vae_cli.runs.find import find_run, find_runs
from vae_cli.runs.folder import RunDir

# Columns of the table on the terminal, the most telling first: as many are shown as fit.
COLUMNS = {
    "rate": "rate",
    "distortion": "distortion",
    "elbo": "ELBO",
    "elbo_gaussian_prior": "ELBO, refitted prior",
    "noise_probe_tolerance": "tolerance",
    "scale_mean": "mean sigma",
    "jacobian_frobenius_halfway": "Jacobian half-way",
    "frechet_prior": "Fréchet, prior",
    "frechet_mixture": "Fréchet, mixture",
}


@dataclass(frozen=True)
class Asked:
    """What was asked of a comparison, beside the runs; are_named says that these were named, and no folder of them."""

    profile: str | None
    reference: str | None
    tensorboard: bool
    device: str
    data_dir: str | Path | None
    out: Path | None
    are_named: bool


def compare(
    runs: list[str],
    *,
    profile: str | None,
    jobs: int | None,
    reference: str | None,
    tensorboard: bool,
    device: str,
    out: Path | None,
    runs_dir: Path,
    data_dir: str | Path | None,
) -> None:
    """Evaluate what is not evaluated yet, print the table and write the report. Raises UserError or Failure."""
    console = Console()
    if device != "auto":
        from vae_cli.machine.device import find_device

        find_device(device)  # what is wrong for all runs is said once, and before anything is measured
    if out is not None:
        _refuse_place(out)
    paths = _paths(runs, runs_dir)
    are_named = bool(runs) and all((Path(name) / "config.yaml").exists() for name in runs)
    asked = Asked(profile, reference, tensorboard, device, data_dir, out, are_named)
    stamped = cache.stamp(paths, asdict(asked))  # before anything is read: what changes while it is read has changed
    answer = cache.find(paths, stamped, out)
    if answer is None:
        answer = _make(paths, asked, jobs, stamped, console)
    else:
        for note in answer.notes:
            _say(console, note)
        show_sheet(console, answer.sheet)
        _say(console, "Nothing has changed since this report was written:")
    names = [*cache.FILES, *(["tensorboard"] if tensorboard else []), "figures"]
    for name in names:
        _say(console, str(answer.folder / name))


def _make(paths: Sequence[Path], asked: Asked, jobs: int | None, stamped: str, console: Console) -> CachedReport:
    """Compare, say what there is to say but for the files, and write these."""
    found = collect(paths, asked.are_named)
    members, notes = found.members, found.notes
    for note in notes:
        _say(console, note)
    refuse_incomparable(members)
    if asked.reference is not None:
        Comparison(members, asked.reference)  # a name that is none is refused before anything is evaluated
    members, is_new = complete_evaluations(members, asked.profile, jobs, asked.device, asked.data_dir, console)
    if is_new:  # all is read again, so that the stamp is of what was read
        stamped, found = cache.stamp(paths, asdict(asked)), collect(paths, asked.are_named)
        members, _ = complete_evaluations(found.members, asked.profile, jobs, asked.device, asked.data_dir, console)
        notes = found.notes
    refuse_incomparable(members)
    profiles = sorted({str(member.evaluation.get("profile")) for member in members})
    if len(profiles) > 1:
        notes.append(
            f"The runs were evaluated with different profiles ({', '.join(profiles)}), on more or fewer images; "
            f"type --profile {max(profiles, key=rank)} to evaluate all alike."
        )
        _say(console, notes[-1])
    comparison = Comparison(members, asked.reference)
    folder = asked.out or common_folder([member.folder.path for member in members]) / "compare"
    answer = CachedReport(folder, notes, sheet(comparison))
    show_sheet(console, answer.sheet)
    with console.status("writing the report") if console.is_terminal else nullcontext():
        has_pictures = write_all(comparison, folder, notes, asked.device, asked.data_dir, asked.tensorboard)
    if has_pictures and not found.is_moving:
        cache.keep(answer, stamped)
    return answer


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


@dataclass
class Collected:
    """The finished runs, a sentence for each that is left out, and whether one of these may end at any time."""

    members: list[Member] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_moving: bool = False


@reading_many()
def collect(paths: Sequence[Path], are_named: bool) -> Collected:
    """The finished ones of some runs; unless they were named, those of them that can be compared with the newest.
    Raises UserError where fewer than two are left."""
    found = Collected()
    members, notes = found.members, found.notes
    for path in paths:
        folder = RunDir(path)
        try:
            summary = folder.summary()
            status = folder.status(summary)
            if status == "finished":
                members.append(read_member(folder, summary))
                continue
            found.is_moving |= summary.get("status") == "running"
            done = max((record["epoch"] for record in folder.metrics()), default=0)
            notes.append(f"Left out: {path} is {status}, after {done} epochs; the command that trained it finishes it.")
        except Failure as error:
            notes.append(f"Left out: {error}")
    if members and not are_named:
        members, left_out = like_the_newest(members)
        notes += [left_out] if left_out else []
    members, twins = drop_twins(members)
    notes += [f"Left out: {a.folder.path} has the settings and the seed of {b.folder.path}." for a, b in twins]
    if len(members) < 2:
        one = f"{members[0].folder.path} is the only finished run" if members else "There is no finished run"
        others = "".join(f"\n{note}" for note in notes)
        raise UserError(
            f"{one} here, and a comparison takes two. Train more (vae train -m sigma=learned,fixed seed=0,1,2), or "
            f"name other runs: vae compare FOLDER{others}"
        )
    return Collected(members, notes, found.is_moving)


def _paths(names: Sequence[str], runs_dir: Path) -> list[Path]:
    """The folders of runs: a run, a folder of runs, a part of a run's name, or without any name all runs."""
    found: dict[Path, Path] = {}
    for name in names or [str(runs_dir)]:
        path = Path(name)
        if path.is_dir() and not (path / "config.yaml").exists():
            inside = find_runs(path)
            if not inside:
                raise UserError(f"{name} holds no run. Train one first: vae train sigma=fixed")
        else:
            inside = [find_run(name, runs_dir)]
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _refuse_place(folder: Path) -> None:
    """Raise UserError where nothing can be written, before anything is measured."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {folder}: {there} is {'read-only' if there.is_dir() else 'a file'}; name a folder.")


# What is written.


def sheet(comparison: Comparison) -> Sheet:
    """The arms and their main figures."""
    arms = comparison.shown
    columns = {head: _column(arms, name) for name, head in COLUMNS.items() if any(arm.stat(name) for arm in arms)}
    seeds, hidden = len(comparison.seeds), len(comparison.arms) - len(arms)
    return Sheet(
        f"{len(comparison.members)} runs, {seeds} seed{'s' if seeds != 1 else ''}; mean ± standard deviation, nats per "
        "image",
        [arm.label for arm in arms],
        [str(len(arm.members)) for arm in arms],
        columns,
        f"and {hidden} arms of other weights, in the report" if hidden else "",
    )


def show_sheet(console: Console, sheet: Sheet) -> None:
    """Print a table, as many of its columns as there is room for."""
    heads = list(sheet.columns)
    room = console.width if console.is_terminal else 10_000
    widths = {head: max(len(head), *map(len, sheet.columns[head])) + 3 for head in heads}
    room -= max(map(len, sheet.arms)) + 12
    while len(heads) > 3 and sum(widths[head] for head in heads) > room:
        heads.pop()
    table = Table(
        box=Table().box if console.is_terminal else None, title=escape(sheet.title), title_justify="left",
    )  # fmt: skip
    table.add_column("arm")
    table.add_column("n", justify="right")
    for head in heads:
        table.add_column(head, justify="right")
    for row, (arm, count) in enumerate(zip(sheet.arms, sheet.counts, strict=True)):
        table.add_row(escape(arm), count, *(escape(sheet.columns[head][row]) for head in heads))
    if not console.is_terminal:
        console.width = 10_000  # a pipe has no edge at which to break a name
    console.print(table)
    if sheet.below:
        _say(console, sheet.below)


def _column(arms: Sequence[Arm], name: str) -> list[str]:
    stats = [arm.stat(name) for arm in arms]
    digits = digits_for([stat.mean for stat in stats if stat is not None])
    return ["" if s is None else amount(s, "", digits) + partly(s, arm) for s, arm in zip(stats, arms, strict=True)]


def write_all(
    comparison: Comparison,
    folder: Path,
    notes: Sequence[str],
    device: str,
    data_dir: str | Path | None,
    tensorboard: bool,
) -> bool:
    """Write the files of a comparison, and say whether there are pictures of the arms among them. Raises Failure."""
    from vae_cli.comparison.plots import Plots, save_all
    from vae_cli.comparison.report import as_plain, as_rows, render  # which import torch and matplotlib

    plots, pictures = Plots(comparison), take_pictures(comparison, device, data_dir)
    title = f"Comparison of {len(comparison.members)} runs on {comparison.equal.get('dataset', 'one dataset')}"
    table = io.StringIO(newline="")
    rows = as_rows(comparison)
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths = [folder / name for name in cache.FILES]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache.forget(folder)
        write_text(paths[0], table.getvalue())
        write_json(paths[1], as_plain(comparison))
        write_text(paths[2], render(plots, pictures, title, notes))
        save_all(plots, folder / "figures")
        if tensorboard:
            write_curves(comparison, folder / "tensorboard")
    except OSError as error:
        raise Failure(f"{folder} cannot be written to: {error.strerror}. Type --out FOLDER.") from error
    return not pictures.reason


def take_pictures(comparison: Comparison, device: str, data_dir: str | Path | None) -> Any:
    """The pictures of the arms, or the reason why there are none: a report of numbers is better than no report."""
    from vae_cli.comparison.gallery import PAIRS, Gallery
    from vae_cli.comparison.plots import looks
    from vae_cli.comparison.report import Pictures

    try:
        gallery = Gallery(comparison.shown, device, data_dir)
        return Pictures(
            gallery.samples("prior"),
            gallery.samples("mixture"),
            gallery.reconstructions(),
            [found for pair in range(PAIRS) if (found := gallery.interpolations(pair)) is not None],
            gallery.scatter(looks(comparison)),
            gallery.seeds,
        )
    except UserError as error:
        return Pictures(reason=f"There are no pictures: {error}")


def write_curves(comparison: Comparison, folder: Path) -> None:
    """Write the mean and standard deviation over seeds of every scalar of each arm as TensorBoard runs `ARM/mean` and
    `ARM/sd`, over the epochs that all of its seeds have."""
    from vae_cli.training.tensorboard import EventWriter

    for arm in comparison.arms:
        records = [{record["epoch"]: record for record in member.folder.metrics()} for member in arm.members]
        epochs = sorted(set(records[0]).intersection(*records[1:]))
        for kind in ("mean", "sd"):
            place = folder / clean(arm.label) / kind
            shutil.rmtree(place, ignore_errors=True)
            if kind == "sd" and len(records) == 1:
                continue
            place.mkdir(parents=True)
            with EventWriter(place) as events:
                for epoch in epochs:
                    rows = [record[epoch] for record in records]
                    names = [name for name in rows[0] if "/" in name and all(name in row for row in rows)]
                    stats = {name: statistic([row[name] for row in rows]) for name in names}
                    values = {n: s.mean if kind == "mean" else s.sd for n, s in stats.items()}
                    events.scalars({n: v for n, v in values.items() if v is not None}, rows[0]["step"])
