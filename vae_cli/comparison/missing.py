"""Complete the evaluations of a comparison: read stored evaluations, and run missing ones in several processes."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vae_cli.comparison.members import LISTED, Member
from vae_cli.core.errors import Failure, UserError, first_line, nearest
from vae_cli.core.garbage import reading_many
from vae_cli.machine.cores import cores
from vae_cli.machine.signals import end_with_parent
from vae_cli.metrics.record import (
    FORMAT,
    PROFILES,
    Profile,
    metric_words,
    missing,
    present,
    rank,
    stored_evaluation,
    usual_metrics,
)
from vae_cli.runs.folder import RunDir

JOBS = 8  # at most this many processes by default: each needs about a gigabyte of memory


Names = frozenset[str] | None  # class names of metrics; None: those that belong to every evaluation


def metrics_named(words: Sequence[str]) -> Names:
    """Return the class names of metrics from their command-line names, or of `all`. Raises UserError."""
    known = metric_words()
    if list(words) == ["all"]:
        return frozenset(known.values())
    for word in words:
        if word not in known:
            raise UserError(
                f"--metrics {word}: there is no metric with this name.{nearest(word, [*known, 'all'])} Metrics: all, "
                f"or some of {', '.join(known)}."
            )
    return frozenset(known[word] for word in words)


def metrics_of_study(members: Sequence[Member]) -> tuple[Names, list[str]]:
    """Return the class names of the metrics that the setting `metrics` of the runs names, and notes on unknown names.

    None, for the usual metrics, unless the setting names some metrics in every run. A name that is unknown, for example
    because the runs were trained by another version, is skipped.
    """
    if not members or any(member.metrics is None for member in members):
        return None, []
    known = metric_words()
    words = list(dict.fromkeys(word for member in members for word in member.metrics or []))
    notes = [
        f"Not measured: there is no metric {word}, which the setting metrics of the runs names.{nearest(word, known)}"
        for word in words
        if word not in known
    ]
    return frozenset(known[word] for word in words if word in known), notes


def not_measured(members: Sequence[Member]) -> str | None:
    """Return a note on which metrics were measured; None if each of the usual ones was measured in some run."""
    inside = set().union(*(present(member.evaluation) for member in members))
    if not inside or usual_metrics() <= inside:
        return None
    measured = [word for word, name in metric_words().items() if name in inside]
    return f"Measured: only {', '.join(measured)}. To measure the other metrics, too, add --metrics all."


def complete_evaluations(
    members: Sequence[Member],
    wanted: Names,
    profile: str | None,
    jobs: int | None,
    device: str,
    data_dir: str | Path | None,
    console: Console,
) -> tuple[list[Member], bool]:
    """Return the members with their evaluations, and whether any run had to be evaluated.

    A run is evaluated unless it has an evaluation of its current weights that is at least as thorough as `profile` and
    contains the metrics in `wanted`. If `profile` is None, the profile with which more than half of the runs
    were evaluated is used or, without such a majority, quick.
    Raises UserError or Failure, naming the runs that cannot be evaluated or were evaluated differently.
    """
    with reading_many():
        recorded = [stored_evaluation(member.folder) or {} for member in members]
    _refuse_mixed(members, recorded)
    if profile is None:
        profiles = Counter(str(found.get("profile")) for found in recorded if found)
        usual, count = profiles.most_common(1)[0] if profiles else ("quick", 0)
        profile = usual if usual in PROFILES and 2 * count > len(members) else "quick"
    todo = [
        member
        for member, found in zip(members, recorded, strict=True)
        if rank(found.get("profile", "")) < rank(profile) or missing(found, wanted)
    ]
    made = _evaluate(todo, wanted, profile, jobs, device, data_dir, console)
    evaluations = [made.get(member.folder.path, found) for member, found in zip(members, recorded, strict=True)]
    return [replace(member, evaluation=found) for member, found in zip(members, evaluations, strict=True)], bool(made)


def _refuse_mixed(members: Sequence[Member], recorded: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if some runs were evaluated with a different seed, or other weights (best or last), than most."""
    how = [(found["seed"], found["weights"]) if found else None for found in recorded]
    usual = Counter(one for one in how if one is not None).most_common(1)
    others = [m.folder.path for m, one in zip(members, how, strict=True) if one is not None and one != usual[0][0]]
    if others:
        seed, weights = usual[0][0]
        commands = "".join(
            f"\n  vae evaluate {path} --quick --seed {seed} --weights {weights}" for path in others[:LISTED]
        )
        raise UserError(
            f"Most runs were evaluated with seed {seed} and the {weights} weights, but {len(others)} "
            f"{'were' if len(others) > 1 else 'was'} not. To make them comparable, type:{commands}"
        )


