"""The feature net: a small classifier, trained once for a data set, in whose features images are compared."""

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
from vae_cli.metrics.base import BATCH, MeasuredRun
from vae_cli.model.kernels import without_compiler
from vae_cli.runs.checkpoint import load_checkpoint, save_checkpoint

log = logging.getLogger(__name__)

FORMAT = 1  # of the net and its training; another number and all are trained again
FEATURES = 64
SHOWN = 160_000  # images that a training shows, each of a small set 15 times at most
TRAINING_BATCH = 64
SEED = 0  # of the net's own weights and order of images, whatever the run's

Shape = tuple[int, int, int]


class FeatureNet(nn.Module):
    """A convolutional classifier of images (N, C, H, W) with values in [0, 1], to which others are clamped.

    The side is halved until it is 4 to 7, while the channels double from 16 to 64 at most; then come F = 64 features
    and one output a class. `accuracy` is the share of the test images whose class it finds. The net is in evaluation
    mode, and draws no random number.
    """

    accuracy: float

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = [nn.BatchNorm2d(channels)]
        outputs = 16
        # Most of the work is in the first layer: it halves all but the smallest images.
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
        """The logits (N, classes) of one batch, with gradients."""
        return self.head(self.body(x.clamp(0, 1)))

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees of images (N, C, H, W), (N, F), on the net's device; they may lie on another."""
        device = self.head.weight.device
        return torch.cat([self.body(part.to(device).clamp(0, 1)) for part in x.split(BATCH)])

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """The most probable class of images (N, C, H, W), int64 (N,), on the net's device."""
        return self.head(self.features(x)).argmax(-1)


def feature_net(subject: MeasuredRun) -> FeatureNet | None:
    """The feature net of a run's data set on the run's device; None where the images have no labels, or all the same.

    It is trained when it is first asked for, on the training images alone, and kept in the folder `features` of the
    data's folder or, where that cannot be written, of the cache folder or the memory of this process. Processes that
    start together train it once.
    """
    splits, device = subject.splits, subject.device
    if splits.train.labels is None or len(splits.train.labels[splits.train.index].unique()) < 2:
        return None
    key = f"{fingerprint(splits)}-{FORMAT}"
    known = (key, str(device))
    if known not in _nets:
        for home in (data_folder(subject.run.config["data_dir"]), data_folder(None)):
            folder = home / "features" / key
            try:
                with exclusive(folder):
                    _nets[known] = _load(folder / "net.pt", splits, device) or _train(folder / "net.pt", splits, device)
                break
            except OSError as error:  # data may lie where nobody can write
                log.warning("the feature net is not kept in %s: %s", folder, error)
        else:
            _nets[known] = _train(None, splits, device)
    return _nets[known]


_nets: dict[tuple[str, str], FeatureNet] = {}


def _empty(splits: Splits) -> FeatureNet:
    labels = [int(s.labels[s.index].max()) for s in splits[:3] if s.labels is not None and len(s)]
    _, *shape = splits.train.images.shape
    with initial_weights(SEED, "features"):
        return FeatureNet((shape[0], shape[1], shape[2]), max(labels) + 1)


def _load(file: Path, splits: Splits, device: torch.device) -> FeatureNet | None:
    """The net that a file holds; None where there is none, or none that is whole."""
    net = _empty(splits)
    try:
        saved = load_checkpoint(file, device)
        net.load_state_dict(saved["model"])
        net.accuracy = float(saved["accuracy"])
    except (Failure, RuntimeError, KeyError) as error:
        log.warning("the feature net is trained anew: %s", error)
        return None
    except UserError:  # there is none yet; a Failure is a UserError too, and stands above
        return None
    return net.to(device).eval()


def _train(file: Path | None, splits: Splits, device: torch.device) -> FeatureNet:
    net = train_net(_empty(splits).to(device), splits.train)
    net.accuracy = accuracy(net, splits.test)
    if file is not None:
        shape = list(splits.train.images.shape[1:])
        try:
            save_checkpoint(file, {"step": 0, "shape": shape, "accuracy": net.accuracy, "model": net.state_dict()})
        except OSError as error:
            log.warning("the feature net is not kept for the next time: %s", error)
    return net


@torch.enable_grad()
def train_net(net: FeatureNet, split: Split) -> FeatureNet:
    """Fit a net to the labels of a split by Adam, the learning rate rising and falling once (Smith and Topin 2018)."""
    device = net.head.weight.device
    epochs = max(1, min(15, round(SHOWN / len(split))))
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
    """The share of a split's images whose class the net finds."""
    found = 0
    for positions in torch.arange(len(split)).split(BATCH):
        found += int((net.classes(split.batch(positions)).cpu() == split.batch_labels(positions).cpu()).sum())
    return found / len(split)
