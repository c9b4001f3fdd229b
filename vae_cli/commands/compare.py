"""`vae compare`: finished runs side by side, as a table, files and a report that answers the five questions."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vae_cli.assessment import METRICS, PROFILES, Profile, assess, assessment
from vae_cli.comparison import (
    Arm,
    Comparison,
    Member,
    common_folder,
    drop_twins,
    like_the_newest,
    partly,
    read_member,
    refuse_incomparable,
    statistic,
)
from vae_cli.device import find_device
from vae_cli.errors import Failure, UserError, first_line
from vae_cli.events import EventWriter
from vae_cli.files import write_json, write_text
from vae_cli.findings import amount, digits_for
from vae_cli.folder import RunDir, find_run, find_runs
from vae_cli.naming import clean

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
JOBS = 8  # processes at a time, at most, where nobody says how many: each takes about a gigabyte
INSIDE = 4  # runs that a message names


def main(
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
    find_device(device)  # what is wrong for all runs is said once, and before anything is measured
    members, notes = collect(runs, runs_dir)
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    refuse_incomparable(members)
    if reference is not None:
        Comparison(members, reference)  # a name that is none is refused before anything is evaluated
    if out is not None:
        _refuse_place(out)
    members = evaluate(members, profile, jobs, device, data_dir, console)
    refuse_incomparable(members)
    profiles = sorted({str(member.evaluation.get("profile")) for member in members})
    if len(profiles) > 1:
        notes.append(
            f"The runs were evaluated with different profiles ({', '.join(profiles)}), on more or fewer images; "
            f"type --profile {max(profiles, key=_rank)} to evaluate all alike."
        )
        console.print(notes[-1], soft_wrap=True, highlight=False, markup=False)
    comparison = Comparison(members, reference)
    folder = out or common_folder([member.folder.path for member in members]) / "compare"
    show_table(console, comparison)
    with console.status("writing the report") if console.is_terminal else _quiet():
        paths = write_all(comparison, folder, notes, device, data_dir, tensorboard)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)


class _quiet:  # noqa: N801 (stands where a status would)
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def collect(names: Sequence[str], runs_dir: Path) -> tuple[list[Member], list[str]]:
    """The finished runs among those that are named, and a sentence for each that is left out. Of the runs in a folder
    those are meant that can be compared with its newest. Raises UserError where fewer than two are left."""
    members, notes = [], []
    for path in _paths(names, runs_dir):
        folder = RunDir(path)
        try:
            summary = folder.summary()
            status = folder.status(summary)
            if status == "finished":
                members.append(read_member(folder, summary))
                continue
            done = max((record["epoch"] for record in folder.metrics()), default=0)
            notes.append(f"Left out: {path} is {status}, after {done} epochs; the command that trained it finishes it.")
        except Failure as error:
            notes.append(f"Left out: {error}")
    if members and not (names and all((Path(name) / "config.yaml").exists() for name in names)):
        members, left_out = like_the_newest(members)
        notes += [left_out] if left_out else []
    members, twins = drop_twins(members)
    notes += [f"Left out: {a.folder.path} has the settings and the seed of {b.folder.path}." for a, b in twins]
    if len(members) < 2:
        found = f"{members[0].folder.path} is the only finished run" if members else "There is no finished run"
        others = "".join(f"\n{note}" for note in notes)
        raise UserError(
            f"{found} here, and a comparison takes two. Train more (vae train -m sigma=learned,fixed seed=0,1,2), or "
            f"name other runs: vae compare FOLDER{others}"
        )
    return members, notes


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


# Evaluations.


def evaluate(
    members: Sequence[Member],
    profile: str | None,
    jobs: int | None,
    device: str,
    data_dir: str | Path | None,
    console: Console,
) -> list[Member]:
    """The members with their evaluations, made where there is none of these weights that is as thorough as the
    profile; without one, as the one that most runs have. Raises Failure naming the runs that cannot be."""
    recorded = [_recorded(member) for member in members]
    _refuse_odd(members, recorded)
    if profile is None:
        profiles = Counter(str(found.get("profile")) for found in recorded if found)
        usual, count = profiles.most_common(1)[0] if profiles else ("quick", 0)
        profile = usual if usual in PROFILES and 2 * count > len(members) else "quick"
    todo = [
        member
        for member, found in zip(members, recorded, strict=True)
        if _rank(found.get("profile", "")) < _rank(profile) or _missing(found)
    ]
    made = _evaluate(todo, profile, jobs, device, data_dir, console)
    evaluations = [made.get(member.folder.path, found) for member, found in zip(members, recorded, strict=True)]
    return [replace(member, evaluation=found) for member, found in zip(members, evaluations, strict=True)]


def _refuse_odd(members: Sequence[Member], recorded: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError where some runs were evaluated with another seed, or with other weights, than most."""
    how = [(found["seed"], found["weights"]) if found else None for found in recorded]
    usual = Counter(one for one in how if one is not None).most_common(1)
    odd = [m.folder.path for m, one in zip(members, how, strict=True) if one is not None and one != usual[0][0]]
    if odd:
        seed, weights = usual[0][0]
        commands = "".join(
            f"\n  vae evaluate {path} --quick --seed {seed} --weights {weights}" for path in odd[:INSIDE]
        )
        raise UserError(
            f"{len(odd)} of these runs were evaluated with another seed or other weights than most (seed {seed}, "
            f"{weights}). Evaluate them alike:{commands}"
        )


