"""`vae sample`: images from a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vae_cli.commands.options import DataDir, Device, Out, Run, RunsDir, Seed, Trust, Weights

if TYPE_CHECKING:
    from vae_cli.runs.run import Run as TrainedRun

EXAMPLES = """
vae sample latest  draw images from the prior
vae sample latest --count 16 --temperature 0.7  draw 16, closer to the mean of the prior
vae sample runs/digits/default --from posterior --images 0,5,9 --draws 4  draw from the posteriors of test images
vae sample latest --from mixture --components 20  draw from a mixture fitted to the training codes
vae sample latest --from flow  train a flow matching model of the training codes, keep it, and draw from it
"""

COUNT, IMAGES, DRAWS = 64, "0-7", 8
COMPONENTS = 10  # equals runs.codes.MIXTURE_COMPONENTS, whose module imports torch
STEPS = 50  # equals model.flow_matching.STEPS, whose module imports torch

Count = Annotated[int | None, typer.Option(metavar="N", help="Number of images.", min=1, show_default=str(COUNT))]
Source = Annotated[
    Literal["prior", "posterior", "aggregate", "mixture", "flow", "vae"] | None,
    typer.Option(
        "--from",
        help="Distribution of the codes: the prior, the posteriors of test images, one Gaussian fitted to the training "
        "codes (aggregate), a mixture of Gaussians fitted to them, or a second stage trained on them: flow matching "
        "(flow) or a second VAE (vae).",
        show_default="prior; mixture if the encoder adds no noise",
    ),
]
Components = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="With --from mixture: number of Gaussians to fit.", min=1, show_default=str(COMPONENTS)
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --from flow: number of steps from noise to code.",
        min=1,
        max=10_000,
        show_default=str(STEPS),
    ),
]
Solver = Annotated[
    Literal["heun", "euler"] | None,
    typer.Option(
        help="With --from flow: the method of the steps. Heun's evaluates the network twice per step.",
        show_default="heun",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="T",
        help="Multiplies the standard deviation of every Gaussian that codes are drawn from. With --from flow: of the "
        "noise that it starts from.",
        min=0.0,
        max=1000.0,
    ),
]
Draw = Annotated[bool, typer.Option("--draw/--mean", help="Draw pixels from the likelihood, or show its mean.")]
Images = Annotated[
    str | None,
    typer.Option(metavar="I,J,...", help="With --from posterior: test images, e.g. 0,5,9.", show_default=IMAGES),
]
Draws = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="With --from posterior: draws for each image.", min=1, max=1000, show_default=str(DRAWS)
    ),
]


def sample(
    run: Run,
    count: Count = None,
    source: Source = None,
    components: Components = None,
    steps: Steps = None,
    solver: Solver = None,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    draw: Draw = False,
    images: Images = None,
    draws: Draws = None,
    weights: Weights = "best",
    device: Device = "auto",
    out: Out = None,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Draw images from a trained run."""
    from vae_cli.commands.output import named, parse_indices, place, refuse_unused, write
    from vae_cli.runs import pictures
    from vae_cli.runs.find import find_run
    from vae_cli.runs.run import Run as TrainedRun

    trained = TrainedRun(find_run(run, runs_dir), weights, device, data_dir)
    source = source or _usual_source(trained, components or COMPONENTS)
    if source == "posterior":
        refuse_unused("with --from posterior", count=count, components=components)
    else:
        refuse_unused(f"with --from {source}", images=images, draws=draws)
    if source != "mixture":
        refuse_unused(f"with --from {source}", components=components)
    if source != "flow":
        refuse_unused(f"with --from {source}", steps=steps, solver=solver)
    name = named(
        source, count=count, components=components, steps=steps, solver=solver, images=images, draws=draws,
        temperature=temperature if temperature != 1 else None, draw=draw, seed=seed or None,
        weights=weights if weights != "best" else None,
    )  # fmt: skip
    stem = place(trained.path, "samples", name, out)
    if source == "posterior":
        chosen = parse_indices(images or IMAGES, len(trained.splits.test), "--images")
        rendered = pictures.posterior_samples(trained, chosen, draws or DRAWS, temperature, seed, draw)
    else:
        count, components = count or COUNT, components or COMPONENTS
        settings = {"steps": steps or STEPS, "solver": solver or "heun"} if source == "flow" else {}
        rendered = pictures.samples(trained, source, count, components, temperature, seed, draw, settings)
    write(stem, rendered)


def _usual_source(run: TrainedRun, components: int) -> Literal["prior", "mixture"]:
    from vae_cli.core.compatibility import offers

    if offers(run.model.sigma, "noise"):
        return "prior"
    print(
        f"sigma={run.config['choices']['sigma']} adds no noise, so nothing made the codes match the prior. They are "
        f"drawn from a mixture of {components} Gaussians fitted to the training codes instead; type --from prior to "
        "use the prior."
    )
    return "mixture"
