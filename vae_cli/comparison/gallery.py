"""Pictures that compare arms, with one row for each arm, the same test images and the same random seed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.collections import EllipseCollection
from torch import Tensor

from vae_cli.comparison.arms import Arm
from vae_cli.comparison.plot_style import WIDTH, Looks, as_png, drawing, text_color
from vae_cli.config.settings import code_size
from vae_cli.core.errors import UserError
from vae_cli.core.images import grid
from vae_cli.core.rng import evaluating
from vae_cli.model.distributions import location
from vae_cli.runs.codes import MIXTURE_COMPONENTS, between, decode, draw_codes
from vae_cli.runs.run import Run

if TYPE_CHECKING:
    from vae_cli.core.images import Picture

COLUMNS = 12  # images in a row
PAIRS = 2  # interpolations, each between two test images
SIDE = 44  # approximate side of an image, in pixels
SCATTERED = 250  # codes in a scatter plot
ELLIPSES = 12  # of them are drawn with an ellipse
FAR = 4.0  # a panel whose codes spread this many times as far as usual has a scale of its own
FOR_VARIANCE = 1000  # codes used to find the two dimensions with the largest variance


class Gallery:
    """Pictures of one run from each arm; if all arms have a seed in common, the runs with that seed are shown.

    `seed` determines the draws of codes and the choice of test images; the test images are the same for all runs.
    Raises UserError or Failure if a run cannot be loaded.
    """

    def __init__(self, arms: Sequence[Arm], device: str, data_dir: str | Path | None, seed: int = 0) -> None:
        common = set(arms[0].seeds).intersection(*(arm.seeds for arm in arms))
        chosen = {arm.label: next((m for m in arm.members if m.seed in common), arm.members[0]) for arm in arms}
        self.runs = {label: Run(member.folder.path, "best", device, data_dir) for label, member in chosen.items()}
        self.seeds = {label: member.seed for label, member in chosen.items()}
        self.seed = seed
        first = next(iter(self.runs.values()))
        for run in self.runs.values():
            run.splits = first.splits  # the images are large, and the same for all runs
        self.test = first.splits.test
        order = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(seed))
        self.positions = order[:COLUMNS]
        self.pairs = order[COLUMNS:][: 2 * PAIRS].reshape(-1, 2) if len(order) >= COLUMNS + 2 * PAIRS else None
        shown = self.test.batch(self.positions)
        self.has_pictures = shown.shape[1] in (1, 3) and float(shown.min()) >= 0 and float(shown.max()) <= 1

    def samples(self, source: str) -> bytes | None:
        """Return decoded draws from the `prior`, or from a `mixture` fitted to the training codes, as PNG."""
        rows = {}
        for label, run in self.runs.items():
            with evaluating(run.model, self.seed, run.device), suppress(UserError):  # too few codes for a mixture
                z = draw_codes(run, source, COLUMNS, 1.0, MIXTURE_COMPONENTS, self.seed)
                rows[label] = decode(run, z)
        return self._rows(rows)

    def reconstructions(self) -> bytes | None:
        """Return test images and each arm's reconstructions of them, from one draw of z per image, as PNG."""
        x = self.test.batch(self.positions)
        rows = {"test image": x}
        for label, run in self.runs.items():
            with evaluating(run.model, self.seed, run.device):
                rows[label] = decode(run, run.encode(x).rsample())
        return self._rows(rows)

    def interpolations(self, pair: int) -> bytes | None:
        """Return each arm's decoded linear interpolation between the mean codes of two test images, as PNG. The test
        images are shown at the ends. None if the test set is too small."""
        if self.pairs is None or pair >= len(self.pairs):
            return None
        ends = self.test.batch(self.pairs[pair])
        rows = {}
        for label, run in self.runs.items():
            with evaluating(run.model, self.seed, run.device):
                loc = location(run.encode(ends))
                path = decode(run, between(loc[0], loc[1], COLUMNS - 2, "linear"))
            rows[label] = torch.cat([ends[:1].cpu(), path, ends[1:].cpu()])
        return self._rows(rows)

    def _rows(self, rows: Mapping[str, Tensor]) -> bytes | None:
        if not rows or not self.has_pictures:
            return None
        images = torch.cat([row.cpu() for row in rows.values()])
        return png(grid(images, COLUMNS, side=SIDE, pad=3, row_labels=list(rows)))

    def overview(self, labels: Sequence[str], looks: Looks) -> bytes | None:
        """Return a figure with a row for each of some arms as PNG: reconstructions, decoded draws of the code of one
        image, an interpolation, and decoded draws from the prior. The first row has the test images themselves."""
        if not self.has_pictures or self.pairs is None:
            return None
        titles = ("the same test images", "one image, drawn four times", "from one image to another", "new images")
        x, one, ends = (
            self.test.batch(self.positions[:4]),
            self.test.batch(self.positions[4:5]),
            self.test.batch(self.pairs[0]),
        )
        real = [x, one, ends, x[:0]]
        with drawing(WIDTH, 0.42 + 0.62 * (len(labels) + 1)) as figure:
            rows = figure.subplots(len(labels) + 1, len(titles), squeeze=False, width_ratios=[4, 4, 6, 4])
            for place, (axes, title) in enumerate(zip(rows[0], titles, strict=True)):
                _show(axes, _spread(real[place], (4, 4, 6, 4)[place]))
                axes.set_title(title, loc="center", fontweight="normal")
            rows[0][0].set_ylabel("real", rotation=0, ha="right", va="center")
            for line, label in zip(rows[1:], labels, strict=True):
                for axes, images in zip(line, self._one_of_each(self.runs[label], x, one, ends), strict=True):
                    _show(axes, images)
                name = label.replace(", ", ",\n")
                line[0].set_ylabel(
                    name, rotation=0, ha="right", va="center", color=text_color(looks[label]), fontweight="bold"
                )
        return as_png(figure)

    @torch.no_grad()
    def _one_of_each(self, run: Run, x: Tensor, one: Tensor, ends: Tensor) -> list[Tensor]:
        with evaluating(run.model, self.seed, run.device):
            reconstructed = decode(run, run.encode(x).rsample())
            drawn = decode(run, run.encode(one.expand(4, -1, -1, -1)).rsample())
            loc = location(run.encode(ends))
            path = decode(run, between(loc[0], loc[1], 6, "linear"))
            made = decode(run, draw_codes(run, "prior", 4, 1.0, MIXTURE_COMPONENTS, self.seed))
        return [part.cpu() for part in (reconstructed, drawn, path, made)]

    @torch.no_grad()
    def scatter(self, looks: Looks) -> bytes | None:
        """Return a plot of the posteriors of test images in the two dimensions with the largest variance, as PNG.

        Points are means, the ellipses around some of them are one standard deviation, and a dashed ellipse is one
        standard deviation of the prior. All panels have the same scale, except those whose codes spread more than
        FAR times as far as the median panel's. None if a run has only one latent dimension.
        """
        if any(code_size(run.config["latent"]) < 2 for run in self.runs.values()):
            return None
        columns = min(4, len(self.runs))
        rows = -(-len(self.runs) // columns)
        with drawing(WIDTH, 2.45 * rows) as figure:
            panels = figure.subplots(rows, columns, squeeze=False).ravel()
            edges = []
            for axes, (label, run) in zip(panels, self.runs.items(), strict=False):
                edges.append(self._scatter(axes, run))
                axes.set_title(label, color=text_color(looks[label]))
            near = [edge for edge in edges if edge <= FAR * float(np.median(edges))]
            for axes, edge in zip(panels, edges, strict=False):
                limit = max(near) if edge in near else edge
                axes.set_xlim(-limit, limit)
                axes.set_ylim(-limit, limit)
                if edge not in near:
                    axes.annotate("another scale", (0.97, 0.03), xycoords="axes fraction", ha="right", fontsize=8)
            for axes in panels[len(self.runs) :]:
                axes.set_visible(False)
        return as_png(figure)

    def _scatter(self, axes: Any, run: Run) -> float:
        """Draw the posteriors of a run, and return how far they spread."""
        positions = torch.arange(min(FOR_VARIANCE, len(self.test)))
        with evaluating(run.model, self.seed, run.device):
            posterior = run.encode(self.test.batch(positions))
            loc, scale = posterior.mean.cpu(), posterior.stddev.expand_as(posterior.mean).cpu()
            prior = run.model.prior()
        spread = loc.var(0) + scale.square().mean(0)
        x, y = spread.argsort(descending=True)[:2].tolist()
        count = min(SCATTERED, len(loc))
        points, size = loc[:count, [x, y]].numpy(), scale[:count, [x, y]].numpy()
        colors: Any = "#4477aa"
        if self.test.labels is not None:
            colors = [f"C{label % 10}" for label in self.test.batch_labels(positions[:count]).tolist()]
        if (size > 0).any():
            few = slice(ELLIPSES)  # more would hide the means
            ellipses = EllipseCollection(
                2 * size[few, 0], 2 * size[few, 1], np.zeros(len(size[few])), units="xy", offsets=points[few],
                facecolors="none", edgecolors=colors[few] if isinstance(colors, list) else colors, linewidths=0.9,
                alpha=0.8, transOffset=axes.transData,
            )  # fmt: skip
            axes.add_collection(ellipses)
        axes.scatter(points[:, 0], points[:, 1], s=5, c=colors, linewidths=0, zorder=3)
        with suppress(NotImplementedError):  # raised by a prior without a closed-form mean or standard deviation
            center, radius = prior.mean[[x, y]].cpu().numpy(), prior.stddev[[x, y]].cpu().numpy()
            turn = np.linspace(0, 2 * np.pi, 100)
            axes.plot(center[0] + radius[0] * np.cos(turn), center[1] + radius[1] * np.sin(turn), "--", color="#333333",
                      linewidth=1, zorder=4)  # fmt: skip
        axes.set_aspect("equal")
        axes.set_xlabel(f"dimension {x} of z")
        axes.set_ylabel(f"dimension {y} of z")
        return 1.05 * max(float(np.quantile(np.abs(points) + size, 0.99)), 1e-6)


def _spread(images: Tensor, count: int) -> Tensor:
    """Return `count` images, those in the gaps NaN: two images are put at the ends, any others at the start."""
    if len(images) == count:
        return images
    filled = torch.full((count, *images.shape[1:]), torch.nan)
    places = [0, -1] if len(images) == 2 else list(range(len(images)))
    filled[places] = images
    return filled


def _show(axes: Any, images: Tensor) -> None:
    """Draw images (N, C, H, W) side by side, without ticks; nothing is drawn in place of an image that is NaN."""
    picture = grid(images.cpu(), len(images), side=SIDE, pad=2)
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def png(picture: Picture) -> bytes:
    """Return a picture (H, W, 3) as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