def _refuse_place(folder: Path) -> None:
    """Raise UserError where nothing can be written, before anything is measured."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {folder}: {there} is {'read-only' if there.is_dir() else 'a file'}; name a folder.")


def _rank(profile: str) -> int:
    return PROFILES.index(profile) if profile in PROFILES else -1


def _recorded(member: Member) -> dict[str, Any]:
    """The evaluation of a run's weights as they are now, or nothing. Raises Failure where it is damaged."""
    return assessment(member.folder) or {}


def _missing(found: Mapping[str, Any]) -> list[Any]:
    """The metrics that an evaluation does not hold yet."""
    entries = [*found.get("figures", {}).values(), *found.get("left_out", {}).values()]
    present = {entry.get("metric") for entry in entries}
    return [kind for kind in METRICS if kind.__name__ not in present]


def _evaluate(
    todo: Sequence[Member],
    profile: str,
    jobs: int | None,
    device: str,
    data_dir: str | Path | None,
    console: Console,
) -> dict[Path, dict[str, Any]]:
    if not todo:
        return {}
    paths = [member.folder.path for member in todo]
    jobs = min(len(paths), jobs or min(JOBS, _cores()))
    work = ((path, profile, device, data_dir) for path in paths)
    made: dict[Path, dict[str, Any]] = {}
    failed: dict[Path, str] = {}
    bar = Progress(
        TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=len(paths))
        for path, found in _here(work) if jobs == 1 else _in_processes(work, jobs):
            if isinstance(found, dict):
                made[path] = found
            else:
                failed[path] = found
            bar.advance(task)
            if not console.is_terminal:
                done = len(made) + len(failed)
                console.print(
                    f"evaluated {done} of {len(paths)}: {path}", soft_wrap=True, highlight=False, markup=False
                )
    if failed:
        named = "\n".join(f"  {path}: {reason}" for path, reason in list(failed.items())[:INSIDE])
        more = f"\n  ... and {len(failed) - INSIDE} more" if len(failed) > INSIDE else ""
        raise Failure(f"{len(failed)} of {len(paths)} runs could not be evaluated:\n{named}{more}")
    return made


Work = tuple[Path, str, str, "str | Path | None"]
Result = tuple[Path, "dict[str, Any] | str"]


def _here(work: Iterable[Work]) -> Iterable[Result]:
    for one in work:
        yield one[0], _assess(one)


