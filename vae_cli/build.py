"""From a configuration to objects: only classes that are allowed, only values that their constructors take."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vae_cli import catalog, processes
from vae_cli.check import Count, Interval, Natural, NonNegative, Positive, describe, is_allowed
from vae_cli.dataset import Dataset, Split, Splits
from vae_cli.errors import Failure, UserError, first_line, nearest
from vae_cli.launch import launched
from vae_cli.likelihood import Likelihood
from vae_cli.machine import cores, free_gpu
from vae_cli.memory import refuse_oversize, training_memory
from vae_cli.model import VAE
from vae_cli.naming import AXES
from vae_cli.network import Network
from vae_cli.objective import check_objective
from vae_cli.optimizer import ScheduledOptimizer
from vae_cli.part import check_together
from vae_cli.prior import Prior
from vae_cli.regularizer import Regularizer
from vae_cli.schedule import Constant, Schedule
from vae_cli.sigma import Sigma

Config = dict[str, Any]
THREADS = torch.get_num_threads()  # before any run of a sweep has asked for its own number
SMALL = 40_000_000  # products of weights and activations in one pass of a batch
ALLOWED = (*(f"vae_cli.{axis}" for axis in (*AXES, "schedule", "metric")), "torch.optim")

SETTINGS: dict[str, Any] = {
    "latent": Annotated[int, Interval(1, 100_000)],
    "epochs": Count,
    "batch_size": Count,
    "seed": Natural,
    "max_grad_norm": Positive | None,
    "on_divergence": Literal["stop", "restart"],
    "restarts": Count,
    "precision": Literal["float32", "tf32", "bfloat16"],
    "compile": bool,
    "device": str,
    "threads": Annotated[int, Interval(1, 1024)] | Literal["auto"],
    "data_dir": str | None,
    "runs_dir": str,
    "run_name": str | None,
    "overwrite": bool,
    "log_every": Count,
    "checkpoint_minutes": Positive,
    "objective": str,
}


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
    # Adam's state fills with denormal numbers, which slow a step by half; later threads inherit what is set here.
    torch.set_flush_denormal(True)
    device = find_device(config["device"])
    check_precision(config["precision"], device)
    if config["device"] == "auto" and device.type == "cuda" and processes.count() == 1:
        device = torch.device("cuda", free_gpu(torch.cuda.device_count()))
    dataset = build(config["dataset"], "dataset", Dataset)
    parts = build_parts(config, dataset)
    check_memory(config, dataset.shape, device)
    if device.type == "cuda" and processes.count() > 1:
        torch.cuda.set_device(device)  # what the processes send each other goes through it
    splits = dataset.load().to(device)
    if len(splits.train) == 0:
        raise UserError("There is no image left to train on; hold out fewer with dataset.validation.")
    model = assemble(parts, config, dataset.shape, *_mean_and_spread(splits.train))
    regularizer: Regularizer = parts["regularizer"]
    if processes.count() > 1 and config["on_divergence"] == "restart":
        raise UserError("on_divergence=restart is for one process: leave it out, and type the command again by hand.")
    if processes.count() > 1 and device.type != "cuda" and processes.has_batch_norm(model):
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
    """Raise UserError where the model cannot fit into memory, before it takes any."""
    try:
        with torch.device("meta"):  # where tensors have a shape and no content
            model = build_model({**config, "precision": "float32"}, shape)
            needed = training_memory(model, torch.zeros(math.ceil(config["batch_size"] / processes.count()), *shape))
    except (RuntimeError, NotImplementedError):
        return  # a part of the user's own may ask for real numbers, and is not checked
    refuse_oversize(
        needed,
        f"network={config['choices']['network']} with latent={config['latent']} and batch_size={config['batch_size']}",
        "give smaller numbers",
        device,
    )


def check_stored(config: Config, weights: Mapping[str, tuple[int, ...]], shape: tuple[int, int, int]) -> None:
    """Check the configuration of a stored run, and that the model that it describes has weights of these shapes, before
    that model takes any memory. Raises UserError, or ValueError where the weights are others."""
    for key, kind in SETTINGS.items():
        if key in config:
            _check_value(config[key], kind, key)
    check_latent(config)
    try:
        with torch.device("meta"):
            model = build_model({**config, "precision": "float32"}, shape)
    except (RuntimeError, NotImplementedError):
        return  # a part of the user's own may ask for real numbers
    described = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in {**described, **weights}:
        if described.get(name) != weights.get(name):
            there, here = (str(sizes.get(name, "missing")) for sizes in (weights, described))
            raise ValueError(f"{name} is {there} there and {here} here")


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
    arguments = _arguments(node, "optimizer")
    kind = find_class(node["_target_"], "optimizer", Optimizer)
    hints = get_type_hints(kind.__init__)
    for key, value in arguments.items():
        if key != "lr":  # torch itself takes tensors too, which no file can hold
            _check_value(value, hints.get(key, Any), f"optimizer.{key}")
    if "betas" in arguments and len(arguments["betas"]) != 2:
        raise UserError(f"optimizer.betas={arguments['betas']} is not allowed: it takes two, as [0.9,0.999].")
    if "lr" in arguments:
        rate = arguments["lr"]
        _check_value(rate, NonNegative | Schedule, "optimizer.lr")
        if isinstance(rate, Schedule) and not isinstance(rate, Constant) and rate.bounds()[1] >= 1:
            raise UserError(
                f"optimizer.lr would reach {rate.bounds()[1]:g}, the schedule's own default: say where it starts and "
                "stops, for example optimizer.lr.start=1e-3 optimizer.lr.stop=0."
            )
    return ScheduledOptimizer(kind, parameters, arguments)


def build(node: Mapping[str, Any], path: str, kind: type) -> Any:
    """Build the object that a node names by `_target_`, from its other keys, after they are checked against the types
    in the constructor's signature. Raises UserError, with the full key in it."""
    if "_target_" not in node:
        raise UserError(f"{path}._target_ is missing: it names the class that {path} is.")
    target = find_class(node["_target_"], path, kind)
    arguments = _arguments(node, path)
    # A class without a constructor of its own has nn.Module's *args and **kwargs, which are no settings.
    parameters = {
        name: p
        for name, p in inspect.signature(target).parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    hints = get_type_hints(target.__init__, include_extras=True)
    for key, value in arguments.items():
        if key not in parameters:
            allowed = f"Allowed are {', '.join(parameters)}." if parameters else f"{target.__name__} takes no settings."
            raise UserError(
                f"{path}.{key} is not a setting.{nearest(key, parameters)} {allowed}{_elsewhere(path, key)}"
            )
        _check_value(value, hints.get(key, Any), f"{path}.{key}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{path}.{missing[0]} is missing; type {path}.{missing[0]}=...")
    return target(**arguments)


def _elsewhere(axis: str, key: str) -> str:
    """Name another choice of an axis that has this setting."""
    choices = catalog.groups()[axis].choices.values() if axis in catalog.defaults() else ()
    return next((f" {axis}={choice.name} has it." for choice in choices if key in choice.settings), "")


def _arguments(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {
        key: build(value, f"{path}.{key}", Schedule) if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in node.items()
        if key != "_target_"
    }


def _check_value(value: Any, kind: Any, path: str) -> None:
    if not is_allowed(value, kind):
        raise UserError(f"{path}={_shown(value)} is not allowed: it has to be {describe(kind)}.")
    if isinstance(value, Schedule):
        for bound in (metadata for option in get_args(kind) for metadata in get_args(option)[1:]):
            if isinstance(bound, Interval) and not all(bound.holds(number) for number in value.bounds()):
                low, high = value.bounds()
                raise UserError(f"{path} goes from {low:g} to {high:g}, and has to be {bound} all the time.")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(a schedule)" if "_target_" in value else "(several settings)"
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def find_class(target: str, path: str, kind: type) -> Any:
    """Import the class that `_target_` names, where it is allowed: those of this package's axes, of torch.optim, and of
    modules that the user trusts by name. Raises UserError."""
    if not isinstance(target, str):
        raise UserError(f"{path}._target_={_shown(target)} is not the name of a class; leave it out.")
    module_name, _, name = target.rpartition(".")
    allowed = (*ALLOWED, *trusted())
    if not _is_within(module_name, allowed):
        top = module_name.partition(".")[0] or target
        raise UserError(
            f"{path}._target_={target} is code from outside the axes of vae and torch.optim, and is not run unless you "
            f"say so: if you trust it, add --trust {top} (or set VAE_TRUST={top})."
        )
    if trusted() and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module lies where the user stands
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}._target_={target} is not there: no module is named '{error.name}'.") from error
    found = getattr(module, name, None)
    if found is None:
        raise UserError(f"{path}._target_={target} is not there.{nearest(name, vars(module))}")
    if not (isinstance(found, type) and issubclass(found, kind) and _is_within(found.__module__, allowed)):
        raise UserError(f"{path}._target_={target} cannot be used as {path}: it is not a {kind.__name__}.")
    if found is kind or inspect.isabstract(found):
        raise UserError(f"{path}._target_={target} is what all choices of {path} have in common, and none itself.")
    return found


def trusted() -> tuple[str, ...]:
    """The modules whose code the user has allowed, from VAE_TRUST, which --trust sets; worker processes inherit it."""
    return tuple(name for name in os.environ.get("VAE_TRUST", "").replace(",", " ").split() if name)


def _is_within(module: str, prefixes: Iterable[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def check_settings(config: Config) -> None:
    """Check the settings that every run has. Raises UserError."""
    for key, kind in SETTINGS.items():
        if key not in config:
            raise UserError(f"{key} is missing; type {key}=...")
        _check_value(config[key], kind, key)
    check_objective(config["objective"])
    check_latent(config)
    if config["batch_size"] < processes.count():
        raise UserError(
            f"batch_size={config['batch_size']} is less than an image for each of {processes.count()} processes; type "
            f"batch_size={processes.count()} or more, or start fewer processes."
        )
    for axis in AXES:
        if not isinstance(config.get(axis), Mapping) or "_target_" not in config[axis]:
            chosen = config.get("choices", {}).get(axis)
            reason = f"{axis}={chosen} names no class: its file needs a _target_" if chosen else "it is missing"
            raise UserError(f"{axis}: {reason}; type another {axis}=...")
    allowed = [*SETTINGS, *AXES, "choices"]
    for key in config:
        if key not in allowed:
            raise UserError(f"{key} is not a setting.{nearest(key, allowed)} Allowed are {', '.join(allowed[:-1])}.")


def check_latent(config: Config) -> None:
    """Raise UserError where an axis is told another number of dimensions than the code has."""
    for axis in AXES:
        told = config[axis].get("latent", config["latent"]) if isinstance(config.get(axis), Mapping) else None
        if told is not None and told != config["latent"]:
            raise UserError(
                f"{axis}.latent={_shown(told)} is not allowed: the code has latent={config['latent']} dimensions. "
                f"Leave it out, or type latent={_shown(told)}."
            )


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError for a precision that the device does not have."""
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"precision=tf32 is for CUDA GPUs, and this is {device.type}; type precision=float32.")


def find_device(name: str) -> torch.device:
    """The device of this name; `auto` takes a GPU where there is one, and of several processes each takes its own.

    Raises UserError where it is not there.
    """
    if processes.count() > 1:
        return _find_own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device; type device=auto, cpu, cuda, cuda:1 or mps.") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": _has_mps()}.get(device.type, False)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not there or (device.index or 0) >= count:
        raise UserError(f"device={name} is not on this machine; type device=auto or device=cpu.")
    return device


def _find_own_device(name: str) -> torch.device:
    """The device of this process, one of several."""
    there, launch = torch.cuda.device_count(), launched()
    if name == "cpu" or (name == "auto" and there == 0):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UserError(
            f"device={name} is one device, and there are {launch.count} processes, each of which takes one of its own: "
            "type device=auto, cuda or cpu."
        )
    if there == 0:
        raise UserError(f"device={name} is not on this machine; type device=auto or device=cpu.")
    if launch.local_count > there:
        raise UserError(
            f"There are {launch.local_count} processes on this machine and {there} GPU{'s' * (there > 1)}: type "
            f"--nproc-per-node {there}, or device=cpu."
        )
    return torch.device("cuda", launch.local_rank)


def find_threads(config: Config, model: nn.Module) -> int:
    """How many threads share an operation on the CPU.

    A step of a small fully connected network is so short that a second thread gains a tenth, and loses all of it and
    much more whenever another program takes its core and the first one waits.
    """
    if config["threads"] != "auto":
        return int(config["threads"])
    is_dense = all(weight.dim() <= 2 for weight in model.parameters())
    products = config["batch_size"] // processes.count() * sum(weight.numel() for weight in model.parameters())
    if is_dense and products < SMALL:
        return 1
    if processes.count() == 1:
        return THREADS
    return max(1, cores() // launched().local_count)  # torchrun has left one to each process


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def stream(seed: int, *names: object) -> int:
    """A seed for one purpose, the same on every machine, and unlike that for any other purpose."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *names)).encode(), digest_size=7).digest())


@contextmanager
def initial_weights(seed: int, part: str) -> Iterator[None]:
    """Draw the initial weights of a part from a stream of its own, and leave the global one alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, part))
        yield


def fingerprint(splits: Splits) -> str:
    """Tells whether splits are the same as they were: which images they hold, how many, and what some of them show."""
    digest = hashlib.blake2b(digest_size=16)
    for split in (splits.train, splits.validation, splits.test):
        digest.update(split.index.cpu().numpy().tobytes())
        some = split.index[:: max(1, len(split) // 16)]
        digest.update(split.images[some.to(split.images.device)].cpu().numpy().tobytes())
    return digest.hexdigest()


def _mean_and_spread(images: Split) -> tuple[Tensor, float]:
    """Mean of some images, and root mean squared distance from it, for which a thousand images are enough."""
    mean = images.mean()
    some = torch.linspace(0, len(images) - 1, min(1000, len(images))).long()
    return mean.cpu(), float((images.batch(some) - mean).square().mean().sqrt())
