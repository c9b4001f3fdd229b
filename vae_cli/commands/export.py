"""`vae export`: encoder and decoder of a trained run, or its codes, for use without this package."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vae_cli.commands.options import DataDir, Run, RunsDir, Trust, Weights, expanded

if TYPE_CHECKING:
    from vae_cli.runs.export_folder import Exported
    from vae_cli.runs.run import Run as TrainedRun

EXAMPLES = """
vae export latest  write encoder and decoder to the run's folder, and a script that shows how to use them
vae export latest --format onnx  write ONNX only
vae export runs/digits/default --to elsewhere --weights last  write the newest weights to another folder
vae export latest --codes  write the codes, labels and images of all splits to codes.npz
"""

Kind = Annotated[
    Literal["pt2", "onnx"] | None,
    typer.Option(
        "--format",
        help="A torch.export program (pt2), or ONNX, which needs the packages of the extra `onnx`.",
        show_default="both if these packages are installed, otherwise pt2",
    ),
]
To = Annotated[
    Path | None,
    typer.Option(
        "--to",
        "--out",
        metavar="FOLDER",
        help="Folder to write to.",
        show_default="export/ in the run's folder",
        callback=expanded,
    ),
]
Codes = Annotated[
    bool,
    typer.Option("--codes", help="Write the codes of all images to codes.npz, instead of encoder and decoder."),
]
CodesDevice = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="With --codes: auto, cpu, cuda ...", show_default="auto"),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that are not from an export, or that you have changed.")
]


def export(
    run: Run,
    kind: Kind = None,
    codes: Codes = False,
    to: To = None,
    weights: Weights = "best",
    device: CodesDevice = None,
    overwrite: Overwrite = False,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Export encoder and decoder, or with --codes the codes of all images, to use them without vae.

    Encoder and decoder are written as torch.export programs and as ONNX, with a short script that uses them, and are
    compared with the model before anything is written.
    """
    from vae_cli.commands.output import refuse_unused
    from vae_cli.core.errors import Failure
    from vae_cli.runs.export import FORMATS, check_formats, missing_for_onnx
    from vae_cli.runs.export_folder import ADVICE, export_to
    from vae_cli.runs.find import find_run
    from vae_cli.runs.folder import refuse_link
    from vae_cli.runs.run import Run as TrainedRun

    if codes:
        refuse_unused("with --codes, which writes no program", format=kind)
    else:
        refuse_unused("without --codes, because programs are exported on the CPU and without images",
                      device=device, **{"data-dir": data_dir})  # fmt: skip
    formats = (kind,) if kind else tuple(one for one in FORMATS if one != "onnx" or not missing_for_onnx())
    check_formats(formats)
    trained = TrainedRun(find_run(run, runs_dir), weights, device or ("auto" if codes else "cpu"), data_dir)
    if to is None:
        refuse_link(trained.path, "export")
    folder = to or trained.path / "export"
    try:
        if codes:
            _export_codes(trained, folder, overwrite)
            return
        written = export_to(trained, folder, weights, formats, overwrite)
    except OSError as error:
        raise Failure(f"{folder} cannot be written to: {error.strerror}. {ADVICE}") from error
    _print(written, trained.model.precision, is_onnx_missing=kind is None and "onnx" not in formats)


def _export_codes(run: TrainedRun, folder: Path, overwrite: bool) -> None:
    """Write codes.npz, and print its path and the command that measures it."""
    from vae_cli.core.errors import visible
    from vae_cli.runs.export_codes import export_codes

    file, notes = export_codes(run, folder, overwrite)
    print(visible(str(file)))
    for note in notes:
        print(note)
    print(visible(f"To measure the codes: vae evaluate --codes {shlex.quote(str(file))}"))


def _print(written: Exported, precision: str, is_onnx_missing: bool) -> None:
    from vae_cli.core.errors import visible
    from vae_cli.runs.export import ALLOWED, CHECKED, GET_ONNX

    for path in written.paths:
        print(visible(str(path)))
    sizes = f"{', '.join(map(str, CHECKED[:-1]))} and {CHECKED[-1]}"
    print(
        f"Largest difference from the model, for random images and codes in batches of {sizes}: "
        f"{max(written.differences.values()):.1e} (allowed: {ALLOWED:.0e})."
    )
    if precision != "float32":
        print(f"The run was trained with precision={precision}; the exported programs compute in float32.")
    if written.removed:
        names = ", ".join(path.name for path in written.removed)
        print(f"Removed from an earlier export, because they hold other weights: {names}.")
    if is_onnx_missing:
        print(f"ONNX was not written, because packages are missing: type {GET_ONNX}")
    script = next(path for path in written.paths if path.suffix == ".py")
    print(visible(f"To try it: python {script}"))
