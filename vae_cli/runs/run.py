"""A trained run, to be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from vae_cli.axes.dataset import Dataset, Splits
from vae_cli.axes.dataset.pack import only_reading
from vae_cli.axes.dataset.split import fingerprint
from vae_cli.config.build import build_model
from vae_cli.config.instantiate import build, check_value
from vae_cli.config.settings import SETTINGS, Config, check_latent
from vae_cli.core.errors import Failure, UserError, first_line
from vae_cli.core.rng import evaluating
from vae_cli.machine.device import find_device
from vae_cli.model.vae import VAE
from vae_cli.runs.checkpoint import load_checkpoint
from vae_cli.runs.find import find_run
from vae_cli.runs.folder import ANEW, RunDir


def loading(config: dict[str, Any], data_dir: str | Path | None) -> Callable[[], AbstractContextManager[None]]:
    """Have the images of a stored configuration taken from a folder that the user names, if any; and give what to load
    them in. A folder that only the configuration names is read; written to is the user's own, or their cache."""
    dataset = config["dataset"]
    if data_dir is not None:
        config["data_dir"] = str(data_dir)
        if "data_dir" in dataset:
            dataset["data_dir"] = str(data_dir)
    return nullcontext if data_dir is not None or dataset.get("data_dir") is None else only_reading


class Run:
    """A trained run: `model`, `encode`, `decode`, `sample`, and the images that it was trained on.

    weights are the `best` on validation images, where some were held out, or the `last`.
    Raises UserError or Failure where the folder cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        weights: Literal["best", "last"] = "best",
        device: str = "auto",
        data_dir: str | Path | None = None,
    ) -> None:
        self.folder = RunDir(Path(path))
        self.config = self.folder.config()
        self._loading = loading(self.config, data_dir)
        self.device = find_device(device)
        self.weights_file = self.folder.weights_file(weights)
        if weights == "best" and self.weights_file != self.folder.best_file and self.folder.summary().get("validation"):
            raise Failure(f"{self.folder.best_file} is missing. Type --weights last for the newest weights.")
        state = load_checkpoint(self.weights_file, self.device)
        self.step: int = state["step"]
        self._images: str | None = state.get("images")
        self.shape: tuple[int, int, int] = tuple(state["shape"])
        try:
            check_stored(
                self.config, {name: tuple(tensor.shape) for name, tensor in state["model"].items()}, self.shape
            )
            self.model: VAE = build_model(self.config, self.shape)
            self.model.load_state_dict(state["model"])
        except (RuntimeError, ValueError) as error:
            raise Failure(
                f"{self.weights_file} does not fit {self.folder.config_file}: {first_line(error)}. {ANEW}"
            ) from error
        self.model.to(self.device).eval()

    @property
    def path(self) -> Path:
        return self.folder.path

    @cached_property
    def splits(self) -> Splits:
        """The images, loaded when they are first asked for. Raises UserError or Failure as the data set does."""
        dataset = build(self.config["dataset"], "dataset", Dataset)
        with self._loading():
            splits: Splits = dataset.load()
        if self._images not in (None, fingerprint(splits)):
            raise UserError(
                f"The images of {self.path} have changed since it was trained: its test images may be among those that "
                "it was trained on. Train a new run on them."
            )
        return splits

    def images(self, x: Tensor) -> Tensor:
        """Images as the model takes them: on its device, 8-bit values scaled to [0, 1]."""
        scaled = x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x.to(torch.float32)
        return scaled.to(self.device)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Distribution:
        """q(z|x), batch (B,) and event (D,), of images (B, C, H, W) with values in [0, 1] or 8-bit."""
        return self.model.encode(self.model.likelihood.observe(self.images(x)))  # type: ignore[operator]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Distribution:
        """p(x|z), batch (*S, B) and event (C, H, W), of codes (*S, B, D)."""
        return self.model.decode(z.to(self.device, torch.float32))

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """The mean images (n, C, H, W) of n codes drawn from the prior."""
        with evaluating(self.model, seed, self.device):
            return self.decode(self.model.prior().sample((n,))).mean


def load_run(
    run: str | Path = "latest",
    weights: Literal["best", "last"] = "best",
    device: str = "auto",
    runs_dir: str | Path = "runs",
    data_dir: str | Path | None = None,
) -> Run:
    """Load a trained run by its path, by `latest`, or by a unique part of its name (see find_run)."""
    return Run(find_run(str(run), Path(runs_dir)), weights, device, data_dir)


def check_stored(config: Config, weights: Mapping[str, tuple[int, ...]], shape: tuple[int, int, int]) -> None:
    """Check the configuration of a stored run, and that the model that it describes has weights of these shapes, before
    that model takes any memory. Raises UserError, or ValueError where the weights are others."""
    for key, kind in SETTINGS.items():
        if key in config:
            check_value(config[key], kind, key)
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
