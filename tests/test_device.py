"""What must hold on a GPU, as far as a machine without one can show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.backends import cudnn
from torch.optim import SGD, Adam, Optimizer
from torch.overrides import TorchFunctionMode

from vae_cli.axes import optimizer as optimizers
from vae_cli.axes.dataset import Digits
from vae_cli.axes.dataset import split as splits
from vae_cli.axes.optimizer import ScheduledOptimizer
from vae_cli.config import build, catalog
from vae_cli.config.build import build_experiment
from vae_cli.core.errors import UserError
from vae_cli.machine import device as devices
from vae_cli.machine import memory
from vae_cli.machine.device import allow_tf32, computing_in, make_deterministic, take_device
from vae_cli.model import vae
from vae_cli.model.kernels import FusedAdam, Group
from vae_cli.model.loss import loss_and_terms
from vae_cli.runs.checkpoint import on_cpu
from vae_cli.training import step as steps
from vae_cli.training.loop import log_step
from vae_cli.training.progress import Progress
from vae_cli.training.state import State, moving_schedules, numbers
from vae_cli.training.step import Replayed, Step
from vae_cli.training.tensorboard import NoEvents
from vae_cli.training.validation import evaluate_split

Compose = Callable[..., dict[str, Any]]


def choices(axis: str) -> list[str]:
    """Return the choices of an axis."""
    return sorted(catalog.groups()[axis].choices)


LAYOUTS = (torch.contiguous_format, torch.channels_last)


def in_layout(seed: int, layout: torch.memory_format) -> Tensor:
    """Return convolution weights, drawn from a seed, in a memory layout."""
    return torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=layout)


def train_and_move(
    kind: type[Optimizer], settings: dict[str, Any], first: torch.memory_format, then: torch.memory_format
) -> Tensor:
    """Take three steps in one layout, move to a new optimizer by its state, and take three steps in the other."""
    parameter = nn.Parameter(in_layout(0, first))
    optimizer = ScheduledOptimizer(kind, [parameter], settings)
    for step in range(6):
        if step == 3:
            state = optimizer.state_dict()
            parameter = nn.Parameter(parameter.detach().contiguous(memory_format=then))
            optimizer = ScheduledOptimizer(kind, [parameter], settings)
            optimizer.load_state_dict(state)
        parameter.grad = in_layout(step + 1, first if step < 3 else then)
        optimizer.step()
    return parameter.detach().contiguous()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Adam, {"lr": 0.1, "fused": True}),
        (Adam, {"lr": 0.1, "fused": True, "amsgrad": True}),
        (Adam, {"lr": 0.1, "fused": False}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    ],
)
@pytest.mark.parametrize("then", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_an_optimizer_resumes_in_another_memory_layout(
    kind: type[Optimizer], settings: dict[str, Any], first: torch.memory_format, then: torch.memory_format
) -> None:
    """A GPU stores the weights of convolutions in another order than the CPU."""
    stayed = train_and_move(kind, settings, torch.contiguous_format, torch.contiguous_format)
    torch.testing.assert_close(train_and_move(kind, settings, first, then), stayed)


# Precision and determinism -------------------------------------------------------------------------------------------


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Restore torch's settings for CUDA after the test."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    yield
    torch.backends.cuda.matmul.allow_tf32 = matmul
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(("precision", "inside"), [("float32", False), ("tf32", True)])
def test_tf32_is_used_only_if_it_is_the_precision(precision: str, inside: bool, outside: bool) -> None:
    allow_tf32(outside)
    with computing_in(precision, "cuda"):
        assert torch.backends.cuda.matmul.allow_tf32 is cudnn.allow_tf32 is inside
    assert torch.backends.cuda.matmul.allow_tf32 is cudnn.allow_tf32 is outside
    with computing_in(precision, "cpu"):
        assert cudnn.allow_tf32 is outside


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_model_computes_in_its_precision_wherever_it_is_used(
    compose: Compose, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded run too, not only a training: encoder and decoder set the precision themselves."""
    model = build_experiment(compose("network.hidden=[8]")).model
    model.precision = precision  # type: ignore[assignment]
    used: list[tuple[str, str]] = []
    monkeypatch.setattr(vae, "computing_in", lambda *given: used.append(given) or nullcontext())
    model.decode(model.encode(torch.zeros(2, 1, 8, 8)).mean)
    assert used == [(precision, "cpu")] * 2


