"""`vae compare`: compare finished runs in a table, in files for scripts, and in a report that tests five claims."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from vae_cli.comparison import cache
from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.cache import CachedReport
from vae_cli.comparison.collect import collect, run_folders
from vae_cli.comparison.members import Member, common_folder, refuse_incomparable
from vae_cli.comparison.missing import complete_evaluations, metrics_named, metrics_of_study, not_measured
from vae_cli.comparison.table import print_table
from vae_cli.core.errors import visible
from vae_cli.core.files import refuse_unwritable
from vae_cli.metrics.record import rank


@dataclass(frozen=True)
class Request:
    """The options that a report depends on; `are_named` is true if the user named every run, not just a folder."""

    profile: str | None
    metrics: list[str] | None
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
    metrics: list[str] | None,
    jobs: int | None,
    reference: str | None,
    tensorboard: bool,
    device: str,
    out: Path | None,
    runs_dir: Path,
    data_dir: str | Path | None,
) -> None:
    """Evaluate runs if necessary, print the table and write the report. If a cached report is still valid, only print
    its table. Raises UserError or Failure."""
    console = Console()
    if device != "auto":
        from vae_cli.machine.device import find_device

        find_device(device)  # a wrong device is reported once, before anything is evaluated
    if out is not None:
        refuse_unwritable(out, "Choose a different folder: --out FOLDER")
    if metrics is not None:
        metrics_named(metrics)  # an unknown metric is refused before anything is read
    paths = run_folders(runs, runs_dir)
    are_named = bool(runs) and all((Path(name) / "config.yaml").exists() for name in runs)
    request = Request(profile, metrics, reference, tensorboard, device, data_dir, out, are_named)
    stamped = cache.stamp(paths, asdict(request))  # before reading: a change while reading invalidates the cache
    report = cache.find(paths, stamped, out)
    if report is None:
        report = _make_report(paths, request, jobs, stamped, console)
    else:
        for note in report.notes:
            _say(console, note)
        print_table(console, report.table)
        _say(console, "Nothing has changed since this report was written:")
    for name in [*cache.FILES, *(["tensorboard"] if tensorboard else []), "figures"]:
        _say(console, str(report.folder / name))


def _make_report(
    paths: Sequence[Path], request: Request, jobs: int | None, stamped: str, console: Console
) -> CachedReport:
    """Compare runs, print the notes and the table, and write and cache the report."""
    found = collect(paths, request.are_named)
    members, notes = found.members, found.notes
    for note in notes:
        _say(console, note)
    refuse_incomparable(members)
    if request.reference is not None:
        Comparison(members, request.reference)  # an unknown arm is refused before anything is evaluated
    wanted, unknown = metrics_of_study(members) if request.metrics is None else (metrics_named(request.metrics), [])
    how = (wanted, request.profile, jobs, request.device, request.data_dir, console)
    members, has_new = complete_evaluations(members, *how)
    if has_new:  # read everything again, so that the stamp matches the files that were read
        stamped, found = cache.stamp(paths, asdict(request)), collect(paths, request.are_named)
        members, _ = complete_evaluations(found.members, *how)
        notes = found.notes
    refuse_incomparable(members)
    for said in (*unknown, _mixed_profiles(members), not_measured(members)):
        if said is not None:
            notes.append(said)
            _say(console, said)
    comparison = Comparison(members, request.reference)
    folder = request.out or common_folder([member.folder.path for member in members]) / "compare"
    from vae_cli.comparison.summary import summary_table  # reads figures.toml, which a cached report does not need

    report = CachedReport(folder, notes, summary_table(comparison))
    print_table(console, report.table)
    with console.status("writing the report") if console.is_terminal else nullcontext():
        from vae_cli.comparison import write  # imports torch and matplotlib

        has_pictures = write.write_all(comparison, folder, notes, request.device, request.data_dir, request.tensorboard)
    if has_pictures and not found.is_training:
        cache.store(report, stamped)
    return report


def _mixed_profiles(members: Sequence[Member]) -> str | None:
    """Return a note if the runs were evaluated with different profiles."""
    profiles = sorted({str(member.evaluation.get("profile")) for member in members})
    if len(profiles) < 2:
        return None
    return (
        f"The runs were evaluated with different profiles ({', '.join(profiles)}), and therefore on different "
        f"numbers of images. To evaluate all of them in the same way, add --profile {max(profiles, key=rank)}."
    )


def _say(console: Console, text: str) -> None:
    console.print(visible(text), soft_wrap=True, highlight=False, markup=False)
