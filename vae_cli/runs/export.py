"""Encoder and decoder of a run as programs that need nothing of this package: torch.export (.pt2) and ONNX.

Importing torch.export takes seconds, so the functions that need it import it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Laplace, MixtureSameFamily, Normal
from torch.nn.utils import parametrize

from vae_cli.core.errors import Failure, UserError
from vae_cli.core.rng import derive_seed
from vae_cli.core.wording import listed
from vae_cli.model.distributions import Delta, UniformFactors, location
from vae_cli.model.mixtures import NoiseMixture
from vae_cli.model.scales import Standard, factors_of
from vae_cli.model.sphere import PowerSphericalDistribution, UniformOnSphere
from vae_cli.runs.run import Run

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from vae_cli.model.vae import VAE

Format = Literal["pt2", "onnx"]
Call = Callable[[Tensor], Tensor | Sequence[Tensor]]

FORMATS: tuple[Format, ...] = ("pt2", "onnx")
ALLOWED = 1e-5  # difference between an exported program and the model, relative to the larger of 1 and the output
CHECKED = (1, 2, 7)  # sizes of the batches that are compared
TRACED = 3  # images or codes with which the model is traced; torch treats 0 and 1 as special
OPSET = 18  # of ONNX: the oldest that torch writes without converting
ONNX_NEEDS = ("onnxscript", "onnxruntime")
GET_ONNX = "pip install 'vae-cli[onnx]'"
MOST_NUMBERS = 20_000  # in the description of a prior


@dataclass(frozen=True)
class Part:
    """The encoder or the decoder, as it is exported.

    module   maps a tensor, the input, to the output, or to a tuple of outputs if there are several
    input    its name
    outputs  their names
    """

    name: str
    module: nn.Module
    input: str
    outputs: tuple[str, ...]


class Encoder(nn.Module):
    """Images (B, C, H, W) -> loc (B, D) and scale (B, D) of q(z|x), or only loc if scale is not defined."""

    def __init__(self, vae: VAE, has_scale: bool, observes: bool) -> None:
        super().__init__()
        self.vae, self.has_scale, self.observes = vae, has_scale, observes

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.vae.likelihood.observe(images) if self.observes else images  # type: ignore[operator]
        posterior = self.vae.encode(x)
        loc = location(posterior)
        return (loc, posterior.stddev) if self.has_scale else loc


class Decoder(nn.Module):
    """Codes z (B, D) -> the mean images of p(x|z), (B, C, H, W)."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).mean


def missing_for_onnx() -> list[str]:
    """Return the packages that exporting to ONNX needs and that are not installed."""
    return [name for name in ONNX_NEEDS if find_spec(name) is None]


def check_formats(formats: Sequence[Format]) -> None:
    """Raise UserError, with the command that installs it, if a format needs a package that is not installed."""
    if "onnx" in formats and (missing := missing_for_onnx()):
        raise UserError(
            f"--format onnx needs {listed(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"type {GET_ONNX}"
        )


def parts_of(run: Run) -> tuple[Part, Part]:
    """Return copies of the encoder and the decoder that compute in float32 on the CPU, without parametrizations.

    A layer with a parametrization, such as spectral normalization, becomes a plain layer with the same weight.
    Binarization of the images is part of the encoder unless it is random.
    """
    model = _plain_copy(run.model)
    x = _random_images(run, TRACED)
    with torch.no_grad():
        observes = not _is_random(model.likelihood.observe, x)  # type: ignore[arg-type]
        outputs = ("loc", "scale") if has_scale(model.encode(x)) else ("loc",)
    # A program holds all weights of its module, so each part gets only those that it uses.
    encoding, decoding = deepcopy(model), model
    encoding.decoder = encoding.prior = nn.Identity()
    decoding.encoder = decoding.prior = decoding.sigma = nn.Identity()
    encoder = Encoder(encoding, len(outputs) == 2, observes).eval().requires_grad_(False)
    decoder = Decoder(decoding).eval().requires_grad_(False)
    return Part("encoder", encoder, "images", outputs), Part("decoder", decoder, "z", ("mean",))


