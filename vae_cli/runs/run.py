"""A trained run in Python: load it, encode and decode images, draw samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from vae_cli.axes.dataset import Dataset, Splits
from vae_cli.axes.dataset.pack import only_reading
from vae_cli.axes.dataset.split import is_fingerprint_of
from vae_cli.config import catalog
from vae_cli.config.build import build_model
from vae_cli.config.instantiate import build
from vae_cli.config.naming import as_word, show
from vae_cli.config.settings import SETTINGS, Config, check_latent, check_setting, code_shape, code_size
from vae_cli.config.trust import trusting
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.rng import evaluating
from vae_cli.machine.device import make_deterministic, take_device
from vae_cli.model.vae import VAE
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.find import find_run
from vae_cli.runs.folder import RETRAIN, RunDir

IN_REPR = ("distortion", "rate", "elbo", "loss")  # the test figures that repr() shows


def load_run(
    run: str | Path = "latest",
    weights: Literal["best", "last"] = "best",
    device: str = "auto",
    runs_dir: str | Path = "runs",
    data_dir: str | Path | None = None,
    trust: str | Sequence[str] = (),
) -> Run:
    """Load a trained run.

    run       its folder, a part of its name that is unique in runs_dir, or `latest` (the most recently trained run)
    weights   `best`: the weights with the lowest validation loss; `last`: those of the newest checkpoint. If no images
              are held out for validation, `best` means `last`
    device    `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` or `mps`
    runs_dir  the folder to search for a run of this name
    data_dir  the folder of the datasets, if it differs from the one used in training
    trust     the names of your own modules, such as ["mine"], whose classes this run may use; like --trust on the
              command line, but for this run only

    Raises UserError if no run or more than one matches, Failure if the run's files are damaged.

    >>> run = load_run("runs/digits/sigma-fixed", device="cpu")
    >>> run.sample(16).shape
    torch.Size([16, 1, 8, 8])
    """
    return Run(find_run(str(run), Path(runs_dir)), weights, device, data_dir, trust)


class Run:
    """A trained run: its model, its images and its configuration. Load it with `load_run`.

    config  the settings it was trained with, as in config.yaml: config["latent"], config["sigma"]["value"]
    device  the device of the model
    model   the VAE, a torch.nn.Module in evaluation mode
    path    the folder of the run
    shape   (C, H, W) of an image
    step    the number of training steps after which the loaded weights were saved
    """

    def __init__(
        self,
        path: str | Path,
        weights: Literal["best", "last"] = "best",
        device: str = "auto",
        data_dir: str | Path | None = None,
        trust: str | Sequence[str] = (),
    ) -> None:
        """Load the run in the folder `path`. For the other arguments and the errors, see `load_run`."""
        if weights not in ("best", "last"):
            raise UserError(f"weights={weights!r} is not allowed: type weights='best' or weights='last'.")
        self.folder = RunDir(Path(path))
        self.config: Config = self.folder.config()
        self._trust = (trust,) if isinstance(trust, str) else tuple(trust)
        self._reading = redirect_data(self.config, data_dir)
        self.device = take_device(device)
        make_deterministic(self.device)
        self.weights_file = self.folder.weights_file(weights)
        if weights == "best" and self.weights_file != self.folder.best_file and self.folder.summary().get("validation"):
            raise Failure(
                f"{self.folder.best_file} is missing. To load the newest weights instead, type --weights last "
                "(in Python: weights='last')."
            )
        state = load_checkpoint(self.weights_file, self.device)
        self.step: int = state["step"]
        self._images: str | None = state.get("images")
        self.shape: tuple[int, int, int] = tuple(state["shape"])
        shapes = {name: tuple(tensor.shape) for name, tensor in state["model"].items()}
        try:
            with trusting(self._trust):
                check_stored(self.config, shapes, self.shape)
                self.model: VAE = build_model(self.config, self.shape)
            self.model.load_state_dict(state["model"])
            if not all(bool(weight.isfinite().all()) for weight in self.model.parameters()):
                raise ValueError("some weights are not finite")
        except (RuntimeError, ValueError) as error:
            raise Failure(
                f"{self.weights_file} does not match {self.folder.config_file}: {first_line(error)}. {RETRAIN}"
            ) from error
        self.model.to(self.device).eval()

    def __repr__(self) -> str:
        """Describe the run in a few lines: choices, dataset, weights, test figures, device. Never raises."""
        try:
            return "\n".join([f"Run {self.path}", *(f"  {name:<9}{text}" for name, text in self._described().items())])
        except Exception:  # a debugger may show a run whose constructor failed, and files may be missing or damaged
            return f"<{type(self).__name__}>"

    @property
    def latent(self) -> int:
        """The number of latent dimensions D.

        >>> load_run("sigma-fixed").latent
        16
        """
        return code_size(self.config["latent"])

    @property
    def path(self) -> Path:
        """The folder of the run.

        >>> load_run("sigma-fixed").path.as_posix()
        'runs/digits/sigma-fixed'
        """
        return self.folder.path

    @cached_property
    def splits(self) -> Splits:
        """The images of the run: `splits.train`, `splits.validation` and `splits.test`, loaded on first use.

        For each split, `len(split)` is its number of images, `split.batch(positions)` returns images (B, C, H, W),
        float32 in [0, 1], and `split.batch_labels(positions)` returns labels (B,), int64, if the dataset has labels.
        `splits.classes` is a tuple of class names, or None. If factors of variation are known, `splits.factors`
        describes them, and `split.batch_factors(positions)` returns their values (B, F).

        Raises UserError or Failure if the dataset cannot be loaded, and UserError if its images have changed since
        the run was trained.

        >>> run = load_run("sigma-fixed")
        >>> run.splits.test.batch(torch.arange(8)).shape
        torch.Size([8, 1, 8, 8])
        """
        with trusting(self._trust), self._reading():
            splits: Splits = build(self.config["dataset"], "dataset", Dataset).load()
        if self._images is not None and not is_fingerprint_of(self._images, splits):
            raise UserError(
                f"The images of {self.path} have changed since it was trained, so its test set may now contain images "
                "that it was trained on. Train a new run on the new images."
            )
        return splits

    def images(self, x: Tensor) -> Tensor:
        """Convert images to the model's input: float32 on the model's device, with 8-bit values divided by 255.

        x is (..., C, H, W), uint8 or floats in [0, 1]. Raises UserError if the shape does not match the run's images.

        >>> run = load_run("sigma-fixed", device="cpu")
        >>> run.images(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)).max()
        tensor(1.)
        """
        x = torch.as_tensor(x)
        if x.shape[-3:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise UserError(f"Images of shape {tuple(x.shape)} do not match this run: pass a batch (B, {wanted}).")
        scaled = x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x.to(torch.float32)
        return scaled.to(self.device)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Distribution:
        """Return the posterior q(z|x) of each image in x (B, C, H, W), uint8 or floats in [0, 1].

        The result is a torch Distribution with batch shape (B,) and event shape (D,), where D = latent: `.mean` is its
        mean, usually loc(x), `.stddev` is sigma (0 for sigma=deterministic), `.sample()` draws codes (B, D). If latent
        is a shape [C, h, w], then D = C h w, and `.mean.unflatten(-1, run.config["latent"])` has shape (B, C, h, w).

        Raises UserError for images of a different shape.

        >>> run = load_run("sigma-fixed")
        >>> x = run.splits.test.batch(torch.arange(8))
        >>> run.encode(x).mean.shape
        torch.Size([8, 16])
        """
        x = self.images(x)
        if x.dim() != 4:
            hint = "; for a single image, pass x[None]" if x.dim() == 3 else ""
            raise UserError(f"encode expects a batch of images (B, C, H, W), not {tuple(x.shape)}{hint}.")
        return self.model.encode(self.model.likelihood.observe(x))  # type: ignore[operator]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Distribution:
        """Return the likelihood p(x|z) for each code in z (*S, B, D), where D = latent.

        If latent is a shape [C, h, w], then D = C h w, and z can also be (*S, B, C, h, w).

        The result is a torch Distribution with batch shape (*S, B) and event shape (C, H, W): `.mean` is the
        reconstruction, `.sample()` draws images with the likelihood's noise.

        Raises UserError for codes of a different size.

        >>> run = load_run("sigma-fixed")
        >>> run.decode(torch.zeros(3, 16)).mean.shape
        torch.Size([3, 1, 8, 8])
        """
        z, size, shape = torch.as_tensor(z), code_size(self.config["latent"]), code_shape(self.config["latent"])
        if shape is not None and z.dim() > 3 and z.shape[-3:] == shape:
            z = z.flatten(-3)
        if z.dim() < 2 or z.shape[-1] != size:
            hint = "; for a single code, pass z[None]" if z.shape in ((size,), shape) else ""
            wanted = f"(B, {size})" + ("" if shape is None else f" or (B, {', '.join(map(str, shape))})")
            raise UserError(f"decode expects a batch of codes {wanted}, not {tuple(z.shape)}{hint}.")
        return self.model.decode(z.to(self.device, torch.float32))

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw n codes from the prior and return their mean images (n, C, H, W).

        The same seed draws the same codes. Raises UserError for a negative n.

        >>> load_run("sigma-fixed").sample(16, seed=1).shape
        torch.Size([16, 1, 8, 8])
        """
        if n < 0:
            raise UserError(f"sample expects the number of images, 0 or more, not {n}.")
        with evaluating(self.model, seed, self.device):
            return self.decode(self.model.prior().sample((n,))).mean

    def _described(self) -> dict[str, str]:
        config = self.config
        size = " x ".join(map(str, self.shape))
        lines = {
            "choices": " ".join(_chosen(config)),
            "dataset": f"{config['choices']['dataset']}, images {size}",
            "latent": show(as_word("latent", config["latent"])),
            "weights": self._weights_described(),
        }
        try:
            test = self.folder.summary().get("test", {})
        except (UserError, OSError):
            test = {}
        if figures := [f"{name} {test[name]:.2f}" for name in IN_REPR if name in test]:
            measured = self.folder.weights_file("best")  # the weights that were tested at the end of training
            whose = "" if self.weights_file == measured else ", of the best weights"
            lines["test"] = f"{'  '.join(figures)}  (nats per image{whose})"
        return {**lines, "device": str(self.device)}

    def _weights_described(self) -> str:
        kind = "best" if self.weights_file == self.folder.best_file else "last"
        epochs = {record["step"]: record["epoch"] for record in self.folder.metrics()}
        epoch = f"epoch {epochs[self.step]} of {self.config['epochs']}, " if self.step in epochs else ""
        return f"{kind}: {epoch}step {self.step}"


