"""Pictures of a run's samples, interpolations and traversals, with the codes and images as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vae_cli.core.errors import UserError, nearest
from vae_cli.core.images import Heading, grid, load_image
from vae_cli.core.rng import evaluating
from vae_cli.machine.device import computing_in
from vae_cli.machine.memory import refuse_oversize
from vae_cli.model.geodesics import Geodesics, geodesics
from vae_cli.runs.codes import Path as PathKind
from vae_cli.runs.codes import between, decode, draw_codes, inferences
from vae_cli.runs.run import Run

if TYPE_CHECKING:
    from vae_cli.core.images import Picture

SHOWN = 1024  # maximum number of images in a picture of samples; the arrays contain all of them
COMPARED = 4000  # maximum number of images in a picture of geodesics and straight lines
TRAVERSED = 32  # maximum number of latent dimensions in a picture of traversals
MEASURED = 2000  # maximum number of test images used to compute the standard deviation and rate of each dimension


class Rendered(NamedTuple):
    """A picture, its data as arrays, its captions and, if requested, the frames of an animation."""

    picture: Picture
    arrays: dict[str, Tensor]
    captions: list[str]
    frames: list[Picture] | None = None


class Ends(NamedTuple):
    """The images (P, 2, C, H, W) at both ends of P interpolation paths, and a name for each path."""

    images: Tensor
    names: list[str]


def samples(
    run: Run,
    source: str,
    count: int,
    components: int,
    temperature: float,
    seed: int,
    draw: bool,
    solver: Mapping[str, Any] = MappingProxyType({}),
) -> Rendered:
    """Decode codes drawn from the `prior`, a `mixture`, a `flow` or another source (see draw_codes).

    Raises UserError if the images do not fit into memory.
    """
    refuse_oversize(12 * count * math.prod(run.shape), f"--count {count}", "use a smaller number")
    with evaluating(run.model, seed, run.device):  # codes and pixels are drawn from the same random stream
        z = draw_codes(run, source, count, temperature, components, seed, solver)
        images = decode(run, z, draw)
    picture = grid(images[:SHOWN], math.ceil(math.sqrt(min(count, SHOWN))))
    captions = [f"The picture shows {SHOWN} of {count} images; the arrays contain all."] if count > SHOWN else []
    return Rendered(picture, {"z": z, "images": images}, captions)


def posterior_samples(
    run: Run, indices: Sequence[int], draws: int, temperature: float, seed: int, draw: bool
) -> Rendered:
    """Decode draws from the posteriors of test images.

    Each row of the picture shows a test image, its reconstruction from loc(x), and the decoded draws.
    """
    chosen = torch.tensor(indices)
    with evaluating(run.model, seed, run.device):
        inference = run.model(run.images(run.splits.test.batch(chosen)), (draws,))
        loc = inference.loc
        z = torch.lerp(loc, inference.z, temperature).transpose(0, 1)  # (B, draws, D)
        mean = decode(run, loc)
        means = decode(run, z.flatten(0, 1)).unflatten(0, z.shape[:2])
        images = decode(run, z.flatten(0, 1), draw=True).unflatten(0, z.shape[:2]) if draw else means
    x = inference.x.cpu()
    rows = torch.cat([x[:, None], mean[:, None], images], 1)
    headings = [Heading("image"), Heading("mean"), Heading("draws" if draws > 1 else "draw", draws)]
    picture = grid(rows.flatten(0, 1), draws + 2, row_labels=[f"test {index}" for index in indices], headings=headings)
    arrays = {"index": chosen, "inputs": x, "loc": loc, "mean": mean, "z": z, "images": images}
    drawn = f"{draws} decoded draws" if draws > 1 else "one decoded draw"
    captions = [f"Each row: a test image, its reconstruction from the mean code, and {drawn} from its posterior."]
    if inference.scale is None:
        captions.append("All draws from a posterior are equal because it is a point mass.")
    else:
        difference = (means - mean[:, None]).square().mean().sqrt()
        captions.append(f"Epsilon changes a pixel's decoded mean by {float(difference):.4f} (root mean square).")
    return Rendered(picture, arrays, captions)


def ends_in_files(run: Run, files: Sequence[Path]) -> Ends:
    """Load image files, two for each interpolation path. Raises UserError if a file cannot be read."""
    known = run.config["dataset"].get("range")
    white = known if isinstance(known, int) else None
    images = torch.stack([load_image(file, run.shape, white) for file in files]).unflatten(0, (-1, 2))
    return Ends(images, [f"{_short(a.stem)} to {_short(b.stem)}" for a, b in zip(files[::2], files[1::2], strict=True)])


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def ends_in_test_set(run: Run, pairs: Sequence[Sequence[int]]) -> Ends:
    """Return the pairs of test images with these indices."""
    images = run.splits.test.batch(torch.tensor(pairs).flatten()).unflatten(0, (-1, 2))
    return Ends(images, [f"{a} to {b}" for a, b in pairs])


def random_pairs(run: Run, count: int, seed: int) -> list[list[int]]:
    """Draw `count` disjoint random pairs of test images, or fewer if there are not enough, and return their indices."""
    size = len(run.splits.test)
    count = min(count, size // 2)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: 2 * count].reshape(-1, 2).tolist()


def class_pairs(run: Run, names: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """Draw `count` random pairs of test images, one image from each of two classes, and return their indices.

    There are fewer pairs if a class has fewer than `count` test images. Raises UserError if the images have no labels,
    or if a class does not exist or has no test images.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = [_of_class(run, name, generator) for name in names]
    return torch.stack([column[: min(count, *map(len, columns))] for column in columns], 1).tolist()