def _plain_copy(model: VAE) -> VAE:
    model = deepcopy(model).cpu().eval()
    model.precision = "float32"
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # The parametrized weight is a property of a class that the copy shares with the model.
            own = type(module)
            module.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def _is_random(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    with torch.random.fork_rng(devices=[]):
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(function(x))
    return not torch.equal(*found)


def has_scale(posterior: Distribution) -> bool:
    """Return whether a posterior has a standard deviation: not a point mass, and torch knows its variance."""
    if isinstance(posterior, Delta):
        return False
    try:
        return posterior.stddev.shape == posterior.mean.shape
    except NotImplementedError:
        return False


def _random_images(run: Run, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(0, "export", count))
    return torch.rand(count, *run.shape, generator=generator)


def _inputs(run: Run, encoder: Part, count: int) -> dict[str, Tensor]:
    """Return random images in [0, 1], and a code near each of theirs, as inputs for encoder and decoder."""
    x = _random_images(run, count)
    with torch.no_grad():
        loc = as_tuple(encoder.module(x))[0]
    noise = torch.randn(loc.shape, generator=torch.Generator().manual_seed(derive_seed(0, "export", "z")))
    return {"encoder": x, "decoder": loc + noise}


def export(run: Run, formats: Sequence[Format]) -> tuple[dict[str, bytes], dict[str, float], tuple[Part, Part]]:
    """Export encoder and decoder in these formats.

    Returns the content of each file, its largest difference from the model (see ALLOWED), and the parts. The size of a
    batch is free. Each program is read back and compared with the model on random images and codes.
    Raises UserError if a package is missing, and Failure if torch cannot export the model or a program differs from it.
    """
    check_formats(formats)
    parts = parts_of(run)
    files, differences = {}, {}
    for part in parts:
        with _quiet():
            example = _inputs(run, parts[0], TRACED)[part.name]
            try:
                program = _traced(part, example)
                contents = {kind: _serialized(part, program, example, kind) for kind in formats}
                calls = {kind: _loaded(part, content, kind) for kind, content in contents.items()}
            except Exception as error:  # torch raises errors of many kinds, and so may a class of the user's own
                raise Failure(f"torch cannot export the {part.name} of {run.path}: {_reason(error)}") from error
        for kind, call in calls.items():
            file = f"{part.name}.{kind}"
            files[file] = contents[kind]
            differences[file] = max(
                difference(part, call, _inputs(run, parts[0], count)[part.name]) for count in CHECKED
            )
            if not differences[file] <= ALLOWED:
                raise Failure(
                    f"The exported {part.name} ({kind}) of {run.path} differs from the model by "
                    f"{differences[file]:.1e}, more than {ALLOWED:.0e}. Nothing was written."
                )
    return files, differences, parts


def _reason(error: Exception) -> str:
    """Return the first two lines of an error: of some of torch's, the second one says what is wrong."""
    lines = str(error).strip().splitlines()[:2] or [type(error).__name__]
    return " ".join(" ".join(lines).split())[:400]


def difference(part: Part, call: Call, x: Tensor) -> float:
    """Return the largest absolute difference between a program and the part for an input x, divided by the largest
    absolute value of the output if that exceeds 1."""
    with torch.no_grad():
        expected, found = as_tuple(part.module(x)), as_tuple(call(x))
    if [one.shape for one in found] != [one.shape for one in expected]:
        return float("inf")
    pairs = list(zip(found, expected, strict=True))
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in pairs)


