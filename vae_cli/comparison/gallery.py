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
from vae_cli.core.errors import UserError
from vae_cli.core.images import grid
from vae_cli.core.rng import evaluating
from vae_cli.runs.codes import MIXTURE_COMPONENTS, between, decode, draw_codes
from vae_cli.runs.run import Run

if TYPE_CHECKING:
    from vae_cli.core.images import Picture

COLUMNS = 12  # images in a row
PAIRS = 2  # interpolations, each between two test images
SIDE = 44  # approximate side of an image, in pixels
SCATTERED = 250  # codes in a scatter plot
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
                loc = run.encode(ends).mean
                path = decode(run, between(loc[0], loc[1], COLUMNS - 2, "linear"))
            rows[label] = torch.cat([ends[:1].cpu(), path, ends[1:].cpu()])
        return self._rows(rows)

    def _rows(self, rows: Mapping[str, Tensor]) -> bytes | None:
        if not rows or not self.has_pictures:
            return None
        images = torch.cat([row.cpu() for row in rows.values()])
        return png(grid(images, COLUMNS, side=SIDE, pad=3, row_labels=list(rows)))

    @torch.no_grad()
    def scatter(self, looks: Looks) -> bytes | None:
        """Return a plot of the posteriors of test images in the two dimensions with the largest variance, as PNG.

        Points are means, ellipses are one standard deviation, and a dashed ellipse is one standard deviation of the
        prior. None if a run has only one latent dimension.
        """
        if any(run.config["latent"] < 2 for run in self.runs.values()):
            return None
        columns = min(4, len(self.runs))
        rows = -(-len(self.runs) // columns)
        with drawing(WIDTH, 2.45 * rows) as figure:
            panels = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes, (label, run) in zip(panels, self.runs.items(), strict=False):
                self._scatter(axes, run)
                axes.set_title(label, color=text_color(looks[label]))
            for axes in panels[len(self.runs) :]:
                axes.set_visible(False)
        return as_png(figure)

    def _scatter(self, axes: Any, run: Run) -> None:
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
            ellipses = EllipseCollection(
                2 * size[:, 0], 2 * size[:, 1], np.zeros(count), units="xy", offsets=points, facecolors=colors,
                edgecolors="none", alpha=0.14, transOffset=axes.transData,
            )  # fmt: skip
            axes.add_collection(ellipses)
        axes.scatter(points[:, 0], points[:, 1], s=5, c=colors, linewidths=0, zorder=3)
        with suppress(NotImplementedError):  # raised by a prior without a closed-form mean or standard deviation
            center, radius = prior.mean[[x, y]].cpu().numpy(), prior.stddev[[x, y]].cpu().numpy()
            turn = np.linspace(0, 2 * np.pi, 100)
            axes.plot(center[0] + radius[0] * np.cos(turn), center[1] + radius[1] * np.sin(turn), "--", color="#333333",
                      linewidth=1, zorder=4)  # fmt: skip
        edge = 1.05 * max(float(np.quantile(np.abs(points) + size, 0.99)), 1e-6)
        axes.set_xlim(-edge, edge)
        axes.set_ylim(-edge, edge)
        axes.set_aspect("equal")
        axes.set_xlabel(f"dimension {x} of z")
        axes.set_ylabel(f"dimension {y} of z")


def png(picture: Picture) -> bytes:
    """Return a picture (H, W, 3) as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