@pytest.mark.usefixtures("torch_settings")
def test_convolutions_on_a_gpu_are_deterministic() -> None:
    cudnn.deterministic, cudnn.benchmark = False, True
    make_deterministic(torch.device("cpu"))
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    make_deterministic(torch.device("cuda"))
    assert (cudnn.deterministic, cudnn.benchmark) == (True, False)


# Compilation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_compiling_changes_neither_statistics_nor_scale_nor_gradients(
    compose: Compose, likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch compiles a network at its first pass, which must be like those of the training but leave no trace."""
    words = ["network=conv", "network.width=4", "network.normalization=batch", f"likelihood={likelihood}"]
    plain = build_experiment(compose(*words))
    seen: list[tuple[int, bool]] = []

    def compile_(loss: Callable[[Tensor], Any], **_: Any) -> Callable[[Tensor], Any]:
        return lambda x: (seen.append((len(x), torch.is_grad_enabled())), loss(x))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    compiled = build_experiment(compose(*words, "compile=true", "batch_size=48"))
    assert seen == [(48, True)]
    Step(compiled)(torch.arange(48))
    Step(compiled)(torch.arange(7))
    assert seen == [(48, True)] * 2  # a smaller batch, as at the end of an epoch, is not worth a compilation
    compiled = build_experiment(compose(*words, "compile=true", "batch_size=48"))
    for name, before in plain.model.state_dict().items():
        assert torch.equal(before, compiled.model.state_dict()[name]), name
    assert all(parameter.grad is None for parameter in compiled.model.parameters())


def test_if_the_loss_cannot_be_compiled_its_networks_are(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(x: Tensor) -> Any:
        raise RuntimeError("PassManager::run failed\nmore")

    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda loss, **_: fail)
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    experiment = build_experiment(compose("compile=true"))
    assert compiled == [experiment.model.encoder, experiment.model.decoder]
    assert experiment.compiled_loss is None
    assert [said.getMessage() for said in caplog.records] == [
        "Only encoder and decoder are compiled, because the loss cannot be: PassManager::run failed"
    ]
    Step(experiment)(torch.arange(64))


def test_a_decoder_that_is_differentiated_twice_is_not_compiled(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    experiment = build_experiment(compose("compile=true", "regularizer=gradient_penalty"))
    assert compiled == [experiment.model.encoder]
    assert experiment.compiled_loss is None
    assert [said.getMessage() for said in caplog.records] == [
        "Only the encoder is compiled, because the penalty needs second derivatives of the decoder."
    ]
    Step(experiment)(torch.arange(64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *([f"{axis}={choice}"] for axis in ("sigma", "likelihood", "regularizer", "prior") for choice in choices(axis)),
        ["likelihood=bernoulli", "likelihood.binarize=dynamic"],
        *(["network=conv", "network.width=4", f"network.normalization={kind}"] for kind in ("none", "group", "batch")),
        ["network=resnet", "network.width=4"],
        ["network=conv", "network.width=4", "network.spectral_norm=true"],
        ["+schedule@regularizer.beta=linear"],
    ],
    ids=" ".join,
)
def test_the_loss_of_every_choice_is_one_graph(compose: Compose, words: list[str]) -> None:
    """A part that torch cannot trace would split the compiled loss, and cost more than compilation gains."""
    hidden = [] if any(word.startswith("network=") for word in words) else ["network.hidden=[8]"]
    if {"sigma=power_spherical", "prior=sphere"} & {*words}:  # which need each other
        words = ["sigma=power_spherical", "prior=sphere"]
    experiment = build_experiment(compose("latent=3", *hidden, *words))
    if experiment.regularizer.differentiates:
        pytest.skip("torch does not compile second derivatives")
    for schedule in moving_schedules(experiment):
        schedule.advance(0.5)
    x = experiment.splits.train.batch(torch.arange(6))

    def loss(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_and_terms(experiment.model, experiment.regularizer, x)

    before, found = deepcopy(experiment.model.state_dict()), []
    torch.compiler.reset()
    for function in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        experiment.model.load_state_dict(before)
        torch.manual_seed(0)
        value, terms = function(x)
        value.backward()
        found.append({"loss": value.detach(), **terms})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


# Images and memory ---------------------------------------------------------------------------------------------------


def test_images_that_do_not_fit_onto_the_device_stay_with_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the pixels of a batch are copied; a position that was sent to a GPU would have to be waited for."""
    monkeypatch.setattr(splits, "free_memory", lambda device: 1000)
    here = Digits(validation=10).load()
    for before, after in zip(here[:3], here.to("meta")[:3], strict=True):
        assert after.images is before.images
        assert after.labels is before.labels
        for positions in (next(after.shuffled(torch.Generator(), 5)), next(after.in_order(5))):
            assert positions.device == after.index.device == torch.device("cpu")
            assert after.batch(positions).device == after.batch_labels(positions).device == torch.device("meta")
        assert after.mean().device == torch.device("meta")