def _chosen(config: Config) -> list[str]:
    """Return overrides for sigma and for every other choice, except the dataset, that differs from its default."""
    usual = catalog.defaults()
    words = [f"sigma={config['choices']['sigma']}"]
    value = config["sigma"].get("value")
    if isinstance(value, int | float):
        words.append(f"sigma.value={show(value)}")
    for group, choice in config["choices"].items():
        if group not in ("sigma", "dataset") and (group not in usual or choice != usual[group].default):
            words.append(f"{'+' * ('@' in group)}{group}={choice}")
    return words


def redirect_data(config: Config, data_dir: str | Path | None) -> Callable[[], AbstractContextManager[None]]:
    """Set the data folder in a stored configuration if data_dir is given, and return a context for loading images.

    If only the stored configuration names a data folder, the context lets vae read from that folder but not write to
    it, because the configuration may come from somebody else.
    """
    dataset = config["dataset"]
    if data_dir is not None:
        config["data_dir"] = str(data_dir)
        if "data_dir" in dataset:
            dataset["data_dir"] = str(data_dir)
    return nullcontext if data_dir is not None or dataset.get("data_dir") is None else only_reading


def check_stored(config: Config, weights: Mapping[str, tuple[int, ...]], shape: tuple[int, int, int]) -> None:
    """Check the configuration of a stored run, and check that its model has weights of these shapes.

    No memory is allocated for the model yet. Raises UserError if a setting is invalid, ValueError if the shapes differ.
    """
    for key in SETTINGS:
        if key in config:
            check_setting(key, config[key])
    check_latent(config)
    try:
        with torch.device("meta"):
            model = build_model({**config, "precision": "float32"}, shape)
    except (RuntimeError, NotImplementedError):
        return  # a user's own class may need actual values, which tensors on meta do not have
    described = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in {**described, **weights}:
        if described.get(name) != weights.get(name):
            there, here = (str(sizes.get(name, "missing")) for sizes in (weights, described))
            raise ValueError(f"{name} is {there} in the weights and {here} in the configured model")
