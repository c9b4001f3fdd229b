"""The files that `vae compare` writes: the report, its numbers for scripts, plots, and curves for TensorBoard."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from vae_cli.comparison import cache
from vae_cli.comparison.arms import Comparison
from vae_cli.comparison.export import as_plain, as_rows
from vae_cli.comparison.gallery import PAIRS, Gallery
from vae_cli.comparison.plot_style import looks
from vae_cli.comparison.plots import draw_all, save_all
from vae_cli.comparison.report import Pictures, render
from vae_cli.comparison.statistics import statistic
from vae_cli.comparison.verdicts import compared
from vae_cli.config.naming import clean
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import replace_file, write_json, write_text


def write_all(
    comparison: Comparison,
    folder: Path,
    notes: Sequence[str],
    device: str,
    data_dir: str | Path | None,
    tensorboard: bool,
) -> bool:
    """Write all files of a comparison; return whether the report has pictures of the arms. Raises Failure."""
    figures, pictures = draw_all(comparison), take_pictures(comparison, device, data_dir)
    title = f"Comparison of {len(comparison.members)} runs on {comparison.equal.get('dataset', 'one dataset')}"
    table, numbers, report = (folder / name for name in cache.FILES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache.forget(folder)
        write_text(table, _csv(comparison))
        write_json(numbers, as_plain(comparison))
        write_text(report, render(comparison, figures, pictures, title, notes, folder))
        save_all(figures, folder / "figures")
        _save_overview(pictures.overview, folder / "figures" / "overview.png")
        if tensorboard:
            write_curves(comparison, folder / "tensorboard")
    except OSError as error:
        raise Failure(f"{folder} cannot be written: {error.strerror}. Choose another folder: --out FOLDER") from error
    return not pictures.reason


def _save_overview(picture: bytes | None, path: Path) -> None:
    """Write the picture at the top of the report; without one, remove that of an earlier comparison."""
    if picture is None:
        path.unlink(missing_ok=True)
    else:
        replace_file(path, lambda file: file.write(picture))


def _csv(comparison: Comparison) -> str:
    text = io.StringIO(newline="")
    rows = as_rows(comparison)
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def take_pictures(comparison: Comparison, device: str, data_dir: str | Path | None) -> Pictures:
    """Return pictures of the arms. If a run cannot be loaded, return only the reason; the report is then written
    without pictures."""
    try:
        gallery = Gallery(comparison.shown, device, data_dir)
        chosen = looks(comparison)
        return Pictures(
            gallery.overview([arm.label for arm in compared(comparison) if arm.label in gallery.runs], chosen),
            gallery.samples("prior"),
            gallery.samples("mixture"),
            gallery.reconstructions(),
            [found for pair in range(PAIRS) if (found := gallery.interpolations(pair)) is not None],
            gallery.scatter(chosen),
            gallery.seeds,
        )
    except UserError as error:
        return Pictures(reason=str(error))


def write_curves(comparison: Comparison, folder: Path) -> None:
    """Write the mean and standard deviation over seeds of every training curve as two TensorBoard runs for each arm,
    `ARM/mean` and `ARM/sd`, for the epochs that all runs of the arm have recorded."""
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
