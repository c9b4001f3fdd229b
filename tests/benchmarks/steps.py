"""Take turns between the training steps of `vae train` and those of the bare loop, in one process.

A turn of ours is the inner loop of `vae train` without its event file: it draws the order of the images, advances the
learning rate, takes the steps, and reads the mean loss every `log_every` steps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bare
import torch
from hydra import compose, initialize_config_dir

from vae_cli.config.build import build_experiment
from vae_cli.config.catalog import configs_dir
from vae_cli.config.compose import to_plain
from vae_cli.core.rng import epoch_order
from vae_cli.training.meter import Meter
from vae_cli.training.step import Step

STEPS = 100  # of a turn


def our_steps(words: list[str]) -> Iterator[int]:
    """Train a run with these overrides without end; yield the number of images of each step."""
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        experiment = build_experiment(to_plain(compose("train", words, return_hydra_config=True)))
    config, images = experiment.config, experiment.splits.train
    step, meter, number, epoch = Step(experiment), Meter(), 0, 0
    while True:
        for positions in images.shuffled(epoch_order(config["seed"], epoch), config["batch_size"]):
            experiment.optimizer.advance(epoch)
            terms = step(positions)
            number += 1
            meter.add(number, terms)
            if number % config["log_every"] == 0:
                meter.point()
            yield len(positions)
        epoch += 1


def turn(steps: Iterator[int]) -> float:
    """Take the steps of one turn and return the images per second."""
    begin = time.perf_counter()
    images = sum(next(steps) for _ in range(STEPS))
    return images / (time.perf_counter() - begin)


def main() -> None:
    file, network, sigma, threads, turns, *words = sys.argv[1:]
    torch.set_flush_denormal(True)  # before the first parallel operation
    torch.set_num_threads(int(threads))
    ours, theirs = (
        our_steps([*words, f"threads={threads}"]),
        bare.train_steps(torch.load(Path(file), weights_only=True), network, sigma),
    )
    turn(ours), turn(theirs)  # warm up
    pairs = [(turn(ours), turn(theirs)) for _ in range(int(turns))]
    print(json.dumps({"ours": [pair[0] for pair in pairs], "theirs": [pair[1] for pair in pairs]}))


if __name__ == "__main__":
    main()
