"""The feature net: a small classifier, trained once per dataset, in whose feature space images are compared."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae_cli.axes.dataset import Split, Splits, data_folder
from vae_cli.axes.dataset.pack import exclusive
from vae_cli.axes.dataset.split import fingerprint
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.rng import derive_seed, initial_weights
from vae_cli.machine.device import tf32_allowed
from vae_cli.metrics.base import BATCH, MeasuredRun
from vae_cli.model.kernels import without_compiler
from vae_cli.runs.checkpoint import load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

FORMAT = 1  # version of the net and its training; if it is increased, all nets are trained again
FEATURES = 64
IMAGES_SHOWN = 160_000  # during training, over all epochs; small datasets are limited to 15 epochs
TRAINING_BATCH = 64
SEED = 0  # of the net's initial weights and the order of images; independent of the run's seed

Shape = tuple[int, int, int]


class FeatureNet(nn.Module):
    """A convolutional classifier of images (N, C, H, W); values are clamped to [0, 1].

    Convolutions halve the image until its longer side has at most 7 pixels, and double the channels from 16 to at most
    64. The last two layers have F = 64 features and one output per class. `accuracy` is the accuracy on the test set.
    Once trained, the net is in evaluation mode and draws no random numbers.
    """

    accuracy: float

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = [nn.BatchNorm2d(channels)]
        outputs = 16
        # Most of the computation is in the first layer, so that layer already halves all but the smallest images.
        stride = 1 if max(height, width) < 16 else 2
        while True:
            layers += [nn.Conv2d(channels, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            height, width = math.ceil(height / stride), math.ceil(width / stride)
            if len(layers) > 4 and max(height, width) < 8:
                break
            channels, outputs, stride = outputs, min(2 * outputs, 64), 2
        size = outputs * height * width
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, classes)
        self.accuracy = math.nan

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of one batch, with gradients."""
        return self.head(self.body(x.clamp(0, 1)))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Return the features (N, F) of images (N, C, H, W) on any device; the result is on the net's device."""
        device = self.head.weight.device
        with tf32_allowed(False):  # whatever the precision of the run
            return torch.cat([self.body(part.to(device).clamp(0, 1)) for part in x.split(BATCH)])

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """Return the most probable class of each image (N, C, H, W), int64 (N,), on the net's device."""
        return self.head(self.features(x)).argmax(-1)


def feature_net(subject: MeasuredRun) -> FeatureNet | None:
    """Return the feature net of a run's dataset, on the run's device.

    Returns None if the training images have no labels or all have the same label. The net is trained on first use, on
    the training images alone, and stored in the folder `features` of the run's data folder. If the data folder is
    read-only, the net is stored in the default data folder; if that is read-only too, the net is kept only in memory.
    If several processes need the net at the same time, one trains it and the others wait.
    """
    splits, device = subject.splits, subject.device
    if splits.train.labels is None or len(splits.train.labels[splits.train.index].unique()) < 2:
        return None
    key = f"{fingerprint(splits)}-{FORMAT}"
    known = (key, str(device))
    if known not in loaded_nets:
        for home in (data_folder(subject.run.config["data_dir"]), data_folder(None)):
            folder = home / "features" / key
            try:
                with exclusive(folder):
                    loaded_nets[known] = _load(folder / "net.pt", splits, device) or _train(
                        folder / "net.pt", splits, device
                    )
                break
            except OSError as error:  # the data folder may be read-only
                log.warning("the feature net cannot be stored in %s: %s", folder, error)
        else:
            loaded_nets[known] = _train(None, splits, device)
    return loaded_nets[known]


loaded_nets: dict[tuple[str, str], FeatureNet] = {}


def _empty(splits: Splits) -> FeatureNet:
    labels = [int(s.labels[s.index].max()) for s in splits[:3] if s.labels is not None and len(s)]
    _, *shape = splits.train.images.shape
    with initial_weights(SEED, "features"):
        return FeatureNet((shape[0], shape[1], shape[2]), max(labels) + 1)


def _load(file: Path, splits: Splits, device: torch.device) -> FeatureNet | None:
    """Return the net that is stored in a file; None if the file is missing or damaged."""
    net = _empty(splits)
    try:
        saved = load_checkpoint(file, device)
        net.load_state_dict(saved["model"])
        net.accuracy = float(saved["accuracy"])
    except (Failure, RuntimeError, KeyError) as error:
        log.warning("the stored feature net cannot be used and is trained again: %s", error)
        return None
    except UserError:  # not trained yet; Failure, a subclass of UserError, is handled above
        return None
    return net.to(device).eval()


def _train(file: Path | None, splits: Splits, device: torch.device) -> FeatureNet:
    with tf32_allowed(False):
        net = train_net(_empty(splits).to(device), splits.train)
    net.accuracy = accuracy(net, splits.test)
    if file is not None:
        shape = list(splits.train.images.shape[1:])
        try:
            save_checkpoint(file, {"step": 0, "shape": shape, "accuracy": net.accuracy, "model": net.state_dict()})
        except OSError as error:
            log.warning("the feature net cannot be stored: %s", error)
    return net


@torch.enable_grad()
def train_net(net: FeatureNet, split: Split) -> FeatureNet:
    """Fit a net to the labels of a split with Adam and a one-cycle schedule (Smith and Topin 2018)."""
    device = net.head.weight.device
    epochs = max(1, min(15, round(IMAGES_SHOWN / len(split))))
    steps = epochs * math.ceil(len(split) / TRAINING_BATCH)
    with without_compiler():
        optimizer = torch.optim.Adam(net.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    net.train()
    for epoch in range(epochs):
        order = torch.randperm(
            len(split), generator=torch.Generator().manual_seed(derive_seed(SEED, "features", epoch))
        )
        for positions in order.split(TRAINING_BATCH):
            loss = F.cross_entropy(net(split.batch(positions).to(device)), split.batch_labels(positions).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return net.eval()


def accuracy(net: FeatureNet, split: Split) -> float:
    """Return the net's classification accuracy on a split, 0 to 1."""
    found = 0
    for positions in torch.arange(len(split)).split(BATCH):
        found += int((net.classes(split.batch(positions)).cpu() == split.batch_labels(positions).cpu()).sum())
    return found / len(split)