def _of_class(run: Run, name: str, generator: torch.Generator) -> Tensor:
    """Return the indices of the test images in a class, in random order."""
    test, names = run.splits.test, run.splits.classes
    if test.labels is None:
        raise UserError("--classes needs labels, but the images of this run have none; type, for example, --pair 0,1")
    labels = test.batch_labels(torch.arange(len(test)))
    known = list(names) if names else [str(label) for label in labels.unique().tolist()]
    if name not in known:
        raise UserError(f"--classes: there is no class '{name}'.{nearest(name, known)} Classes: {', '.join(known)}.")
    label = known.index(name) if names else int(name)
    found = (labels == label).nonzero().squeeze(1)
    if len(found) == 0:
        raise UserError(f"--classes: class '{name}' has no test images.")
    return found[torch.randperm(len(found), generator=generator)]


def strips(run: Run, ends: Ends, path: PathKind, steps: int, seed: int, gif: bool) -> Rendered:
    """Interpolate between the mean codes of each pair of images and decode the path, one row per pair."""
    with evaluating(run.model, seed, run.device):
        loc = run.encode(ends.images.flatten(0, 1)).mean.unflatten(0, (-1, 2))
        z = between(loc[:, 0], loc[:, 1], steps, path).transpose(0, 1)  # (P, steps, D)
        images = decode(run, z.flatten(0, 1)).unflatten(0, z.shape[:2])
    rows = torch.cat([ends.images[:, :1], images, ends.images[:, 1:]], 1)
    headings = [Heading("image"), Heading("decoded", steps), Heading("image")]
    picture = grid(rows.flatten(0, 1), steps + 2, row_labels=ends.names, headings=headings)
    caption = f"Each row: an image, {steps} decoded codes on the {path} path between the mean codes, the other image."
    frames = _animate([grid(images[:, step], min(8, len(images))) for step in range(steps)]) if gif else None
    return Rendered(picture, {"ends": ends.images, "z": z, "images": images}, [caption], frames)