def test_the_images_of_a_batch_are_the_same_on_their_way_to_another_device() -> None:
    split = Digits().load().train
    moved = splits.replace(split, target=torch.device("cpu", 0))
    positions = torch.tensor([3, 1, 4])
    assert torch.equal(moved.batch(positions), split.batch(positions))
    assert torch.equal(moved.batch_labels(positions), split.batch_labels(positions))


def test_an_array_that_splits_share_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []
    plain = Tensor.to

    def noted(tensor: Tensor, *given: Any, **more: Any) -> Tensor:
        moved.append(tuple(tensor.shape))
        return plain(tensor, *given, **more)

    here = Digits(validation=10).load()
    monkeypatch.setattr(Tensor, "to", noted)
    here.to("meta")
    assert moved.count(tuple(here.train.images.shape)) == 1


def test_the_memory_of_a_gpu_is_what_this_process_can_still_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (3000, 80_000), "memory_reserved": 500, "memory_allocated": 200}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(torch.device("cuda")) == 3300


def test_a_training_that_a_busy_gpu_cannot_hold_is_refused(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "free_memory", lambda device: 10**6)
    with pytest.raises(UserError, match=r"would need [\d.]+ MB of memory, but only 1\.0 MB is available: give smaller"):
        build_experiment(compose("network.hidden=[1024]"))


