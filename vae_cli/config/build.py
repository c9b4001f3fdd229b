"""Check a configuration and build everything that a training run needs."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae_cli.axes.dataset import Dataset, Split, Splits
from vae_cli.axes.likelihood import Likelihood
from vae_cli.axes.network import Network, initialize
from vae_cli.axes.optimizer import Apart, ScheduledOptimizer
from vae_cli.axes.prior import Prior
from vae_cli.axes.regularizer import Regularizer
from vae_cli.axes.schedule import Constant, Schedule, Steps
from vae_cli.axes.sigma import Sigma
from vae_cli.config.instantiate import brief, build, built_arguments, check_value, find_class
from vae_cli.config.settings import Config, check_settings, code_shape, code_size
from vae_cli.core.compatibility import check_together, offers
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.garbage import collect_as_usual
from vae_cli.core.rng import initial_weights
from vae_cli.core.values import NonNegative
from vae_cli.machine import distributed
from vae_cli.machine.device import (
    allow_tf32,
    check_precision,
    find_device,
    find_threads,
    make_deterministic,
    take_device,
)
from vae_cli.machine.memory import COPIES, free_memory, memory_of, refuse_oversize, size_of, training_memory
from vae_cli.model.loss import Loss, Terms, loss_and_terms
from vae_cli.model.spectral import normalize_layers
from vae_cli.model.vae import VAE

NO_VALIDATION = (
    "patience needs validation images, and none are held out: leave it out, or hold some out with "
    "dataset.validation=..."
)
MODELS_PER_CACHE = 4  # compiled before torch's cache is emptied: it refuses a ninth structure, and one may take two
QUICK_TO_BUILD = 1 << 26  # bytes of weights plus pixels: a smaller model takes little time to build and apply

log = logging.getLogger(__name__)
_compiled = itertools.count(1)


@dataclass
class Experiment:
    """Everything that a training run needs, built and checked.

    config is a plain dict without references; its key `choices` maps each axis to its choice. compiled_loss is the loss
    of a whole batch as one compiled function; None unless compile=true and a single process trains.
    """

    config: Config
    device: torch.device
    splits: Splits
    model: VAE
    regularizer: Regularizer
    optimizer: ScheduledOptimizer
    compiled_loss: Loss | None = None


def build_experiment(config: Config) -> Experiment:
    """Check a configuration and build its experiment. Raises UserError, or Failure if the data are missing."""
    check_settings(config)
    collect_as_usual()  # before anything of the run exists, so that all of it can be collected when the run ends
    flush_denormals()
    device = take_device(config["device"])
    check_precision(config["precision"], device)
    dataset = build(config["dataset"], "dataset", Dataset)
    check_memory(config, dataset.shape, free_memory(device))
    parts = build_parts(config, dataset)
    make_deterministic(device)
    if device.type == "cuda" and distributed.count() > 1:
        torch.cuda.set_device(device)  # NCCL sends through the current device
    splits = dataset.load().to(device)
    if config["patience"] is not None and len(splits.validation) == 0:
        raise UserError(NO_VALIDATION)
    if len(splits.train) == 0:
        raise UserError("No images are left to train on; hold out fewer with dataset.validation.")
    model = assemble(parts, config, dataset.shape, *_mean_and_spread(splits.train))
    regularizer: Regularizer = parts["regularizer"]
    regularizer.start(len(splits.train))
    if distributed.count() > 1:
        _check_processes(config, device, model, regularizer)
    torch.set_num_threads(find_threads(config, nn.ModuleList([model, regularizer])))
    model.to(device)
    regularizer.to(device)
    if device.type == "cuda":
        allow_tf32(config["precision"] == "tf32")
        model.to(memory_format=torch.channels_last)  # the layout in which cuDNN's convolutions are fastest
    compiled_loss = None
    if config["compile"]:
        batch_size = math.ceil(config["batch_size"] / distributed.count())
        compiled_loss = compile_loss(model, regularizer, splits.train, batch_size)
    optimizer = build_optimizer(config["optimizer"], model, regularizer)
    return Experiment(config, device, splits, model, regularizer, optimizer, compiled_loss)


def _check_processes(config: Config, device: torch.device, model: VAE, regularizer: Regularizer) -> None:
    """Raise UserError for what several processes cannot do."""
    if config["on_divergence"] == "restart":
        raise UserError(
            "on_divergence=restart works only in a single process. Leave it out; if the loss diverges, lower "
            "optimizer.lr."
        )
    if distributed.has_batch_norm(model) and device.type != "cuda":
        raise UserError(
            "Batch normalization over the images of several processes needs GPUs; type network.normalization=group."
        )
    if distributed.has_batch_norm(model) and regularizer.differentiates:
        raise UserError(
            "Batch normalization over the images of several processes has no second derivative, which this regularizer "
            "needs; type network.normalization=group."
        )


def flush_denormals() -> None:
    """Treat denormal numbers as 0: they accumulate in Adam's state, and can make a step 1.5 times as slow.

    This must be set before anything is computed, because threads inherit the setting when they are created.
    """
    torch.set_flush_denormal(True)


def compile_loss(model: VAE, regularizer: Regularizer, images: Split, batch_size: int) -> Loss | None:
    """Compile the loss of a batch, which makes later steps faster. Raises Failure if it cannot be compiled.

    Returns the loss as one compiled function of the images; it draws the same random numbers as the uncompiled one. If
    several processes train the run, or torch's compiler fails on the whole loss, only encoder and decoder are compiled,
    in place, and None is returned. If the regularizer differentiates the decoder, only the encoder is compiled, since
    compiled functions have no second derivatives.

    torch compiles a function when it is first called, for the given batch size, so one batch is passed forward and
    backward. This also changes running statistics and the likelihood's scale, so they are restored afterwards.
    """

    def loss(x: Tensor) -> tuple[Tensor, Terms]:
        return loss_and_terms(model, regularizer, x, regularizer.samples)

    if next(_compiled) % MODELS_PER_CACHE == 0:
        torch.compiler.reset()
    states = [deepcopy(module.state_dict()) for module in (model, regularizer)]
    x, compiled, failure = images.batch(torch.arange(min(batch_size, len(images)))), None, None
    if regularizer.differentiates:
        log.warning("Only the encoder is compiled, because the penalty needs second derivatives of the decoder.")
    elif distributed.count() == 1:
        compiled = torch.compile(loss, dynamic=False, options={"fallback_random": True})
        failure = _failure_of(compiled, x)
    if compiled is None or failure is not None:
        compiled = None
        model.encoder.compile()
        if not regularizer.differentiates:
            model.decoder.compile()
        if (error := _failure_of(loss, x)) is not None:
            raise Failure(f"The loss cannot be compiled here ({first_line(error)}); leave out compile=true.") from error
        if failure is not None:
            log.warning("Only encoder and decoder are compiled, because the loss cannot be: %s", first_line(failure))
    for module, state in zip((model, regularizer), states, strict=True):
        module.load_state_dict(state)
        for parameter in module.parameters():
            parameter.grad = None
    return compiled


def _failure_of(loss: Loss, x: Tensor) -> Exception | None:
    """Pass images x forward and backward, and return what the compiler raised, if it failed."""
    try:
        loss(x)[0].backward()
    except Exception as error:  # compilers fail in many ways; most often none is installed
        return error
    return None


def check_config(config: Config) -> VAE:
    """Check a configuration without loading its data, and return its model, built for images of mean 0. Raises
    UserError."""
    check_settings(config)
    flush_denormals()
    device = find_device(config["device"])
    check_precision(config["precision"], device)
    dataset = build(config["dataset"], "dataset", Dataset)
    dataset.check()
    if config["patience"] is not None and config["dataset"].get("validation") == 0:
        raise UserError(NO_VALIDATION)
    check_memory(config, dataset.shape, memory_of(device))
    parts = build_parts(config, dataset)
    model = assemble(parts, config, dataset.shape, torch.zeros(dataset.shape), 1.0)
    build_optimizer(config["optimizer"], model, parts["regularizer"])
    return model


def build_parts(config: Config, dataset: Any = None) -> dict[str, Any]:
    """Build the parts of all axes except the optimizer.

    Raises UserError if a part cannot be built or, given the dataset, if the parts cannot be combined.
    """
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
            parts[axis] = build(_sized(config[axis], config["latent"]), axis, kind)
    if dataset is not None:
        check_together({**parts, "dataset": dataset}, config["choices"])
        if config["batch_size"] < (least := parts["regularizer"].least_images):
            raise UserError(
                f"regularizer={config['choices']['regularizer']} compares the codes of the images in a batch, so "
                f"batch_size={config['batch_size']} is not allowed; type batch_size={least} or more."
            )
    return parts


def _sized(node: Config, latent: Any) -> Config:
    """Return an axis's node in which the run's `latent`, if the node repeats it, is D: only networks know the shape."""
    return {**node, "latent": code_size(latent)} if node.get("latent") == latent else node


def _code(config: Config, network: Network) -> Any:
    """Return the network's argument `latent`: the shape (C, h, w) of a code with positions, else D.

    Raises UserError if the code has positions and the network has none.
    """
    size, shape = code_size(config["latent"]), code_shape(config["latent"])
    if shape is not None and not offers(network, "positions"):
        raise UserError(
            f"network={config['choices']['network']} cannot be combined with latent={brief(config['latent'])}: its "
            f"codes have no positions. Type latent={size}, or network=conv."
        )
    return size if shape is None else shape


def check_memory(config: Config, shape: tuple[int, int, int], available: int | None) -> None:
    """Raise UserError if training the model needs more than `available` bytes; the check itself allocates little."""
    plain = {**config, "precision": "float32"}
    try:
        with torch.device("meta"):  # tensors on this device have a shape but no values
            regularizer: Regularizer = build_parts(plain)["regularizer"]
            model = build_model(plain, shape)
        if _is_quick(model, shape):
            model = build_model(plain, shape)  # computing on `meta` imports modules, which takes longer than this
        images = math.ceil(config["batch_size"] / distributed.count())
        needed = training_memory(model, shape, images, regularizer.samples) + COPIES * size_of(regularizer)
    except (RuntimeError, NotImplementedError):
        return  # a user's own class may need the values of its tensors; its memory is not checked
    refuse_oversize(
        needed,
        f"network={config['choices']['network']} with prior={config['choices']['prior']}, latent={config['latent']} "
        f"and batch_size={config['batch_size']}",
        "give smaller numbers",
        available,
    )


def _is_quick(model: VAE, shape: tuple[int, int, int]) -> bool:
    """Return whether it takes little time to build a model and to pass two images through it."""
    convolves, has_pseudo_inputs = (
        any(parameter.dim() == 4 for parameter in part.parameters()) for part in (model.encoder, model.prior)
    )
    is_small = size_of(model) + math.prod(shape) <= QUICK_TO_BUILD
    return is_small and not (convolves and has_pseudo_inputs)  # which all pass through the encoder


def build_model(config: Config, shape: tuple[int, int, int]) -> VAE:
    """Build the model of a run with its initial weights; the caller can then load trained weights."""
    # The mean is on the CPU even if the model is built on `meta`: there, averaging it imports modules that load slowly.
    return assemble(build_parts(config), config, shape, torch.zeros(shape, device="cpu"), 1.0)


def assemble(parts: Mapping[str, Any], config: Config, shape: tuple[int, int, int], mean: Tensor, spread: float) -> VAE:
    """Put a model together from its parts, for images of this shape, mean and spread (see Likelihood.start).

    Encoder and decoder draw their initial weights from separate random streams, so that runs with the same seed start
    from the same decoder and the same loc(x), whatever sigma is.
    """
    network, sigma, likelihood = parts["network"], parts["sigma"], parts["likelihood"]
    latent = _code(config, network)
    with initial_weights(config["seed"], "encoder"):
        encoder = network.encoder(shape, latent, sigma.raw_size)
    with initial_weights(config["seed"], "encoder"):  # again from the start: loc(x) is the same for every sigma
        initialize(network.initialization, encoder, sigma.raw_size)
    center = mean
    if not network.bias_per_pixel:
        mean = mean.mean((1, 2), keepdim=True).expand_as(mean)
    start = likelihood.start(mean, spread)
    if network.output_bias == "zero":
        start = torch.zeros_like(start)
    with initial_weights(config["seed"], "decoder"):
        decoder = network.decoder(latent, start)
        initialize(network.initialization, decoder, has_own_bias=True)
        if network.spectral_norm:
            normalize_layers(decoder)
    model = VAE(encoder, sigma, decoder, likelihood, parts["prior"], config["precision"])
    parts["prior"].start(model.encode, center, spread)
    return model


def build_optimizer(node: Config, model: VAE, regularizer: Regularizer) -> ScheduledOptimizer:
    """Build the optimizer that a node of the configuration names. Raises UserError.

    Weight decay is left out for sigma, the prior and the likelihood: it would pull their scales towards 1. The decoder
    may have a weight decay of its own, and the regularizer's parameters have the arguments that it asks for.
    """
    arguments = built_arguments(node, "optimizer")
    of_decoder = arguments.pop("decoder_weight_decay", None)
    kind = find_class(node["_target_"], "optimizer", Optimizer)
    hints = get_type_hints(kind.__init__)
    for key, value in arguments.items():
        if key != "lr":  # torch's hint also allows tensors, which a file cannot contain
            check_value(value, hints.get(key, Any), f"optimizer.{key}")
    if "betas" in arguments and len(arguments["betas"]) != 2:
        raise UserError(f"optimizer.betas={arguments['betas']} is not allowed: give two numbers, such as [0.9,0.999].")
    _check_rate(arguments, "optimizer.lr")
    _check_rate(regularizer.optimizer, "regularizer.lr")
    known = inspect.signature(kind).parameters
    if "betas" in regularizer.optimizer and "betas" not in known:
        raise UserError(
            f"regularizer.betas cannot be used with {kind.__name__}, which has no betas: type regularizer.betas=null, "
            "or optimizer=adam."
        )
    undecayed = [p for part in (model.sigma, model.prior, model.likelihood) for p in part.parameters()]
    apart: list[Apart] = [(undecayed, {"weight_decay": 0.0}), (regularizer.parameters(), regularizer.optimizer)]
    if of_decoder is not None:
        check_value(of_decoder, NonNegative, "optimizer.decoder_weight_decay")
        if "weight_decay" not in known:
            raise UserError(
                f"optimizer.decoder_weight_decay cannot be used with {kind.__name__}: it has no weight_decay."
            )
        apart.append((model.decoder.parameters(), {"weight_decay": of_decoder}))
    return ScheduledOptimizer(kind, [*model.parameters(), *regularizer.parameters()], arguments, apart)


def _check_rate(arguments: Mapping[str, Any], path: str) -> None:
    """Raise UserError if arguments["lr"] is not a learning rate: a number of at least 0, or a schedule below 1."""
    rate = arguments.get("lr", 0.0)
    check_value(rate, NonNegative | Schedule, path)
    if isinstance(rate, Schedule) and not isinstance(rate, Constant) and rate.bounds()[1] >= 1:
        smaller = f"{path}.values=[1e-3,1e-4]" if isinstance(rate, Steps) else f"{path}.start=1e-3 {path}.stop=0"
        raise UserError(
            f"{path} would reach {rate.bounds()[1]:g}, which is too large for a learning rate; type smaller values, "
            f"for example {smaller}."
        )


def _mean_and_spread(images: Split) -> tuple[Tensor, float]:
    """Return the mean image (C, H, W), and the root-mean-square deviation of pixels from it in up to 1000 images."""
    mean = images.mean()
    some = torch.linspace(0, len(images) - 1, min(1000, len(images))).long()
    return mean.cpu(), float((images.batch(some) - mean).square().mean().sqrt())
