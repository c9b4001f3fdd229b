"""`vae interpolate`: what lies between images in the latent space of a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vae_cli.commands.indices import parse_indices
from vae_cli.commands.output import named, place, refuse_unused, write
from vae_cli.core.errors import UserError, nearest, visible
from vae_cli.core.images import grid, load_image
from vae_cli.core.rng import evaluating
from vae_cli.runs.codes import Path as LatentPath
from vae_cli.runs.codes import between, decode, inferences
from vae_cli.runs.find import find_run
from vae_cli.runs.run import Run

COUNT, STEPS, SPAN = 8, 11, 3.0  # without an option that says otherwise
TRAVERSED = 32  # latent dimensions in a picture of traversals
MEASURED = 2000  # test images that order the dimensions


def main(
    run: str,
    *,
    pairs: list[str],
    classes: str | None,
    files: list[Path],
    count: int | None,
    path: LatentPath | None,
    steps: int,
    corners: str | None,
    gif: bool,
    traverse: bool,
    span: float | None,
    seed: int,
    weights: Literal["best", "last"],
    device: str,
    out: Path | None,
    runs_dir: Path,
    data_dir: str | Path | None,
) -> None:
    """Write a picture of strips, a square or traversals, and the codes and images as arrays. Raises UserError or
    Failure."""
    questions = {
        "pair": " ".join(pairs) or None,
        "classes": classes,
        "file": " ".join(file.stem for file in files) or None,
        "grid": corners,
        "traverse": traverse or None,
    }
    asked = {flag: value for flag, value in questions.items() if value is not None}
    if len(asked) > 1:
        raise UserError(f"{' and '.join(f'--{flag}' for flag in asked)} do not go together; type one of them.")
    if len(files) % 2:
        raise UserError(f"--file takes two images for each pair, and was given {len(files)}.")
    if asked and "classes" not in asked:
        refuse_unused(f"with --{next(iter(asked))}", count=count)
    if traverse:
        refuse_unused("with --traverse", path=path)
    else:
        refuse_unused("without --traverse", span=span)
    trained = Run(find_run(run, runs_dir), weights, device, data_dir)
    if not files and len(trained.splits.test) < 2:
        raise UserError(f"{trained.path} has fewer than two test images; type --file one.png --file two.png")
    name = named("traversals", span=span) if traverse else named(path or "linear", **asked, count=count)
    name = named(
        name,
        steps=steps if steps != STEPS else None,
        seed=seed or None,
        weights=weights if weights != "best" else None,
    )
    where, path = place(trained.path, "interpolations", name, out), path or "linear"
    with evaluating(trained.model, seed, trained.device):
        if traverse:
            _traverse(trained, SPAN if span is None else span, steps, seed, gif, where)
        elif corners is not None:
            _square(trained, corners, path, steps, gif, where)
        else:
            ends, names = _ends(trained, pairs, classes, files, count or COUNT, seed)
            _strips(trained, ends, names, path, steps, gif, where)
            if count is not None and len(ends) < count:
                print(f"There are no more than {len(ends)} such pairs of test images.")


def _ends(
    run: Run, pairs: list[str], classes: str | None, files: list[Path], count: int, seed: int
) -> tuple[Tensor, list[str]]:
    """The images (P, 2, C, H, W) between which to go, and a name for each pair."""
    if files:
        images = torch.stack([load_image(file, run.shape) for file in files]).unflatten(0, (-1, 2))
        return images, [f"{a.stem} {b.stem}" for a, b in zip(files[::2], files[1::2], strict=True)]
    test = run.splits.test
    generator = torch.Generator().manual_seed(seed)
    if pairs:
        chosen = [parse_indices(pair, len(test), "--pair", exactly=2) for pair in pairs]
    elif classes is not None:
        columns = [_of_class(run, name, generator) for name in _two_classes(classes)]
        count = min(count, *(len(column) for column in columns))
        chosen = [[int(a), int(b)] for a, b in zip(columns[0][:count], columns[1][:count], strict=True)]
    else:
        count = min(count, len(test) // 2)
        chosen = torch.randperm(len(test), generator=generator)[: 2 * count].reshape(-1, 2).tolist()
    images = test.batch(torch.tensor(chosen).flatten()).unflatten(0, (-1, 2))
    return images, [f"{a} to {b}" for a, b in chosen]


def _two_classes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2:
        raise UserError(f"--classes {text} names {len(names)} classes and takes 2, separated by a comma: --classes 3,8")
    return names


def _of_class(run: Run, name: str, generator: torch.Generator) -> Tensor:
    """The test images of a class, in random order."""
    test, names = run.splits.test, run.splits.classes
    if test.labels is None:
        raise UserError("--classes needs labels, and the images of this run have none; type --pair 0,1")
    labels = test.batch_labels(torch.arange(len(test)))
    known = list(names) if names else [str(label) for label in labels.unique().tolist()]
    if name not in known:
        raise UserError(f"--classes: there is no class '{name}'.{nearest(name, known)} There are {', '.join(known)}.")
    label = known.index(name) if names else int(name)
    found = (labels == label).nonzero().squeeze(1)
    if len(found) == 0:
        raise UserError(f"--classes: no test image is of class '{name}'.")
    return found[torch.randperm(len(found), generator=generator)]


def _strips(run: Run, ends: Tensor, names: list[str], path: LatentPath, steps: int, gif: bool, where: Path) -> None:
    loc = run.encode(ends.flatten(0, 1)).mean.unflatten(0, (-1, 2))
    z = between(loc[:, 0], loc[:, 1], steps, path).transpose(0, 1)  # (P, steps, D)
    images = decode(run, z.flatten(0, 1)).unflatten(0, z.shape[:2])
    rows = torch.cat([ends[:, :1], images, ends[:, 1:]], 1)
    picture = grid(rows.flatten(0, 1), steps + 2, row_labels=names)
    frames = _film([grid(images[:, step], min(8, len(images))) for step in range(steps)]) if gif else None
    _write(where, picture, {"ends": ends, "z": z, "images": images}, frames)
    print(f"From left to right: one end, {steps} images on the {path} path between the mean codes, the other end.")


def _square(run: Run, corners: str, path: LatentPath, steps: int, gif: bool, where: Path) -> None:
    test = run.splits.test
    chosen = parse_indices(corners, len(test), "--grid", exactly=4)
    ends = test.batch(torch.tensor(chosen))
    a, b, c, d = run.encode(ends).mean
    left, right = between(a, c, steps, path), between(b, d, steps, path)
    z = between(left, right, steps, path).transpose(0, 1)  # (rows, columns, D)
    images = decode(run, z.flatten(0, 1))
    rows = images.unflatten(0, (steps, steps))
    frames = _film([grid(row, steps) for row in rows]) if gif else None
    _write(where, grid(images, steps), {"ends": ends, "z": z, "images": rows}, frames)
    print(f"Corners, row by row: test images {', '.join(str(number) for number in chosen)}.")


def _traverse(run: Run, span: float, steps: int, seed: int, gif: bool, where: Path) -> None:
    """Move each dimension of one code over span standard deviations of all codes, the costliest dimension first."""
    seen = inferences(run, run.splits.test, MEASURED)
    loc = torch.cat([inference.loc for inference in seen])
    # The aggregate posterior's: that of the means, and that of the noise.
    scales = [inference.scale.square() for inference in seen if inference.scale is not None]
    noise = torch.cat(scales).mean(0) if scales else torch.zeros_like(loc[0])
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
    unit = "std" if costs is None else "nats"
    sizes = (deviation if costs is None else costs)[order].tolist()
    labels = [f"z{d}  {size:.2f} {unit}" for d, size in zip(order.tolist(), sizes, strict=True)]
    frames = _film([grid(images[:, step], 8) for step in range(steps)]) if gif else None
    what = "spread" if costs is None else "rate"
    arrays = {"z": z, "images": images, "dimensions": order, "base": torch.tensor(base)}
    _write(where, grid(images.flatten(0, 1), steps, row_labels=labels), arrays, frames)
    print(
        f"The code of test image {base}; each row moves one dimension over +-{span:g} standard deviations of all codes."
    )
    print(f"Rows are ordered by {what}" + (f"; the first {TRAVERSED} are shown." if loc.shape[1] > TRAVERSED else "."))


def _film(frames: list[Any]) -> list[Any]:
    """There and back, with a rest at both ends."""
    return [frames[0]] * 4 + frames + [frames[-1]] * 4 + frames[::-1]


def _write(stem: Path, picture: Any, arrays: dict[str, Tensor], frames: list[Any] | None) -> None:
    for path in write(stem, picture, {name: array.cpu().numpy() for name, array in arrays.items()}, frames):
        print(visible(str(path)))