def _in_processes(work: Iterable[Work], jobs: int) -> Iterable[Result]:
    """One thread in each process: many small operations gain nothing from more, and lose where cores are few."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread)
    try:
        pending = {pool.submit(_assess, one): one[0] for one in work}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                path = pending.pop(future)
                yield path, future.result() if error is None else f"{type(error).__name__}: {first_line(error)}"
    except (KeyboardInterrupt, GeneratorExit):
        for child in active_children():
            child.terminate()
        print("stopped; what has been evaluated is kept, and the same command goes on", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _assess(work: Work) -> dict[str, Any] | str:
    """The evaluation of a run, or what was wrong."""
    path, profile, device, data_dir = work
    folder = RunDir(path)
    try:
        found = assessment(folder)
        if found is not None and _rank(found["profile"]) >= _rank(profile):  # only a part of it is missing
            about = {key: found[key] for key in ("profile", "weights", "seed")} | {
                "samples": found["budget"]["samples"]
            }
            return assess(folder, kinds=_missing(found), before=found, device=device, data_dir=data_dir, **about)
        return assess(folder, profile=cast("Profile", profile), device=device, data_dir=data_dir)
    except UserError as error:
        return str(error)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What is written.


def show_table(console: Console, comparison: Comparison) -> None:
    """Print arms and their main figures, as many of them as there is room for."""
    names = [name for name in COLUMNS if any(arm.stat(name) for arm in comparison.shown)]
    cells = {name: _column(comparison.shown, name) for name in names}
    room = console.width if console.is_terminal else 10_000
    widths = {name: max(len(COLUMNS[name]), *(len(cell) for cell in cells[name])) + 3 for name in names}
    room -= max(len(arm.label) for arm in comparison.shown) + 12
    while len(names) > 3 and sum(widths[name] for name in names) > room:
        names.pop()
    seeds = len(comparison.seeds)
    about = f"{len(comparison.members)} runs, {seeds} seed{'s' if seeds != 1 else ''}"
    table = Table(
        box=Table().box if console.is_terminal else None, title=f"{about}; mean ± standard deviation, nats per image",
        title_justify="left",
    )  # fmt: skip
    table.add_column("arm")
    table.add_column("n", justify="right")
    for name in names:
        table.add_column(COLUMNS[name], justify="right")
    for row, arm in enumerate(comparison.shown):
        table.add_row(escape(arm.label), str(len(arm.members)), *(cells[name][row] for name in names))
    if not console.is_terminal:
        console.width = 10_000  # a pipe has no edge at which to break a name
    console.print(table)
    hidden = len(comparison.arms) - len(comparison.shown)
    if hidden:
        console.print(f"and {hidden} arms of other weights, in the report", highlight=False)


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
) -> list[Path]:
    """Write the files of a comparison and give their paths. Raises Failure where they cannot be."""
    from vae_cli.html_report import as_plain, as_rows, render
    from vae_cli.plots import Plots, save_all

    plots, pictures = Plots(comparison), take_pictures(comparison, device, data_dir)
    title = f"Comparison of {len(comparison.members)} runs on {comparison.equal.get('dataset', 'one dataset')}"
    table = io.StringIO(newline="")
    rows = as_rows(comparison)
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    paths = [folder / name for name in ("compare.csv", "compare.json", "report.html")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(paths[0], table.getvalue())
        write_json(paths[1], as_plain(comparison))
        write_text(paths[2], render(plots, pictures, title, notes))
        save_all(plots, folder / "figures")
        if tensorboard:
            paths.append(write_curves(comparison, folder / "tensorboard"))
    except OSError as error:
        raise Failure(f"{folder} cannot be written to: {error.strerror}. Type --out FOLDER.") from error
    return [*paths, folder / "figures"]


def take_pictures(comparison: Comparison, device: str, data_dir: str | Path | None) -> Any:
    """The pictures of the arms, or the reason why there are none: a report of numbers is better than no report."""
    from vae_cli.gallery import PAIRS, Gallery
    from vae_cli.html_report import Pictures
    from vae_cli.plots import looks

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


def write_curves(comparison: Comparison, folder: Path) -> Path:
    """Write the mean and standard deviation over seeds of every scalar of each arm as TensorBoard runs `ARM/mean` and
    `ARM/sd`, over the epochs that all of its seeds have."""
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
    return folder
