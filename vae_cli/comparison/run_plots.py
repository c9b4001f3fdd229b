"""Plots of a single run: its losses over training and, if its codes have two dimensions, a map of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from vae_cli.comparison.plot_layout import whole_ticks
from vae_cli.comparison.plot_style import GRAY, HUES, WIDTH, drawing
from vae_cli.config.claims import entry
from vae_cli.config.settings import code_size
from vae_cli.core.images import grid
from vae_cli.core.rng import evaluating
from vae_cli.model.distributions import location
from vae_cli.runs.codes import decode
from vae_cli.runs.folder import RunDir
from vae_cli.runs.run import Run

TERMS = ("loss", "distortion", "rate")
SHOWN = 2000  # codes on a map
SIDE = 15  # images along each side of a map
BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "linewidth": 0, "alpha": 0.75}  # behind the name of a class
REACH = 2.5  # standard deviations of the prior that the map of images spans in each direction


def losses(folder: RunDir) -> Figure | None:
    """Plot loss, distortion and rate against the epoch, on the training and the validation images; None if fewer than
    two epochs were recorded. A dotted line marks the epoch whose weights are the best."""
    records = folder.metrics()
    splits = {split: [term for term in TERMS if all(f"{split}/{term}" in one for one in records)]
              for split in ("train", "validation")}  # fmt: skip
    terms = [term for term in TERMS if term in splits["train"]]
    if len(records) < 2 or not terms:
        return None
    best = folder.summary().get("weights_of_epoch")
    with drawing(WIDTH, 3.2) as figure:
        panels = figure.subplots(1, len(terms), squeeze=False)[0]
        for axes, term in zip(panels, terms, strict=True):
            for (split, has), color in zip(splits.items(), HUES, strict=False):
                if term in has:
                    values = [one[f"{split}/{term}"] for one in records]
                    axes.plot([one["epoch"] for one in records], values, color=color, label=split)
            if best is not None:
                axes.axvline(best, color=GRAY, linestyle=":", linewidth=1, label=f"best weights, epoch {best}")
            _fit(axes, records, [f"{split}/{term}" for split, has in splits.items() if term in has])
            axes.set_title(entry(term).title)
            axes.set_xlabel("epoch")
            axes.set_ylabel("nats per image")
            whole_ticks(axes.xaxis)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return figure


def _fit(axes: Any, records: Sequence[Mapping[str, float]], names: Sequence[str]) -> None:
    """Limit the vertical axis to the curves without their first tenth, which is usually far above the rest."""
    rest = [one[name] for name in names for one in records[len(records) // 10 :]]
    low, high = min(rest), max(rest)
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


@torch.no_grad()
def code_map(run: Run) -> Figure | None:
    """Plot the mean codes of test images next to the images that codes on a grid are decoded into; None unless the
    codes have two dimensions. The grid spans the middle of the prior."""
    if code_size(run.config["latent"]) != 2 or run.shape[0] not in (1, 3):
        return None
    positions = torch.arange(min(SHOWN, len(run.splits.test)))
    with evaluating(run.model, 0, run.device):
        loc = torch.cat([location(run.encode(run.splits.test.batch(part))).cpu() for part in positions.split(500)])
        prior = run.model.prior()
        center, spread = prior.mean.cpu(), prior.stddev.cpu()
        line = torch.linspace(-REACH, REACH, SIDE)
        # The top row has the largest second coordinate, as in the plot of the codes.
        z = torch.stack([line.expand(SIDE, SIDE), line.flip(0)[:, None].expand(SIDE, SIDE)], -1).flatten(0, 1)
        images = decode(run, (center + spread * z).to(run.device))
    colors: Any = HUES[0]
    labels = None if run.splits.test.labels is None else run.splits.test.batch_labels(positions).cpu()
    if labels is not None:
        colors = [f"C{label % 10}" for label in labels.tolist()]
    with drawing(WIDTH, 4.9) as figure:
        left, right = figure.subplots(1, 2)
        left.scatter(loc[:, 0], loc[:, 1], s=6, c=colors, linewidths=0)
        low, high = (center - REACH * spread).tolist(), (center + REACH * spread).tolist()
        left.plot([low[0], high[0], high[0], low[0], low[0]], [low[1], low[1], high[1], high[1], low[1]], "--",
                  color=GRAY, linewidth=1)  # fmt: skip
        edge = 1.05 * float(np.abs(loc.numpy()).max(initial=1e-6))
        edge = max(edge, *(1.05 * abs(end) for end in (*low, *high)))
        left.set_xlim(-edge, edge)
        left.set_ylim(-edge, edge)
        left.set_aspect("equal")
        for label in [] if labels is None else labels.unique().tolist():
            place, name = loc[labels == label].median(0).values.tolist(), str(label)
            name = run.splits.classes[label] if run.splits.classes else name
            left.annotate(name, place, color=f"C{label % 10}", fontweight="bold", ha="center", va="center",
                          bbox=BOX)  # fmt: skip
        left.set_title("Mean codes of test images")
        right.set_title("Images decoded inside the dashed square")
        right.imshow(grid(images, SIDE, side=28, pad=3), extent=(low[0], high[0], low[1], high[1]), aspect="equal")
        right.grid(visible=False)
        for axes in (left, right):
            axes.set_xlabel("z0")
            axes.set_ylabel("z1")
        return figure


def draw_run(folder: RunDir, device: str, data_dir: str | Path | None) -> dict[str, Figure]:
    """Return the plots of a run that it has, by name."""
    found = {"loss": losses(folder)}
    if code_size(folder.config()["latent"]) == 2:
        found["codes"] = code_map(Run(folder.path, "best", device, data_dir))
    return {name: figure for name, figure in found.items() if figure is not None}
