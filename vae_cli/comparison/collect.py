"""Find the runs that are named on the command line, and read the finished ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vae_cli.comparison.members import Member, drop_twins, like_the_newest, read_member
from vae_cli.core.errors import UserError, explain
from vae_cli.core.files import expand_home
from vae_cli.core.garbage import reading_many
from vae_cli.runs.find import find_run, find_runs, say_unreadable
from vae_cli.runs.folder import RunDir


@dataclass
class Collected:
    """The finished runs, notes on the runs that are left out, and whether any of the latter are still training."""

    members: list[Member] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_training: bool = False


def run_folders(names: Sequence[str], runs_dir: Path) -> list[Path]:
    """Return the folders of the named runs; without names, of all runs in `runs_dir`. Raises UserError.

    Each name is the path of a run, the path of a folder of runs, or part of a run's name.
    """
    found: dict[Path, Path] = {}
    for name in names or [str(runs_dir)]:
        path = expand_home(name, "RUN") if name.startswith("~") else Path(name)
        if path.is_dir() and not (path / "config.yaml").exists():
            inside = find_runs(path, say_unreadable)
            if not inside:
                raise UserError(f"There are no runs in {name}. Train one first: vae train sigma=fixed")
        else:
            inside = [find_run(name, runs_dir)]
        for run in inside:
            found.setdefault(run.resolve(), run)
    return list(found.values())


@reading_many()
def collect(paths: Sequence[Path], are_named: bool) -> Collected:
    """Read the finished runs in these folders. Unless every run was named, leave out the runs that cannot be compared
    with the newest.

    Raises UserError if fewer than two runs are left.
    """
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
            found.is_training |= summary.get("status") == "running"
            done = max((record["epoch"] for record in folder.metrics()), default=0)
            epochs = f"{done} epoch{'s' if done != 1 else ''}"
            notes.append(
                f"Left out: {path} is {status} after {epochs}. To finish it, repeat the command that trained it."
            )
        except UserError as error:  # one damaged run must not prevent the comparison of the others
            notes.append(f"Left out: {error}")
        except OSError as error:
            notes.append(f"Left out: {path}: {explain(error)[0]}")
    if members and not are_named:
        members, left_out = like_the_newest(members)
        notes += [left_out] if left_out else []
    members, twins = drop_twins(members)
    notes += [f"Left out: {a.folder.path} has the same settings and seed as {b.folder.path}." for a, b in twins]
    notes += _different_lengths(members)
    if len(members) < 2:
        few = f"Only {members[0].folder.path} can be compared" if members else "There is no finished run"
        others = "".join(f"\n{note}" for note in notes)
        raise UserError(
            f"{few} here, and a comparison needs at least two runs. Train more (vae train -m sigma=learned,fixed "
            f"seed=0,1,2), or compare the runs in another folder: vae compare FOLDER{others}"
        )
    return Collected(members, notes, found.is_training)


def _different_lengths(members: Sequence[Member]) -> list[str]:
    """Return a note if runs with the same settings were trained for different numbers of epochs."""
    lengths: dict[object, set[int]] = {}
    for member in members:
        settings = tuple(sorted(((k, v) for k, v in member.settings.items() if k != "epochs"), key=str))
        lengths.setdefault(settings, set()).add(member.settings["epochs"])
    differing = sorted({epochs for several in lengths.values() if len(several) > 1 for epochs in several})
    if not differing:
        return []
    return [
        f"Some arms differ only in epochs ({', '.join(map(str, differing))}). To compare runs of equal length, train "
        f"the shorter ones further: repeat their vae train commands with epochs={differing[-1]}."
    ]
