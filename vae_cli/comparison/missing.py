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
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.garbage import reading_many
from vae_cli.machine.cores import cores
from vae_cli.machine.signals import end_with_parent
from vae_cli.metrics.record import FORMAT, PROFILES, Profile, missing, rank, stored_evaluation
from vae_cli.runs.folder import RunDir

JOBS = 8  # at most this many processes by default: each needs about a gigabyte of memory


def complete_evaluations(
    members: Sequence[Member],
    profile: str | None,
    jobs: int | None,
    device: str,
    data_dir: str | Path | None,
    console: Console,
) -> tuple[list[Member], bool]:
    """Return the members with their evaluations, and whether any run had to be evaluated.

    A run is evaluated unless it has a complete evaluation of its current weights that is at least as thorough as
    `profile`. If `profile` is None, the profile with which more than half of the runs were evaluated is used or,
    without such a majority, quick.
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
        if rank(found.get("profile", "")) < rank(profile) or missing(found)
    ]
    made = _evaluate(todo, profile, jobs, device, data_dir, console)
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
    work = ((path, profile, device, data_dir) for path in paths)
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


Work = tuple[Path, str, str, "str | Path | None"]
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

    path, profile, device, data_dir = work
    folder = RunDir(path)
    try:
        found = stored_evaluation(folder)
        if found is not None and rank(found["profile"]) >= rank(profile):  # only some metrics are missing
            about = {key: found[key] for key in ("profile", "weights", "seed")}
            if found["format"] == FORMAT:
                about["samples"] = found["budget"]["samples"]
            kinds = [kind for kind in METRICS if kind.__name__ in missing(found)]
            return evaluate_run(folder, kinds=kinds, before=found, device=device, data_dir=data_dir, **about)
        return evaluate_run(folder, profile=cast("Profile", profile), device=device, data_dir=data_dir)
    except UserError as error:
        return str(error)
