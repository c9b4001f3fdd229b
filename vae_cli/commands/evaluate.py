"""`vae evaluate`: what the noise does in a trained run, or in the codes of any model, measured on held-out images."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vae_cli.commands.options import DataDir, Device, OptionalRun, RunsDir, Seed, Trust, Weights, expanded
from vae_cli.core.errors import UserError
from vae_cli.terminal.completion import complete_metrics

if TYPE_CHECKING:
    from vae_cli.metrics.record import Profile
    from vae_cli.runs.folder import RunDir

EXAMPLES = """
vae evaluate latest  compute all metrics that are defined for the run: takes minutes
vae evaluate latest --quick  use fewer images and draws: takes seconds
vae evaluate latest --full  use all test images, and 5000 draws for the importance-weighted bound
vae evaluate latest --metrics noise_probe,jacobian  compute only these metrics
vae evaluate latest --metrics bound --samples 1000  compute iw_bound_k1000
vae evaluate latest --metrics second_stage  train models of the codes, and measure the images that they generate
vae evaluate /shared/runs/a --quick --out a  evaluate a run in a folder that you cannot write to
vae evaluate --codes codes.npz  measure the codes of any other model, without its decoder
vae evaluate --codes codes.npz --decoder mine:decode --trust mine  measure them with their decoder
"""

Codes = Annotated[
    Path | None,
    typer.Option(
        "--codes",
        metavar="FILE",
        help="Instead of a run, measure codes of any model: an npz file with loc and, if known, scale, labels, images "
        "and split.",
        callback=expanded,
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        "--decoder",
        metavar="MODULE:FUNCTION",
        help="Function of your own (with --trust) that decodes the codes of --codes to images in [0, 1].",
        show_default="none: figures that need it are left out",
    ),
]

Quick = Annotated[bool, typer.Option("--quick", help="Use fewer images and draws.")]
Full = Annotated[bool, typer.Option("--full", help="Use all test images, also for the importance-weighted bound.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="Metrics to compute, such as noise_probe, or a class of your own (with --trust), such as mine.Loudness.",
        show_default="all that are defined for the run, except second_stage, which takes minutes",
        autocompletion=complete_metrics,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help="Draws for the importance-weighted bound.",
        min=1,
        max=1_000_000,
        show_default="5000, or 64 with --quick; as before if metrics are added to an evaluation",
    ),
]
All = Annotated[bool, typer.Option("--all", help="Print all figures, by claim, instead of only the headline figures.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an evaluation that is damaged or more thorough than this one.")
]

Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder to write to. vae compare reads only evaluations inside a run's folder.",
        show_default="inside the run's folder; with --codes, FILE-evaluation next to the file",
        callback=expanded,
    ),
]


def evaluate(
    run: OptionalRun = None,
    codes: Codes = None,
    decoder: Decoder = None,
    quick: Quick = False,
    full: Full = False,
    metrics: Metrics = None,
    samples: Samples = None,
    seed: Seed = 0,
    weights: Weights = "best",
    device: Device = "auto",
    overwrite: Overwrite = False,
    out: Out = None,
    print_all: All = False,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Measure what the encoder's noise does in a trained run, or in the codes of any other model.

    The measurements use images that the run was not trained on.
    """
    from vae_cli.metrics.evaluate import USUAL, find_metrics

    if quick and full:
        raise UserError("--quick and --full cannot be combined; use only one of them.")
    profile: Profile = "quick" if quick else "full" if full else "default"
    _refuse_both(run, codes, decoder, weights)
    kinds = USUAL if metrics is None else find_metrics([name.strip() for name in metrics.split(",")])
    shared: dict[str, Any] = {"kinds": kinds, "samples": samples, "seed": seed, "device": device, "data_dir": data_dir}
    prints_all = print_all or metrics is not None
    if codes is not None:
        _evaluate_codes(codes, profile, out, decoder, overwrite, prints_all, metrics is None, shared)
    elif run is not None:
        _evaluate_run(run, runs_dir, profile, out, weights, overwrite, prints_all, metrics is None, shared)


def _refuse_both(run: str | None, codes: Path | None, decoder: str | None, weights: str) -> None:
    """Raise UserError unless there is either a run or a file of codes, and no option that belongs to the other."""
    from vae_cli.commands.output import refuse_unused

    if run is None and codes is None:
        raise UserError(
            "There is nothing to evaluate. Name a run (vae evaluate latest), or a file of codes (vae evaluate --codes "
            "codes.npz)."
        )
    if run is not None and codes is not None:
        raise UserError(
            f"The run '{run}' and --codes {codes} cannot be evaluated together: type vae evaluate {run}, or vae "
            f"evaluate --codes {codes}"
        )
    if codes is None:
        refuse_unused("on a run, which has its own decoder", decoder=decoder)
    else:
        refuse_unused("on codes from a file", weights=weights if weights != "best" else None)


def _evaluate_run(
    name: str, runs_dir: Path, profile: Profile, out: Path | None, weights: Literal["best", "last"], overwrite: bool,
    prints_all: bool, is_complete: bool, shared: Mapping[str, Any],
) -> None:  # fmt: skip
    from vae_cli.metrics.evaluate import evaluate_run
    from vae_cli.metrics.record import metrics_file
    from vae_cli.runs.find import find_run
    from vae_cli.runs.folder import RunDir

    folder = RunDir(find_run(name, runs_dir))
    written = metrics_file(folder) if out is None else out / metrics_file(folder).name
    stored = None if overwrite else _stored_evaluation(folder, written, out is not None)
    if stored is not None:
        asked = {"profile": profile, "seed": shared["seed"], "weights": weights}
        _refuse_to_replace(folder.path, stored, is_complete, asked)
    with _progress() as say:
        found = evaluate_run(folder, profile, before=stored, weights=weights, out=out, say=say, **shared)
    _print(folder, found, written, prints_all, shared["device"], shared["data_dir"])