def as_tuple(output: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one or several outputs as a tuple."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of the exporters, which concern their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _traced(part: Part, example: Tensor) -> ExportedProgram:
    from torch.export import Dim
    from torch.export import export as trace

    batch = ({0: Dim("batch")},)
    program = trace(part.module, (example,), dynamic_shapes=batch, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths on this machine
    return program


def _serialized(part: Part, program: ExportedProgram, example: Tensor, kind: Format) -> bytes:
    if kind == "pt2":
        from torch.export import save

        whole = BytesIO()
        save(program, whole)
        return whole.getvalue()
    made = torch.onnx.export(
        program, (example,), input_names=[part.input], output_names=list(part.outputs), opset_version=OPSET,
        dynamo=True, verbose=False,
    )  # fmt: skip
    assert made is not None
    model: Any = made.model_proto
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # torch numbers its symbols: s77
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            dimension.dim_param = re.sub(rf"\b{batch}\b", "batch", dimension.dim_param)
    serialized: bytes = model.SerializeToString()
    return serialized


def _loaded(part: Part, content: bytes, kind: Format) -> Call:
    """Read a program back, and return it as a function."""
    if kind == "pt2":
        from torch.export import load

        loaded: Call = load(BytesIO(content)).module()
        return loaded
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(found) for found in session.run(None, {part.input: x.numpy()})]


# Description ----------------------------------------------------------------------------------------------------------


def describe_posterior(posterior: Distribution) -> str:
    """Return a posterior as a formula of the encoder's outputs, or as the name of its distribution."""
    if isinstance(posterior, Delta):
        return "a point mass at loc"
    if factors_of(posterior) is not None:
        return "N(loc, diag(scale^2))"
    if isinstance(posterior, NoiseMixture | PowerSphericalDistribution):
        return posterior.formula
    if isinstance(posterior, Independent) and isinstance(posterior.base_dist, UniformFactors):
        return "uniform with mean loc and standard deviation scale in each dimension"
    moments = "mean loc and marginal standard deviations scale" if has_scale(posterior) else "mean loc"
    return f"{_name(posterior)} with {moments}"


def describe_likelihood(likelihood: Distribution) -> dict[str, Any]:
    """Return the distribution of a pixel, and its scale if all pixels share one."""
    base = likelihood.base_dist if isinstance(likelihood, Independent) else likelihood
    found: dict[str, Any] = {"distribution": _name(base)}
    if isinstance(base, Normal | Laplace):
        scale = base.scale.flatten()
        if bool((scale == scale[0]).all()):
            found["scale"] = float(scale[0])
    return found


def describe_prior(prior: Distribution) -> dict[str, Any]:
    """Return the distribution of codes and its parameters: loc and scale (D,), or weights (K,), loc and scale (K, D).

    N(0, I) and the sphere have no parameters. Others are left out if they are not simple, or more than MOST_NUMBERS
    numbers.
    """
    if isinstance(prior, UniformOnSphere):
        return {"distribution": "uniform on the sphere |z| = 1", "parameters": {}}
    mixture = prior if isinstance(prior, MixtureSameFamily) else None
    normal = factors_of(prior if mixture is None else mixture.component_distribution)
    if normal is None:
        return {"distribution": _name(prior), "parameters": None}
    if isinstance(prior, Standard):
        return {"distribution": "N(0, I)", "parameters": {}}
    parameters = {"loc": normal.loc, "scale": normal.scale.expand_as(normal.loc)}
    if mixture is not None:
        parameters = {"weights": mixture.mixture_distribution.probs, **parameters}
    formula = "N(loc, diag(scale^2))" if mixture is None else "sum_k weights_k N(loc_k, diag(scale_k^2))"
    is_small = sum(value.numel() for value in parameters.values()) <= MOST_NUMBERS
    numbers = {name: value.detach().cpu().tolist() for name, value in parameters.items()} if is_small else None
    return {"distribution": formula, "parameters": numbers}


def _name(distribution: Distribution) -> str:
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    name = type(base).__name__ if not type(base).__name__.startswith("_") else type(base).__mro__[1].__name__
    return name.removesuffix("Distribution")
