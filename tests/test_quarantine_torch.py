"""torch's private names: each exists and does the same as the public way, which is used if the name is missing.

A failure here with a new version of torch means that model/kernels.py takes the slower public way, or should.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap
from torch.optim import Adam

import vae_cli
from vae_cli.axes.optimizer import ScheduledOptimizer
from vae_cli.model import kernels
from vae_cli.model.kernels import Dense, FusedAdam

PACKAGE = Path(vae_cli.__file__).parent
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def private_names_of_torch(source: str) -> set[str]:
    """The dotted names below torch that have a part with one or two leading underscores, dunders apart."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if not name.replace(".", "").isidentifier():  # a call inside, as in torch.zeros(1).mean
                continue
            if parts[0] == "torch" and any(part.startswith("_") and not part.endswith("__") for part in parts):
                found.add(name)
    return found


def test_private_names_are_used_in_one_module_only() -> None:
    used = {file: private_names_of_torch(file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert used.pop(PACKAGE / "model" / "kernels.py") == {
        "torch.ops.mkldnn._linear_pointwise",
        "torch._C",
        "torch._C._are_functorch_transforms_active",
        "torch._fused_adam_",
    }
    assert not {str(file.relative_to(PACKAGE)): names for file, names in used.items() if names}


@pytest.fixture(autouse=True)
def unremembered() -> Iterator[None]:
    """Forget before and after each test whether torch has the names."""
    caches = (kernels.onednn_is_faster, kernels.has_fused_adam)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


# -- torch.ops.mkldnn._linear_pointwise -----------------------------------------------------------------------------


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(1, 1, 1), (7, 33, 65), (128, 784, 400)])
def test_the_product_of_onednn_is_linear(batch: int, inputs: int, outputs: int, has_bias: bool) -> None:
    assert kernels.has_onednn()
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in ((batch, inputs), (outputs, inputs)))
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(kernels.onednn_product(x, weight, bias).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operators", [{}, {"_linear_pointwise": lambda: None}], ids=["gone", "other arguments"])
def test_a_dense_layer_works_without_the_product(operators: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=SimpleNamespace(**operators)))
    monkeypatch.setattr(kernels, "WORTHWHILE", 0)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("platform.processor", lambda: "AuthenticAMD")
    assert not kernels.has_onednn()
    layer, x = Dense(30, 20), torch.randn(6, 30)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


# -- torch._C._are_functorch_transforms_active ----------------------------------------------------------------------


def test_transforms_of_torch_func_are_noticed() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._are_functorch_transforms_active())
        return x.sum()

    x = torch.ones(3)
    look(x)
    vmap(look)(x[None])
    grad(look)(x)
    jvp(look, (x,), (x,))
    assert seen == [False, True, True, True]


@needs_onednn
def test_a_dense_layer_that_cannot_notice_them_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(kernels, "WORTHWHILE", 0)
    layer, x = Dense(30, 20), torch.randn(6, 30)
    assert "OneDNNLinear" in str(layer(x).grad_fn)
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert "OneDNNLinear" not in str(layer(x).grad_fn)
    vmap(layer)(x.expand(2, -1, -1))


# -- torch._fused_adam_ ---------------------------------------------------------------------------------------------


def steps(optimizer: Any, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The parameters after three steps on random gradients."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(2))]


def test_a_fused_step_is_adams_to_the_last_bit() -> None:
    assert kernels.has_fused_adam()
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
    adam = Adam(ours, **settings)  # type: ignore[arg-type]
    for parameter in ours:
        parameter.grad = torch.zeros_like(parameter)
    fused = FusedAdam.of(adam)
    assert fused is not None
    expected = steps(Adam(theirs, **settings), theirs)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(steps(fused, ours), expected, strict=True))


@pytest.mark.parametrize("name", ["_fused_adam_"])
@pytest.mark.parametrize("change", ["gone", "other arguments"])
def test_an_optimizer_works_without_a_name(name: str, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"lr": 1e-2, "fused": False}  # torch itself uses the names for fused=true
    theirs = parameters()
    expected = steps(Adam(theirs, **settings), theirs)  # type: ignore[arg-type]
    if change == "gone":
        monkeypatch.delattr(torch, name)
    else:
        monkeypatch.setattr(torch, name, lambda: None)
    assert not kernels.has_fused_adam()
    fused = Adam(parameters(), lr=1e-2, fused=True)
    fused.param_groups[0]["params"][0].grad = torch.ones(5, 3)
    assert FusedAdam.of(fused) is None
    ours = parameters()
    assert all(
        torch.equal(one, other)
        for one, other in zip(steps(ScheduledOptimizer(Adam, ours, settings), ours), expected, strict=True)
    )


# -- __dynamo_disable -----------------------------------------------------------------------------------------------

USE = """
import sys
from contextlib import nullcontext
import torch
from vae_cli.model import kernels
{change}
with {context}:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


def imports_the_compiler(context: str, change: str = "") -> bool:
    program = USE.format(context=context, change=change)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip() == "True"


def test_an_optimizer_is_made_without_the_compiler() -> None:
    assert not imports_the_compiler("kernels.without_compiler()")


def test_torch_still_imports_its_compiler_otherwise() -> None:
    assert imports_the_compiler("nullcontext()"), "without_compiler is no longer needed: delete it"


def test_an_optimizer_is_made_if_the_mark_has_another_name() -> None:
    assert imports_the_compiler("kernels.without_compiler()", "kernels.DISABLE_ATTRIBUTE = '_renamed'")


def test_torch_is_as_before_when_an_optimizer_has_been_made() -> None:
    functions = [inspect.unwrap(getattr(torch.optim.Optimizer, name)) for name in ("add_param_group", "state_dict")]
    before = [dict(vars(function)) for function in functions]
    with kernels.without_compiler():
        assert all(hasattr(function, kernels.DISABLE_ATTRIBUTE) for function in functions)
    assert [dict(vars(function)) for function in functions] == before
