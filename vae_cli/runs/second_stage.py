"""The second stage: models of a run's codes, trained once its weights are final, and kept with the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Adam

from vae_cli.axes.dataset import Split, Splits
from vae_cli.axes.likelihood import Gaussian, OneLearnedScale
from vae_cli.axes.network import MLP
from vae_cli.axes.optimizer import ScheduledOptimizer
from vae_cli.axes.prior import StandardNormal
from vae_cli.axes.sigma import Learned
from vae_cli.config.settings import code_size
from vae_cli.core.errors import Failure, UserError
from vae_cli.core.files import digest, locked
from vae_cli.core.rng import derive_seed, evaluating
from vae_cli.model.code_vae import CodeVAE
from vae_cli.model.flow_matching import FlowMatching
from vae_cli.model.scales import standardization
from vae_cli.model.vae import VAE
from vae_cli.runs.checkpoint import load_checkpoint, save_checkpoint
from vae_cli.runs.folder import refuse_link
from vae_cli.runs.run import Run

log = logging.getLogger(__name__)

Kind = Literal["flow", "vae"]

FORMAT = 1  # version of the models and their training; if it is increased, they are trained again
HIDDEN = [256, 256, 256]  # units of the velocity's network
VAE_HIDDEN = [256, 256]  # units of the second VAE's encoder and of its decoder
# Of the second VAE's likelihood. With a scale of 1, the standard deviation of the codes, the VAE starts by ignoring its
# latent dimensions, and hardly learns to use them: on the digits (sigma=learned, 16 dimensions, one seed), the negative
# log-likelihood of held-out codes was 22.1 nats from 1, 21.9 from 0.3 and 21.5 from 0.1.
FIRST_SCALE = 0.1
LEARNING_RATE = 1e-3
BATCH = 128
AVERAGED = 0.999  # decay of the exponential moving average of the weights, which is what is kept
BLOCK = 250  # steps between two measurements of the held-out loss
BLOCKS = 16
PATIENCE = 4  # blocks without a lower held-out loss, after which training ends
HELD_OUT = 10_000  # codes, at most


class Encoding(Protocol):
    """What is used of a run, or of codes from a file: its model, its images, and the size or shape of its codes."""

    config: dict[str, Any]
    device: torch.device
    model: VAE

    @property
    def splits(self) -> Splits:
        """The images."""


class FrozenCodes:
    """The codes of a split's images under a trained run. Each call of `draw` draws their noise anew."""

    def __init__(self, run: Encoding, split: Split) -> None:
        self.run = run
        self.split = split.to(run.device)
        observe: Callable[[Tensor], Tensor] = run.model.likelihood.observe  # type: ignore[assignment]
        batches = (self.split.batch(some) for some in self.split.in_order(BATCH))
        # What sigma is applied to is the same for every draw of the noise, so it is computed only once.
        self.features = torch.cat([run.model.features(observe(x)) for x in batches])

    def __len__(self) -> int:
        return len(self.features)

    def draw(self, rows: Tensor) -> Tensor:
        """Draw a code (B, D) from the posterior of each image in `rows` (B,)."""
        z: Tensor = self.run.model.sigma(self.features[rows]).rsample()
        return z


class SecondStage(nn.Module):
    """A model of codes (B, D): z = center + spread * u, where `inner` is a model of u.

    center and spread (D,) are the mean and standard deviation of one drawn code per training image. A dimension that is
    constant up to rounding has spread 1.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, inner: FlowMatching | CodeVAE, latent: int) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("center", torch.zeros(latent))
        self.register_buffer("spread", torch.ones(latent))

    def standardize(self, codes: Tensor) -> None:
        """Set center and spread to the mean and the standard deviation of codes (N, D)."""
        center, spread = standardization(codes)
        self.center.copy_(center)
        self.spread.copy_(spread)

    def loss(self, z: Tensor) -> Tensor:
        """Return the loss (B,) of codes z (B, D)."""
        return self.inner.loss((z - self.center) / self.spread)

    def draw(self, count: int, temperature: float = 1.0, **settings: Any) -> Tensor:
        """Draw codes (count, D). Settings are those of the inner model, such as the solver of a flow."""
        return self.center + self.spread * self.inner.draw(count, temperature, **settings)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln p(z) (B,), or for a second VAE a lower bound on it, in nats, for codes z (B, D)."""
        return self.inner.log_prob((z - self.center) / self.spread) - self.spread.log().sum()


