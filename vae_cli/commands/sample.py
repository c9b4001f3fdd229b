"""`vae sample`: images from a trained run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch

from vae_cli.commands.indices import parse_indices
from vae_cli.commands.output import named, place, refuse_unused, write
from vae_cli.core.compatibility import offers
from vae_cli.core.errors import visible
from vae_cli.core.images import grid
from vae_cli.core.rng import evaluating
from vae_cli.machine.memory import refuse_oversize
from vae_cli.runs.codes import MIXTURE_COMPONENTS, decode, draw_codes
from vae_cli.runs.find import find_run
from vae_cli.runs.run import Run

COUNT, IMAGES, DRAWS = 64, "0-7", 8  # without an option that says otherwise
SHOWN = 1024  # images in a picture; the arrays hold all


def main(
    run: str,
    *,
    count: int | None,
    source: str | None,
    components: int | None,
    temperature: float,
    seed: int,
    draw: bool,
    images: str | None,
    draws: int | None,
    weights: Literal["best", "last"],
    device: str,
    out: Path | None,
    runs_dir: Path,
    data_dir: str | Path | None,
) -> None:
    """Write a picture of samples, and their codes and images as arrays. Raises UserError or Failure."""
    trained = Run(find_run(run, runs_dir), weights, device, data_dir)
    if source is None:
        source = "prior"
        if not offers(trained.model.sigma, "noise"):
            source = "mixture"
            print(
                f"sigma={trained.config['choices']['sigma']} adds no noise, so that nothing made its codes fit the "
                f"prior: they are drawn from {components or MIXTURE_COMPONENTS} Gaussians fitted to the training codes "
                "(--from prior draws from the prior all the same)."
            )
    asked: dict[str, object] = {
        "temperature": temperature if temperature != 1 else None,
        "draw": draw,
        "seed": seed or None,
        "weights": weights if weights != "best" else None,
    }
    if source == "posterior":
        refuse_unused("with --from posterior", count=count, components=components)
        where = place(trained.path, "samples", named(source, images=images, draws=draws, **asked), out)
        _posterior(trained, images or IMAGES, draws or DRAWS, temperature, seed, draw, where)
        return
    refuse_unused(f"with --from {source}", images=images, draws=draws)
    if source != "mixture":
        refuse_unused(f"with --from {source}", components=components)
    where = place(trained.path, "samples", named(source, count=count, components=components, **asked), out)
    count, components = count or COUNT, components or MIXTURE_COMPONENTS
    refuse_oversize(12 * count * math.prod(trained.shape), f"--count {count}", "type a smaller number")
    with evaluating(trained.model, seed, trained.device):  # one stream of random numbers for codes and pixels
        z = draw_codes(trained, source, count, temperature, components, seed)
        drawn = decode(trained, z, draw)
    picture = grid(drawn[:SHOWN], math.ceil(math.sqrt(min(count, SHOWN))))
    _say(write(where, picture, {"z": z.numpy(), "images": drawn.numpy()}))
    if count > SHOWN:
        print(f"The picture shows the first {SHOWN} of {count} images; the arrays hold all.")


def _posterior(run: Run, images: str, draws: int, temperature: float, seed: int, draw: bool, where: Path) -> None:
    test = run.splits.test
    chosen = torch.tensor(parse_indices(images, len(test), "--images"))
    with evaluating(run.model, seed, run.device):
        inference = run.model(run.images(test.batch(chosen)), (draws,))
        loc = inference.loc
        z = torch.lerp(loc, inference.z, temperature).transpose(0, 1)  # (B, draws, D)
        mean = decode(run, loc)
        means = decode(run, z.flatten(0, 1)).unflatten(0, z.shape[:2])
        drawn = decode(run, z.flatten(0, 1), draw=True).unflatten(0, z.shape[:2]) if draw else means
    x = inference.x.cpu()
    rows = torch.cat([x[:, None], mean[:, None], drawn], 1)
    labels = [f"test {number}" for number in chosen.tolist()]
    picture = grid(rows.flatten(0, 1), draws + 2, row_labels=labels)
    arrays = {"index": chosen, "inputs": x, "loc": loc.cpu(), "mean": mean, "z": z.cpu(), "images": drawn}
    paths = write(where, picture, {k: v.numpy() for k, v in arrays.items()})
    what = f"{draws} draws" if draws > 1 else "one draw"
    print(f"From left to right: the test image, its reconstruction from the mean code, and {what} of the code.")
    if inference.scale is None:
        print("All draws of a code are the same: its posterior is a point mass.")
    else:
        spread = (means - mean[:, None]).square().mean().sqrt()
        print(f"Root mean squared difference that epsilon makes in the mean of a pixel: {float(spread):.4f}")
    _say(paths)


def _say(paths: list[Path]) -> None:
    for path in paths:
        print(visible(str(path)))
