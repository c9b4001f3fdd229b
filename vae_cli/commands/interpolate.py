"""`vae interpolate`: interpolations between images, and traversals, in the latent space of a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vae_cli.commands.options import DataDir, Device, Out, Run, RunsDir, Seed, Trust, Weights
from vae_cli.core.errors import UserError

if TYPE_CHECKING:
    from vae_cli.runs.pictures import Ends, Rendered
    from vae_cli.runs.run import Run as TrainedRun

EXAMPLES = """
vae interpolate latest  use eight random pairs of test images
vae interpolate latest --pair 0,1 --pair 4,7 --path slerp  use these two pairs, and follow great circles
vae interpolate latest --path geodesic --count 4  find the shortest paths in image space, and print their lengths
vae interpolate latest --classes 3,8 --steps 15 --gif  go from one class to another, and write an animation
vae interpolate latest --file one.png --file two.png  use your own images
vae interpolate latest --grid 0,1,2,3  fill a square whose corners are four test images
vae interpolate latest --traverse --span 2  vary one latent dimension at a time
"""

COUNT, STEPS, SPAN = 8, 11, 3.0

Pairs = Annotated[
    list[str] | None, typer.Option("--pair", metavar="I,J", help="Two test images, by index. Repeatable.")
]
Classes = Annotated[
    str | None, typer.Option(metavar="A,B", help="Random pairs of test images, from class A to class B.")
]
Files = Annotated[
    list[Path] | None, typer.Option("--file", metavar="FILE", help="An image file; type --file twice for each pair.")
]
Count = Annotated[
    int | None,
    typer.Option(metavar="N", help="Number of random pairs.", min=1, max=1000, show_default=str(COUNT)),
]
PathKind = Annotated[
    Literal["linear", "slerp", "norm-corrected", "geodesic"] | None,
    typer.Option(
        help="A straight line (linear), a great circle (slerp), a straight line whose points are rescaled to the "
        "interpolated norm (norm-corrected), or the path along which the decoded images change least (geodesic).",
        show_default="linear",
    ),
]
Steps = Annotated[int, typer.Option(metavar="N", help="Codes on the path, including both ends.", min=2, max=1000)]
Corners = Annotated[
    str | None, typer.Option("--grid", metavar="I,J,K,L", help="Four test images as the corners of a square.")
]
Gif = Annotated[bool, typer.Option("--gif", help="Also write an animation.")]
Traverse = Annotated[
    bool, typer.Option("--traverse", help="Vary the code of a random test image, one latent dimension at a time.")
]
Span = Annotated[
    float | None,
    typer.Option(
        metavar="STD", help="With --traverse: standard deviations on either side of the mean of all codes.", min=0.0,
        max=1000.0, show_default=f"{SPAN:g}",
    ),
]  # fmt: skip


def interpolate(
    run: Run,
    pairs: Pairs = None,
    classes: Classes = None,
    files: Files = None,
    count: Count = None,
    path: PathKind = None,
    steps: Steps = STEPS,
    corners: Corners = None,
    gif: Gif = False,
    traverse: Traverse = False,
    span: Span = None,
    seed: Seed = 0,
    weights: Weights = "best",
    device: Device = "auto",
    out: Out = None,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Interpolate between images, or traverse the latent space."""
    from vae_cli.commands.output import named, parse_indices, place, write
    from vae_cli.runs import pictures
    from vae_cli.runs.find import find_run
    from vae_cli.runs.run import Run as TrainedRun

    chosen = _choose(pairs or [], classes, files or [], corners, traverse)
    _refuse_unused(next(iter(chosen), None), count, path, span)
    trained = TrainedRun(find_run(run, runs_dir), weights, device, data_dir)
    if not files:
        _refuse_few_images(trained, traverse)
    name = named("traversals", span=span) if traverse else named(path or "linear", **chosen, count=count)
    name = named(
        name, steps=steps if steps != STEPS else None, seed=seed or None,
        weights=weights if weights != "best" else None,
    )  # fmt: skip
    stem, path = place(trained.path, "interpolations", name, out), path or "linear"
    if traverse:
        rendered = pictures.traversals(trained, SPAN if span is None else span, steps, seed, gif)
    elif corners is not None:
        assert path != "geodesic"  # _refuse_unused refuses it
        indices = parse_indices(corners, len(trained.splits.test), "--grid", exactly=4)
        rendered = pictures.square(trained, indices, path, steps, seed, gif)
    else:
        ends = _ends(trained, pairs or [], classes, files or [], count or COUNT, seed)
        rendered = _strips(trained, ends, path, steps, seed, gif)
        if count is not None and len(ends.names) < count:
            rendered.captions.append(f"There are only {len(ends.names)} such pairs of test images.")
    write(stem, rendered)