def _evaluate(
    todo: Sequence[Member],
    wanted: Names,
    profile: str,
    jobs: int | None,
    device: str,
    data_dir: str | Path | None,
    console: Console,
) -> dict[Path, dict[str, Any]]:
    if not todo:
        return {}
    paths = [member.folder.path for member in todo]
    jobs = min(len(paths), jobs or min(JOBS, cores()))
    work = ((path, wanted, profile, device, data_dir) for path in paths)
    made: dict[Path, dict[str, Any]] = {}
    failed: dict[Path, str] = {}
    bar = Progress(
        TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=len(paths))
        for path, found in _in_this_process(work) if jobs == 1 else _in_processes(work, jobs):
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
        named = "\n".join(f"  {path}: {reason}" for path, reason in list(failed.items())[:LISTED])
        more = f"\n  ... and {len(failed) - LISTED} more" if len(failed) > LISTED else ""
        raise Failure(f"{len(failed)} of {len(paths)} runs could not be evaluated:\n{named}{more}")
    return made


Work = tuple[Path, Names, str, str, "str | Path | None"]
Result = tuple[Path, "dict[str, Any] | str"]


def _in_this_process(work: Iterable[Work]) -> Iterable[Result]:
    for one in work:
        yield one[0], _evaluate_one(one)


def _in_processes(work: Iterable[Work], jobs: int) -> Iterable[Result]:
    """Evaluate in several processes with one thread each: the operations are too small to gain from more threads, and
    more threads slow them down if there are few cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # a process reads it when it starts
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start)
    try:
        pending = {pool.submit(_evaluate_one, one): one[0] for one in work}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                path = pending.pop(future)
                yield path, future.result() if error is None else f"{type(error).__name__}: {first_line(error)}"
    except (KeyboardInterrupt, GeneratorExit):
        for child in active_children():
            child.terminate()
        print("stopped; finished evaluations are kept, and the same command continues with the rest", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _start() -> None:
    end_with_parent()
    import torch

    torch.set_num_threads(1)


def _evaluate_one(work: Work) -> dict[str, Any] | str:
    """Return the evaluation of a run, or the message of the UserError that prevented it."""
    from vae_cli.metrics.evaluate import METRICS, evaluate_run

    path, wanted, profile, device, data_dir = work
    folder = RunDir(path)
    try:
        found = stored_evaluation(folder)
        if found is not None and rank(found["profile"]) >= rank(profile):  # only some metrics are missing
            about = {key: found[key] for key in ("profile", "weights", "seed")}
            if found["format"] == FORMAT:
                about["samples"] = found["budget"]["samples"]
            kinds = [kind for kind in METRICS if kind.__name__ in missing(found, wanted)]
            return evaluate_run(folder, kinds=kinds, before=found, device=device, data_dir=data_dir, **about)
        # A more thorough evaluation replaces the stored one, so it also measures what that one contains.
        whole = (usual_metrics() if wanted is None else wanted) | present(found or {})
        kinds = [kind for kind in METRICS if kind.__name__ in whole]
        return evaluate_run(folder, profile=cast("Profile", profile), kinds=kinds, device=device, data_dir=data_dir)
    except UserError as error:
        return str(error)