def _evaluate_codes(
    file: Path, profile: Profile, out: Path | None, decoder: str | None, overwrite: bool, prints_all: bool,
    is_complete: bool, shared: Mapping[str, Any],
) -> None:  # fmt: skip
    from vae_cli.core.files import digest
    from vae_cli.metrics.evaluate_codes import evaluate_codes
    from vae_cli.metrics.record import stored_evaluation_of_codes

    written = (out or file.with_name(f"{file.stem}-evaluation")) / "metrics.json"
    again = f"To replace it type vae evaluate --codes {shlex.quote(str(file))} --overwrite"
    again += "" if out is None else f" --out {shlex.quote(str(out))}"
    stored = None if overwrite else stored_evaluation_of_codes(written, again)
    if stored is not None and file.is_file() and stored["codes_digest"] != digest(file):
        if out is not None:
            raise UserError(
                f"{written} is the evaluation of other codes. Choose a different --out, or add --overwrite to replace "
                "it."
            )
        stored = None
    if stored is not None:
        asked = {"profile": profile, "seed": shared["seed"], "decoder": decoder}
        _refuse_to_replace(file, stored, is_complete, asked)
    with _progress() as say:
        found = evaluate_codes(file, written, profile, decoder=decoder, before=stored, say=say, **shared)
    _print_codes(file, found, written, prints_all)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show that an evaluation takes time, and yield a function that prints the name of the metric in progress."""
    from rich.console import Console

    console = Console(stderr=True)

    def say(name: str) -> None:
        if console.is_terminal:
            console.print(f"measuring {name}", style="dim")

    with console.status("this takes seconds with --quick, otherwise minutes"):
        yield say


def _stored_evaluation(folder: RunDir, file: Path, is_elsewhere: bool) -> dict[str, Any] | None:
    """Return the evaluation in a file, or None if there is none.

    Raises Failure if it is damaged, and UserError if the file is outside the run's folder and belongs to another run.
    """
    from vae_cli.metrics.record import stored_evaluation

    if not is_elsewhere:
        return stored_evaluation(folder)
    stored = stored_evaluation(folder, file)
    if stored is None and file.exists():
        raise UserError(
            f"{file} is the evaluation of another run, or of other weights. Choose a different --out, or add "
            "--overwrite to replace it."
        )
    return stored


def _refuse_to_replace(of: Path, stored: Mapping[str, Any], is_complete: bool, asked: Mapping[str, Any]) -> None:
    """Raise UserError if this would replace a more thorough evaluation, or, with --metrics, one with other settings."""
    from vae_cli.metrics.record import rank

    if rank(stored["profile"]) > rank(asked["profile"]):
        raise UserError(
            f"There is a more thorough evaluation ({stored['profile']}) of {of}, which this one would "
            "replace. To replace it, add --overwrite."
        )
    differing = [key for key, value in asked.items() if stored.get(key) != value]
    if not is_complete and differing:
        there = ", ".join(f"{key} {stored.get(key)}" for key in asked)
        change = [f"add {word}" for key in differing if (word := _option(key, stored.get(key)))]
        change += [f"leave out {_option(key, asked[key])}" for key in differing if not _option(key, stored.get(key))]
        raise UserError(
            f"There is an evaluation of {of} with {there}, which would be replaced by one with only the "
            f"metrics you chose. To add them to it, {' and '.join(change)}; to replace it, add --overwrite."
        )


def _option(key: str, value: Any) -> str:
    """Return the option that selects this value of a setting of an evaluation; empty for the default."""
    if value in ("default", "best", 0, None):
        return ""
    return f"--{value}" if key == "profile" else f"--{key} {value}"


def _print(
    folder: RunDir, found: dict[str, Any], written: Path, prints_all: bool, device: str, data_dir: str | None
) -> None:
    """Print the headline figures or all of them, plot them, and print the paths of the files written."""
    from dataclasses import replace

    from vae_cli.comparison.arms import Comparison
    from vae_cli.comparison.members import read_member
    from vae_cli.comparison.plots import draw_all, save_all
    from vae_cli.comparison.run_plots import draw_run

    figures = draw_run(folder, device, data_dir)
    figures |= draw_all(Comparison([replace(read_member(folder), evaluation=found)]))
    _print_figures(found, [written, *save_all(figures, written.parent)], prints_all)


def _print_codes(file: Path, found: dict[str, Any], written: Path, prints_all: bool) -> None:
    """Print the figures of codes from a file, plot them, and print the notes and the paths of the files written."""
    from vae_cli.comparison.arms import Comparison
    from vae_cli.comparison.members import Member
    from vae_cli.comparison.plots import draw_all, save_all
    from vae_cli.runs.folder import RunDir

    # Plots label the only arm of a comparison with its sigma.
    member = Member(RunDir(file.parent), {"sigma": file.name}, 0, {}, found)
    pictures = save_all(draw_all(Comparison([member])), written.parent)
    _print_figures(found, [written, *pictures], prints_all)


def _print_figures(found: Mapping[str, Any], paths: Sequence[Path], prints_all: bool) -> None:
    from rich.console import Console

    from vae_cli.metrics.table import print_evaluation, print_headlines

    console = Console()
    if not console.is_terminal:
        console.width = 120
    (print_evaluation if prints_all else print_headlines)(console, found)
    for note in found.get("notes", []):
        console.print(note, highlight=False, markup=False)
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
    console.print(f"{found['seconds']:.1f} s (profile {found['profile']}, seed {found['seed']})", highlight=False)