def build_stage(kind: Kind, latent: int) -> SecondStage:
    """Return an untrained second stage for codes with `latent` dimensions; its weights are drawn at random."""
    if kind == "flow":
        return SecondStage(FlowMatching(latent, HIDDEN[0], len(HIDDEN)), latent)
    network, shape = MLP(VAE_HIDDEN), (latent, 1, 1)
    encoder, decoder = network.encoder(shape, latent, Learned.raw_size), network.decoder(latent, torch.zeros(shape))
    likelihood = Gaussian("learned")
    assert isinstance(likelihood.scale, OneLearnedScale)
    likelihood.scale.set(FIRST_SCALE)
    vae = VAE(encoder, Learned(), decoder, likelihood, StandardNormal(latent))
    return SecondStage(CodeVAE(vae, latent), latent)


def second_stage(run: Encoding, kind: Kind, say: Callable[[str], object] = lambda message: None) -> SecondStage:
    """Return the second stage of a run, on the run's device and ready to draw from.

    It is trained on first use and kept in the run's folder `second_stage`, as long as the run's weights are the same.
    If training is interrupted, the next call continues it. If several processes need it at the same time, one trains
    it and the others wait. If the folder is read-only, or if the codes come from a file instead of a run, the second
    stage is kept only in memory. `say` receives a message before training starts.
    """
    if not isinstance(run, Run):  # codes from a file
        return SecondStageTraining(run, kind, None).stage(say)
    refuse_link(run.path, "second_stage")
    name = kind if run.weights_file == run.folder.weights_file("best") else f"{kind}-last"
    folder = run.path / "second_stage"
    with ExitStack() as until:
        try:
            folder.mkdir(exist_ok=True)
            until.enter_context(locked(folder / f".{name}.lock"))
        except OSError as error:
            log.warning("the second stage cannot be kept in %s: %s", folder, error.strerror)
            return SecondStageTraining(run, kind, None).stage(say)
        return SecondStageTraining(run, kind, folder / f"{name}.pt").stage(say)