@pytest.mark.parametrize(
    ("name", "taken"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_a_device_without_a_number_is_the_least_busy_gpu(
    name: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "free_gpu", lambda count: count - 1)
    assert take_device(name) == torch.device(taken)


# Waits ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_same_on_its_way_through_the_cpu(compose: Compose) -> None:
    experiment = build_experiment(compose("network.hidden=[8]"))
    model = experiment.model.state_dict()
    state = {"model": model, "betas": (0.9, 0.999), "list": [torch.ones(2), {"a": torch.zeros(1)}], "name": "x"}
    copied = on_cpu(state)
    assert copied is not state
    assert list(copied["model"]) == list(model)
    assert copied["model"]._metadata == model._metadata
    assert all(copied["model"][name] is model[name] for name in model)  # tensors on the CPU are not copied
    assert copied["betas"] == (0.9, 0.999)
    assert copied["list"][1] == {"a": torch.zeros(1)}
    assert copied["name"] == "x"


def reads_of(do: Callable[[], object]) -> int:
    """Return how many times a function reads a value from the device: on a GPU, each would be a wait."""
    counter = Reads()
    with counter:
        do()
    return counter.count


class Reads(TorchFunctionMode):
    """Counts the tensor methods that read values from the device."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu"):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sigma", ["learned", "shared", "fixed", "deterministic"])
def test_validation_does_not_wait_at_every_batch(compose: Compose, sigma: str) -> None:
    experiment = build_experiment(compose("network.hidden=[8]", f"sigma={sigma}"))
    split = experiment.splits.train
    given = (experiment.model, experiment.regularizer, split, 0, experiment.device, None)
    evaluate_split(*given, batch_size=500)  # once, for what is cached
    assert reads_of(lambda: evaluate_split(*given, batch_size=100)) == reads_of(
        lambda: evaluate_split(*given, batch_size=500)
    )


def test_the_curves_are_read_from_the_device_twice_whatever_is_shown(compose: Compose) -> None:
    """Once for the means of the terms, and once for beta, scale and the other numbers together."""
    words = ["regularizer.beta=2", "likelihood=gaussian", "sigma=fixed", "+schedule@sigma.value=linear"]
    experiment = build_experiment(compose("network.hidden=[8]", *words, "sigma.value.start=0.1", "sigma.value.stop=1"))
    state, events = State(), NoEvents()
    progress = Progress(Console(file=StringIO()), 1, 10, 100, [], prints_epochs=False)
    inference = experiment.model(experiment.splits.train.batch(torch.arange(4)))
    state.meter.add(
        1, {name: term.detach() for name, term in inference.terms(experiment.regularizer(inference)).items()}
    )
    assert len(numbers(experiment)) == 3
    assert (
        reads_of(lambda: log_step(experiment, numbers(experiment), events, progress, state)) == 3
    )  # and the count, which is on the CPU


# CUDA graphs ---------------------------------------------------------------------------------------------------------


class FakeGraphs:
    """Stands for machine.graphs: `capture` returns a function that writes to the same tensors each time it is called.

    Unlike a GPU, it has to run what it captures; all tensors of `experiment` and the random state are restored then.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.experiment: Any = None
        self.contains_update = False

    def tensors(self) -> list[Tensor]:
        modules, held = (self.experiment.model, self.experiment.regularizer), self.experiment.optimizer.inner.state
        state = [value for of_one in held.values() for value in of_one.values() if isinstance(value, Tensor)]
        return [*state, *(value for module in modules for value in module.state_dict().values())]

    def beside(self, compute: Callable[[], Any]) -> Any:
        self.calls.append("beside")
        return compute()

    def capture(self, compute: Callable[[], tuple[tuple[str, ...], Tensor]]) -> Any:
        self.calls.append("capture")
        random, tensors = torch.get_rng_state(), self.tensors()
        before = [tensor.clone() for tensor in tensors]
        names, terms = compute()
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        parameters = list(self.experiment.model.parameters())
        written = [parameter.grad for parameter in parameters]

        def replay() -> None:
            self.calls.append("replay")
            terms.copy_(compute()[1])
            for parameter, gradient in zip(parameters, written, strict=True):
                assert gradient is not None
                assert parameter.grad is not None
                gradient.copy_(parameter.grad)
                parameter.grad = None  # a replay does not set attributes

        return (names, terms), replay


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    fake = FakeGraphs()
    monkeypatch.setattr(steps, "graphs", fake)
    return fake


MOVING_RATE = ["+schedule@optimizer.lr=linear", "optimizer.lr.start=1e-2", "optimizer.lr.stop=1e-4", "epochs=3"]


class RatesInMemory(FusedAdam):
    """The update as it is on a GPU: it reads the learning rates from memory, so that a graph can contain it."""

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__(groups, is_capturable=True)


def trained(config: dict[str, Any], graphs: FakeGraphs | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Train ten steps, of which the fifth and the last have fewer images; return the state and the terms' sums."""
    experiment = build_experiment(config)
    torch.manual_seed(0)
    step = Step(experiment)
    if graphs is not None:
        graphs.experiment = experiment
        step.replayed = replayed = Replayed(32)
    terms = []
    for number in range(10):
        experiment.optimizer.advance(number / 3)
        found = step(torch.arange(7 if number in (4, 9) else 32) + number)
        terms.append(torch.stack(list(found.values())).sum(1))
    if graphs is not None:
        graphs.contains_update = replayed.has_update
    return {**experiment.model.state_dict(), **experiment.regularizer.state_dict()}, torch.stack(terms)


@pytest.mark.parametrize(
    "words",
    [
        *([f"sigma={sigma}"] for sigma in ("learned", "shared", "fixed", "deterministic")),
        ["optimizer=sgd", "optimizer.lr=1e-4"],
        MOVING_RATE,
        ["max_grad_norm=1", "prior=scaled_normal", "regularizer=free_bits"],
        ["network=conv", "network.width=4", "likelihood=bernoulli", "likelihood.binarize=dynamic"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("contains_update", [False, True])
def test_a_replayed_step_is_the_eager_step(
    compose: Compose, graphs: FakeGraphs, words: list[str], contains_update: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose("network.hidden=[8]" if "network=conv" not in words else "network.hidden=8", "latent=3", *words)
    eager, eager_terms = trained(deepcopy(config))
    if contains_update:
        monkeypatch.setattr(optimizers, "FusedAdam", RatesInMemory)
    replayed, terms = trained(deepcopy(config), graphs)
    assert graphs.calls == ["beside"] * 3 + ["capture"] + ["replay"] * 5
    assert graphs.contains_update == (contains_update and "optimizer=sgd" not in words)
    error = 1e-5 if graphs.contains_update else 0  # a rate in memory is rounded to float32
    torch.testing.assert_close(terms, eager_terms, rtol=error, atol=error)
    for name, value in eager.items():
        torch.testing.assert_close(value, replayed[name], rtol=error, atol=error, msg=name)


def test_a_step_that_cannot_be_captured_is_eager_and_says_so(
    compose: Compose, graphs: FakeGraphs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(compute: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", refuse)
    config = compose("network.hidden=[8]", "latent=3")
    (eager, _), (replayed, _) = (trained(deepcopy(config), fake) for fake in (None, graphs))
    assert all(torch.equal(value, replayed[name]) for name, value in eager.items())
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("which is slower: operation not permitted when stream is capturing")
