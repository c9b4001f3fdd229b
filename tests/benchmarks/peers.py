"""Train the network of bare.py with pythae or Lightning, on the same data: `peers.py pythae IMAGES`.

Loss and optimizer are the same, too. Prints the seconds of each epoch. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, LATENT, BATCH = 400, 20, 128


def pythae(images: Tensor, epochs: int) -> list[float]:
    """Train pythae's VAE with its BaseTrainer, without logging; the mlp is its encoder and decoder."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    logging.disable(logging.CRITICAL)

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU())
            self.loc, self.log_var = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

        def forward(self, x: Tensor) -> Any:
            features = self.hidden(x)
            return ModelOutput(embedding=self.loc(features), log_covariance=self.log_var(features))

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            layers = (nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784), nn.Sigmoid())
            self.layers = nn.Sequential(*layers)

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=self.layers(z).reshape(-1, 1, 28, 28))

    times: list[float] = []

    class Clock(TrainingCallback):  # type: ignore[misc]
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce")
    model = VAE(config, encoder=Encoder(), decoder=Decoder())
    with tempfile.TemporaryDirectory() as folder:
        settings = BaseTrainerConfig(
            output_dir=folder, num_epochs=epochs, learning_rate=1e-3, per_device_train_batch_size=BATCH, no_cuda=True
        )
        data = _dataset(images)
        trainer = BaseTrainer(model=model, train_dataset=data, training_config=settings, callbacks=[Clock()])
        trainer.train()
    return times


def _dataset(images: Tensor) -> Any:
    from pythae.data.datasets import BaseDataset

    return BaseDataset(images.float().div(255), torch.zeros(len(images)))


def lightning(images: Tensor, epochs: int) -> list[float]:
    """Train a LightningModule with Trainer(barebones=True), which logs nothing, on a tensor in memory."""
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    logging.disable(logging.CRITICAL)
    times: list[float] = []

    class Model(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
            self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784))

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            (x,) = batch
            loc, log_scale = self.encoder(x).chunk(2, 1)
            scale = log_scale.exp()
            logits = self.decoder(loc + scale * torch.randn_like(loc))
            rate = 0.5 * (loc.square() + scale.square() - 1 - 2 * log_scale).sum()
            return (F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="sum") + rate) / len(x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

        def on_train_epoch_start(self) -> None:
            times.append(-time.perf_counter())

        def on_train_epoch_end(self) -> None:
            times[-1] += time.perf_counter()

    loader = DataLoader(TensorDataset(images.float().div(255)), BATCH, shuffle=True)
    Trainer(barebones=True, max_epochs=epochs, accelerator="cpu").fit(Model(), loader)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["pythae", "lightning"])
    parser.add_argument("images", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(given.threads)
    images = torch.load(given.images, weights_only=True)
    seconds = {"pythae": pythae, "lightning": lightning}[given.peer](images, given.epochs)
    print(json.dumps({"seconds": seconds, "images": len(images)}))


if __name__ == "__main__":
    main()
