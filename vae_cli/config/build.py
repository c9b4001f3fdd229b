"""From a configuration to everything that a training needs, built and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae_cli.axes.dataset import Dataset, Split, Splits
from vae_cli.axes.likelihood import Likelihood
from vae_cli.axes.network import Network
from vae_cli.axes.optimizer import ScheduledOptimizer
from vae_cli.axes.prior import Prior
from vae_cli.axes.regularizer import Regularizer
from vae_cli.axes.schedule import Constant, Schedule
from vae_cli.axes.sigma import Sigma
from vae_cli.config.instantiate import build, built_arguments, check_value, find_class
from vae_cli.config.settings import Config, check_settings
from vae_cli.core.compatibility import check_together
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.rng import initial_weights
from vae_cli.core.values import NonNegative
from vae_cli.machine import distributed
from vae_cli.machine.cores import free_gpu
from vae_cli.machine.device import check_precision, find_device, find_threads
from vae_cli.machine.memory import refuse_oversize, size_of, training_memory
from vae_cli.model.vae import VAE

SMALL = 1 << 26  # bytes of weights, and pixels, of a model that is soon there and computes an image or two at once


@dataclass
class Experiment:
    """Everything that a training needs, built and checked.

    config is plain and resolved; its key `choices` maps each axis to the word that chose its part.
    """

    config: Config
    device: torch.device
    splits: Splits
    model: VAE
    regularizer: Regularizer
    optimizer: ScheduledOptimizer


def build_experiment(config: Config) -> Experiment:
    """Check a whole configuration and build what it names. Raises UserError, or Failure where there are no data."""
    check_settings(config)
    flush_denormals()
    device = find_device(config["device"])
    check_precision(config["precision"], device)
    if config["device"] == "auto" and device.type == "cuda" and distributed.count() == 1:
        device = torch.device("cuda", free_gpu(torch.cuda.device_count()))
    dataset = build(config["dataset"], "dataset", Dataset)
    parts = build_parts(config, dataset)
    check_memory(config, dataset.shape, device)
    if device.type == "cuda" and distributed.count() > 1:
        torch.cuda.set_device(device)  # what the processes send each other goes through it
    splits = dataset.load().to(device)
    if len(splits.train) == 0:
        raise UserError("There is no image left to train on; hold out fewer with dataset.validation.")
    model = assemble(parts, config, dataset.shape, *_mean_and_spread(splits.train))
    regularizer: Regularizer = parts["regularizer"]
    if distributed.count() > 1 and config["on_divergence"] == "restart":
        raise UserError("on_divergence=restart is for one process: leave it out, and type the command again by hand.")
    if distributed.count() > 1 and device.type != "cuda" and distributed.has_batch_norm(model):
        raise UserError(
            "Batch normalization over the images of several processes needs GPUs; type network.normalization=group."
        )
    torch.set_num_threads(find_threads(config, model))
    model.to(device)
    regularizer.to(device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config["precision"] == "tf32"
        model.to(memory_format=torch.channels_last)  # as its convolutions like it best
    if config["compile"]:
        compile_networks(model, splits.train)
    parameters = [*model.parameters(), *regularizer.parameters()]
    return Experiment(config, device, splits, model, regularizer, build_optimizer(config["optimizer"], parameters))


def flush_denormals() -> None:
    """Take denormal numbers, of which Adam's state gets full, for 0: they slow a step by half. It has to be said before
    anything is computed, for threads inherit it when they are made."""
    torch.set_flush_denormal(True)


def compile_networks(model: VAE, images: Split) -> None:
    """Compile encoder and decoder, for steps that are faster from then on. Raises Failure where that cannot be."""
    try:
        for network in (model.encoder, model.decoder):
            network.compile()
        with torch.no_grad():
            model(images.batch(torch.arange(min(2, len(images)))))  # the compiler works when it is first needed
    except Exception as error:  # compilers fail in ways of their own: none is installed, most of all
        raise Failure(
            f"compile=true: the networks cannot be compiled here ({first_line(error)}); leave it out."
        ) from error


def check_config(config: Config) -> VAE:
    """Check a configuration as far as that needs no data; the model is one for images of mean 0. Raises UserError."""
    check_settings(config)
    flush_denormals()
    device = find_device(config["device"])
    check_precision(config["precision"], device)
    dataset = build(config["dataset"], "dataset", Dataset)
    dataset.check()
    parts = build_parts(config, dataset)
    check_memory(config, dataset.shape, device)
    model = assemble(parts, config, dataset.shape, torch.zeros(dataset.shape), 1.0)
    build_optimizer(config["optimizer"], [*model.parameters(), *parts["regularizer"].parameters()])
    return model


def build_parts(config: Config, dataset: Any = None) -> dict[str, Any]:
    """Build the parts of all axes but the optimizer, and refuse those that do not go together. Raises UserError."""
    kinds: dict[str, type] = {
        "network": Network,
        "sigma": Sigma,
        "likelihood": Likelihood,
        "prior": Prior,
        "regularizer": Regularizer,
    }
    parts: dict[str, Any] = {}
    for axis, kind in kinds.items():
        with initial_weights(config["seed"], axis):
            parts[axis] = build(config[axis], axis, kind)
    if dataset is not None:
        check_together({**parts, "dataset": dataset}, config["choices"])
    return parts


def check_memory(config: Config, shape: tuple[int, int, int], device: torch.device) -> None:
    """Raise UserError where the model cannot fit into memory, before it takes any that counts."""
    plain = {**config, "precision": "float32"}
    try:
        with torch.device("meta"):  # where tensors have a shape and no content
            model = build_model(plain, shape)
        if size_of(model) + math.prod(shape) <= SMALL:
            model = build_model(plain, shape)  # to compute on `meta` imports what takes longer than all the rest
        needed = training_memory(model, shape, math.ceil(config["batch_size"] / distributed.count()))
    except (RuntimeError, NotImplementedError):
        return  # a part of the user's own may ask for real numbers, and is not checked
    refuse_oversize(
        needed,
        f"network={config['choices']['network']} with latent={config['latent']} and batch_size={config['batch_size']}",
        "give smaller numbers",
        device,
    )


def build_model(config: Config, shape: tuple[int, int, int]) -> VAE:
    """The model of a run, with weights that are still to be loaded."""
    # On the CPU also where the model is to be on `meta`, on which a mean imports what takes longer than all the rest.
    return assemble(build_parts(config), config, shape, torch.zeros(shape, device="cpu"), 1.0)


def assemble(parts: Mapping[str, Any], config: Config, shape: tuple[int, int, int], mean: Tensor, spread: float) -> VAE:
    """Put a model together from its parts, for images of this shape, mean and spread (see Likelihood.start).

    Encoder and decoder take their weights from streams of random numbers of their own, so that runs of one seed begin
    with the same decoder and the same locations whatever the sigma mode.
    """
    network, sigma, likelihood = parts["network"], parts["sigma"], parts["likelihood"]
    with initial_weights(config["seed"], "encoder"):
        encoder = network.encoder(shape, config["latent"], sigma.raw_size)
    if not network.bias_per_pixel:
        mean = mean.mean((1, 2), keepdim=True).expand_as(mean)
    start = likelihood.start(mean, spread)
    if network.output_bias == "zero":
        start = torch.zeros_like(start)
    with initial_weights(config["seed"], "decoder"):
        decoder = network.decoder(config["latent"], start)
    return VAE(encoder, sigma, decoder, likelihood, parts["prior"], config["precision"])


def build_optimizer(node: Config, parameters: list[nn.Parameter]) -> ScheduledOptimizer:
    """The optimizer that a node of the configuration names. Raises UserError."""
    arguments = built_arguments(node, "optimizer")
    kind = find_class(node["_target_"], "optimizer", Optimizer)
    hints = get_type_hints(kind.__init__)
    for key, value in arguments.items():
        if key != "lr":  # torch itself takes tensors too, which no file can hold
            check_value(value, hints.get(key, Any), f"optimizer.{key}")
    if "betas" in arguments and len(arguments["betas"]) != 2:
        raise UserError(f"optimizer.betas={arguments['betas']} is not allowed: it takes two, as [0.9,0.999].")
    if "lr" in arguments:
        rate = arguments["lr"]
        check_value(rate, NonNegative | Schedule, "optimizer.lr")
        if isinstance(rate, Schedule) and not isinstance(rate, Constant) and rate.bounds()[1] >= 1:
            raise UserError(
                f"optimizer.lr would reach {rate.bounds()[1]:g}, the schedule's own default: say where it starts and "
                "stops, for example optimizer.lr.start=1e-3 optimizer.lr.stop=0."
            )
    return ScheduledOptimizer(kind, parameters, arguments)


def _mean_and_spread(images: Split) -> tuple[Tensor, float]:
    """Mean of some images, and root mean squared distance from it, for which a thousand images are enough."""
    mean = images.mean()
    some = torch.linspace(0, len(images) - 1, min(1000, len(images))).long()
    return mean.cpu(), float((images.batch(some) - mean).square().mean().sqrt())