class SecondStageTraining:
    """The training of a second stage, in blocks of steps. After each block, its state is saved in `file`, if given.

    The learning rate falls from LEARNING_RATE to 0 over BLOCKS blocks, along half a cosine. After each block, the loss
    of held-out codes is measured, always with the same noise, with the moving average of the weights. Training ends
    early after PATIENCE blocks without a lower loss. The best average is kept, or the last one if the run has no
    validation images.
    """

    def __init__(self, run: Encoding, kind: Kind, file: Path | None) -> None:
        self.run, self.kind, self.file = run, kind, file
        self.latent = code_size(run.config["latent"])
        self.about: dict[str, Any] = {"kind": kind, "version": FORMAT}
        if isinstance(run, Run):
            self.about["weights"] = digest(run.weights_file)

    def stage(self, say: Callable[[str], object]) -> SecondStage:
        """Return the trained second stage: the stored one, or a new one."""
        state = self._stored()
        with evaluating(self.run.model, derive_seed(0, "second stage", self.kind), self.run.device):
            stage = build_stage(self.kind, self.latent).to(self.run.device)
            if state is None or not state["is_done"]:
                keeping = "" if self.file is None else ", and keeping it"
                say(f"training a second stage on the codes of the training images ({self.kind}){keeping}")
                state = self._train(stage, state)
        stage.load_state_dict(state["model"])
        return stage.eval().requires_grad_(False)

    def _stored(self) -> dict[str, Any] | None:
        """Return the stored state. None if no file can be used: it is missing, damaged, or belongs to other weights."""
        if self.file is None:
            return None
        try:
            state = load_checkpoint(self.file, self.run.device)
        except Failure as error:
            log.warning("the stored second stage cannot be used and is trained again: %s", error)
            return None
        except UserError:  # not trained yet; Failure, a subclass of UserError, is handled above
            return None
        return state if state.get("about") == self.about else None

    def _train(self, stage: SecondStage, state: dict[str, Any] | None) -> dict[str, Any]:
        """Train from a stored state, or from the start, to the end; return the last state."""
        codes = FrozenCodes(self.run, self.run.splits.train)
        held_out = self._held_out()
        settings = {"lr": LEARNING_RATE, "fused": self.run.device.type in ("cpu", "cuda")}
        optimizer = ScheduledOptimizer(Adam, stage.parameters(), settings)
        if state is None:
            stage.standardize(codes.draw(torch.arange(len(codes), device=self.run.device)))
            average = deepcopy(stage)
            state = {"blocks": 0, "since_best": 0, "least": float("inf"), "model": average.state_dict()}
        else:
            average = deepcopy(stage)
            average.load_state_dict(state["average"])
            stage.load_state_dict(state["current"])
            optimizer.load_state_dict(state["optimizer"])
            state = {name: state[name] for name in ("blocks", "since_best", "least", "model")}
        while not is_done(state):
            with evaluating(self.run.model, self._seed(state["blocks"]), self.run.device), torch.enable_grad():
                self._take_steps(stage, average, optimizer, codes, state["blocks"] * BLOCK)
            state = self._after_block(state, average, held_out)
            self._save(state, {"current": stage.state_dict(), "optimizer": optimizer.state_dict()}, average)
        return {**state, "is_done": True}

    def _seed(self, block: int | str) -> int:
        return derive_seed(0, "second stage", self.kind, block)

    def _held_out(self) -> Tensor | None:
        """Draw codes of validation images (N, D), at most HELD_OUT; None if the run has none."""
        split = self.run.splits.validation
        if len(split) == 0:
            return None
        codes = FrozenCodes(self.run, split)
        with evaluating(self.run.model, self._seed("held-out codes"), self.run.device):
            return codes.draw(torch.arange(min(len(codes), HELD_OUT), device=self.run.device))

    def _take_steps(
        self, stage: SecondStage, average: SecondStage, optimizer: ScheduledOptimizer, codes: FrozenCodes, taken: int
    ) -> None:
        """Take the steps of one block, and update the moving average of the weights after each."""
        pairs = list(zip(average.parameters(), stage.parameters(), strict=True))
        for step in range(taken, taken + BLOCK):
            rows = torch.randint(len(codes), (BATCH,), device=self.run.device)
            with torch.no_grad():
                z = codes.draw(rows)
            optimizer.zero_grad()
            stage.loss(z).mean().backward()
            for group in optimizer.inner.param_groups:
                group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / (BLOCKS * BLOCK))) / 2
            optimizer.set_rates()
            optimizer.step()
            decay = min(AVERAGED, (1 + step) / (10 + step))  # at first, the average forgets the initial weights faster
            with torch.no_grad():
                for mean, weight in pairs:
                    mean.lerp_(weight, 1 - decay)

    def _after_block(self, state: Mapping[str, Any], average: SecondStage, held_out: Tensor | None) -> dict[str, Any]:
        """Return the state after one more block: the best weights so far, and how long ago they were found."""
        blocks, least, since_best = state["blocks"] + 1, state["least"], state["since_best"] + 1
        loss = -float(blocks)  # without held-out codes, the newest weights count as the best
        if held_out is not None:
            with evaluating(self.run.model, self._seed("held-out loss"), self.run.device):
                loss = float(torch.cat([average.loss(some) for some in held_out.split(10 * BATCH)]).double().mean())
        if not loss < least:
            return {**state, "blocks": blocks, "since_best": since_best}
        model = {name: tensor.clone() for name, tensor in average.state_dict().items()}
        return {"blocks": blocks, "least": loss, "since_best": 0, "model": model}

    def _save(self, state: Mapping[str, Any], training: Mapping[str, Any], average: SecondStage) -> None:
        """Save the state, if there is a file: after the last block only the model, before with what training needs."""
        if self.file is None:
            return
        is_last, shape = is_done(state), list(self.run.splits.train.images.shape[1:])
        more = {} if is_last else {**training, "average": average.state_dict()}
        about = {"step": state["blocks"] * BLOCK, "shape": shape, "about": self.about, "is_done": is_last}
        save_checkpoint(self.file, {**state, **more, **about})


def is_done(state: Mapping[str, Any]) -> bool:
    """Return whether the training of a second stage has ended."""
    return bool(state["blocks"] >= BLOCKS or state["since_best"] >= PATIENCE)