def _strips(
    run: TrainedRun, ends: Ends, path: Literal["linear", "slerp", "norm-corrected", "geodesic"], steps: int, seed: int,
    gif: bool,
) -> Rendered:  # fmt: skip
    from rich.console import Console

    from vae_cli.runs import pictures

    if path != "geodesic":
        return pictures.strips(run, ends, path, steps, seed, gif)
    with Console(stderr=True).status(f"finding {len(ends.names)} geodesics"):
        return pictures.geodesic_strips(run, ends, steps, seed, gif)


def _refuse_few_images(run: TrainedRun, traverse: bool) -> None:
    if len(run.splits.test) < 2:
        instead = "train with a larger dataset.test" if traverse else "type --file one.png --file two.png"
        raise UserError(f"{run.path} has fewer than two test images: {instead}.")


def _choose(
    pairs: list[str], classes: str | None, files: list[Path], corners: str | None, traverse: bool
) -> dict[str, str | bool]:
    """Return the option, if any, that selects what to interpolate, and its value. Raises UserError if several do."""
    options = {
        "pair": " ".join(pairs) or None,
        "classes": classes,
        "file": " ".join(file.stem for file in files) or None,
        "grid": corners,
        "traverse": traverse or None,
    }
    chosen: dict[str, str | bool] = {flag: value for flag, value in options.items() if value is not None}
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(f'--{flag}' for flag in chosen)} cannot be combined; use only one of them.")
    if len(files) % 2:
        raise UserError(f"--file: each pair needs two images, but the number given is odd ({len(files)}).")
    return chosen


def _refuse_unused(chosen: str | None, count: int | None, path: str | None, span: float | None) -> None:
    from vae_cli.commands.output import refuse_unused

    if chosen not in (None, "classes"):
        refuse_unused(f"with --{chosen}", count=count)
    if chosen == "traverse":
        refuse_unused("with --traverse", path=path)
    else:
        refuse_unused("without --traverse", span=span)
    if chosen == "grid" and path == "geodesic":
        raise UserError(
            "--grid cannot be combined with --path geodesic, which is defined between two images: choose --path "
            "linear, slerp or norm-corrected, or type --pair I,J instead of --grid."
        )


def _ends(run: TrainedRun, pairs: list[str], classes: str | None, files: list[Path], count: int, seed: int) -> Ends:
    from vae_cli.commands.output import parse_indices
    from vae_cli.runs.pictures import class_pairs, ends_in_files, ends_in_test_set, random_pairs

    if files:
        return ends_in_files(run, files)
    if pairs:
        test_images = len(run.splits.test)
        return ends_in_test_set(run, [parse_indices(pair, test_images, "--pair", exactly=2) for pair in pairs])
    if classes is None:
        return ends_in_test_set(run, random_pairs(run, count, seed))
    names = [name.strip() for name in classes.split(",")]
    if len(names) != 2:
        raise UserError(f"--classes {classes}: give exactly two classes, separated by a comma, such as --classes 3,8")
    return ends_in_test_set(run, class_pairs(run, names, count, seed))