def geodesic_strips(run: Run, ends: Ends, steps: int, seed: int, gif: bool) -> Rendered:
    """Decode the geodesic between the mean codes of each pair of images, and the straight line for comparison.

    The picture has two rows per pair: the geodesic, and the straight line. The codes of both are evenly spaced by
    length in image space. Paths and lengths are computed in float32, whatever the precision of the run is. Raises
    UserError if the images do not fit into memory.
    """
    pairs = len(ends.names)
    refuse_oversize(24 * pairs * steps * math.prod(run.shape), f"Decoding {2 * pairs * steps} images", "ask for fewer")
    with evaluating(run.model, seed, run.device):
        loc = run.encode(ends.images.flatten(0, 1)).mean.unflatten(0, (-1, 2))
        found = _find_geodesics(run, loc[:, 0], loc[:, 1], steps)
        z = torch.stack([found.shortest.z, found.straight.z], 1)  # (P, 2, steps, D)
        images = decode(run, z.flatten(0, 2)).unflatten(0, z.shape[:3])
    x = ends.images.cpu()[:, None].expand(-1, 2, -1, -1, -1, -1)
    rows = torch.cat([x[:, :, :1], images, x[:, :, 1:]], 2)
    labels = [label for name in ends.names for label in (f"{name}: geodesic", "straight line")]
    shown = max(1, COMPARED // (2 * steps + 4))
    headings = [Heading("image"), Heading("decoded", steps), Heading("image")]
    picture = grid(rows[:shown].flatten(0, 2), steps + 2, row_labels=labels[: 2 * shown], headings=headings)
    frames = _animate([grid(images[:, 0, step], min(8, pairs)) for step in range(steps)]) if gif else None
    captions = _geodesic_captions(found, ends.names, steps)
    if pairs > shown:
        captions.append(f"The picture shows {shown} of {pairs} pairs; the arrays contain all.")
    arrays = {
        "ends": ends.images, "z": z[:, 0], "images": images[:, 0], "straight_z": z[:, 1],
        "straight_images": images[:, 1], "length": found.shortest.length, "straight_length": found.straight.length,
        "distance": found.distance, "converged": found.reached,
    }  # fmt: skip
    return Rendered(picture, arrays, captions, frames)


def _find_geodesics(run: Run, a: Tensor, b: Tensor, steps: int) -> Geodesics:
    """Find geodesics in float32: rounding to bfloat16 would add to each of the small distances along a path."""
    model, precision = run.model, run.model.precision
    model.precision = "float32"
    try:
        with computing_in("float32", run.device.type):  # around the backward passes, too
            return geodesics(lambda z: model.decode(z).mean, a, b, steps)
    finally:
        model.precision = precision


def _geodesic_captions(found: Geodesics, names: Sequence[str], steps: int) -> list[str]:
    """Return a description of the picture, the table of lengths, and the names of paths that did not converge."""
    width = max(map(len, (*names, "pair")))
    lines = [f"{'pair':<{width}}  geodesic  straight line   ends"]
    columns = (found.shortest.length, found.straight.length, found.distance)
    for name, *lengths in zip(names, *(column.tolist() for column in columns), strict=True):
        geodesic, straight, distance = (f"{length:.3f}" for length in lengths)
        lines.append(f"{name:<{width}}  {geodesic:>8}  {straight:>13}  {distance:>5}")
    captions = [
        f"Each pair of rows: {steps} decoded codes on the geodesic between the mean codes, and on the straight line, "
        "evenly spaced by length.",
        "Lengths in image space, and the distance between the decoded ends (Euclidean, over all pixels):",
        *lines,
    ]
    missed = [name for name, reached in zip(names, found.reached.tolist(), strict=True) if not reached]
    if missed:
        captions.append(
            f"The search for the geodesic did not converge for {', '.join(missed)}: a shorter path may exist near the "
            "one shown."
        )
    return captions


def square(run: Run, indices: Sequence[int], path: PathKind, steps: int, seed: int, gif: bool) -> Rendered:
    """Decode a square grid of codes, interpolated between its four corners.

    The corners, row by row, are the mean codes of the test images with these indices.
    """
    ends = run.splits.test.batch(torch.tensor(indices))
    with evaluating(run.model, seed, run.device):
        a, b, c, d = run.encode(ends).mean
        left, right = between(a, c, steps, path), between(b, d, steps, path)
        z = between(left, right, steps, path).transpose(0, 1)  # (rows, columns, D)
        images = decode(run, z.flatten(0, 1))
    rows = images.unflatten(0, (steps, steps))
    # The test images themselves are shown next to the corners.
    framed = torch.full((steps, steps + 2, *images.shape[1:]), math.nan)
    framed[:, 1:-1] = rows
    framed[[0, 0, -1, -1], [0, -1, 0, -1]] = ends.cpu()
    headings = [Heading("image"), Heading("decoded", steps), Heading("image")]
    caption = f"Corners, row by row: test images {', '.join(map(str, indices))}, shown at the sides."
    frames = _animate([grid(row, steps) for row in rows]) if gif else None
    return Rendered(
        grid(framed.flatten(0, 1), steps + 2, headings=headings),
        {"ends": ends, "z": z, "images": rows},
        [caption],
        frames,
    )


def traversals(run: Run, span: float, steps: int, seed: int, gif: bool) -> Rendered:
    """Vary the mean code of a random test image one dimension at a time, and decode the results: one row per dimension.

    Each dimension is set to `steps` values, from `span` standard deviations below its mean to `span` above it. The
    mean and standard deviation are those of the aggregate posterior.
    Rows are ordered by rate, or by standard deviation if rates are undefined, highest first.
    """
    with evaluating(run.model, seed, run.device):
        seen = inferences(run, run.splits.test, MEASURED)
        loc = torch.cat([inference.loc for inference in seen])
        # The variance of the aggregate posterior is the variance of the means plus the mean variance of the noise.
        variances = [inference.scale.square() for inference in seen if inference.scale is not None]
        noise = torch.cat(variances).mean(0) if variances else torch.zeros_like(loc[0])
        mean, deviation = loc.mean(0), (loc.var(0) + noise).sqrt()
        rates = [inference.rate_per_dimension for inference in seen if inference.rate is not None]
        costs = torch.cat([r for r in rates if r is not None]).mean(0) if rates and rates[0] is not None else None
        order = (deviation if costs is None else costs).argsort(descending=True)[:TRAVERSED]
        base = int(torch.randint(len(run.splits.test), (), generator=torch.Generator().manual_seed(seed)))
        code = run.encode(run.splits.test.batch(torch.tensor([base]))).mean[0]
        z = code.repeat(len(order), steps, 1)
        for row, dimension in enumerate(order.tolist()):
            offsets = torch.linspace(-span, span, steps, device=z.device)
            z[row, :, dimension] = mean[dimension] + offsets * deviation[dimension]
        images = decode(run, z.flatten(0, 1)).unflatten(0, z.shape[:2])
    what, unit = ("standard deviation", "std") if costs is None else ("rate", "nats")
    sizes = (deviation if costs is None else costs)[order].tolist()
    labels = [f"z{d}  {size:.2f} {unit}" for d, size in zip(order.tolist(), sizes, strict=True)]
    captions = [
        f"The mean code of test image {base}. Each row varies one dimension from -{span:g} to +{span:g} standard "
        "deviations around the mean of all codes.",
        f"Rows are ordered by {what}, highest first"
        + (f"; the first {TRAVERSED} of {loc.shape[1]} dimensions are shown." if loc.shape[1] > TRAVERSED else "."),
    ]
    arrays = {"z": z, "images": images, "dimensions": order, "base": torch.tensor(base)}
    places = [round(offset, 6) for offset in torch.linspace(-span, span, steps).tolist()]
    headings = [Heading(f"{offset:+.2g}" if offset else "mean") for offset in places]
    frames = _animate([grid(images[:, step], 1, row_labels=labels) for step in range(steps)]) if gif else None
    picture = grid(images.flatten(0, 1), steps, row_labels=labels, headings=headings)
    return Rendered(picture, arrays, captions, frames)


def _animate(frames: list[Picture]) -> list[Picture]:
    """Return frames that play forward and then backward, with a pause at each end."""
    return [frames[0]] * 4 + frames + [frames[-1]] * 4 + frames[::-1]
