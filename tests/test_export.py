"""`vae export`: the exported programs equal the model, work without this package, and replace only their own files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MixtureSameFamily, Normal
from torch.nn.utils import parametrizations

from vae_cli import load_run
from vae_cli.commands.train import train
from vae_cli.config import catalog
from vae_cli.config.build import build_model
from vae_cli.core.errors import Failure
from vae_cli.model import kernels
from vae_cli.model.distributions import Delta, location
from vae_cli.runs import export as module
from vae_cli.runs import export_folder
from vae_cli.runs.export import describe_prior, difference, export, missing_for_onnx, parts_of
from vae_cli.runs.export_folder import export_to

Ask = Callable[..., Any]
Compose = Callable[..., dict[str, Any]]

MISSING = missing_for_onnx()
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
FORMATS = ["pt2", pytest.param("onnx", marks=needs_onnx)]
SHAPE = (1, 8, 8)
SMALL = {"network=conv": ["network.width=8"], "network=resnet": ["network.width=8"]}

CHOICES = [
    [f"{axis}={choice}", *SMALL.get(f"{axis}={choice}", [])]
    for axis in ("network", "sigma", "likelihood")
    for choice in catalog.groups()[axis].choices
]
CHOICES += [
    ["network=conv", "network.width=8", "network.normalization=batch"],
    ["network=conv", "network.width=8", "network.normalization=group", "network.activation=gelu"],
    ["likelihood=bernoulli", "likelihood.binarize=threshold"],
    ["likelihood=bernoulli", "likelihood.binarize=dynamic"],
    ["precision=bfloat16"],
]


def run_of(config: dict[str, Any]) -> Any:
    """Return what `export` needs of a run, with an untrained model whose weights are all different from 0."""
    torch.manual_seed(0)
    model = build_model(config, SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.train()(torch.rand(64, *SHAPE))  # running statistics
    return SimpleNamespace(model=model.eval(), shape=SHAPE, path=Path("run"))


def call(content: bytes, kind: str, x: Tensor) -> list[Tensor]:
    """Run an exported program as its user would."""
    if kind == "pt2":
        found = torch.export.load(BytesIO(content)).module()(x)
        return [found] if isinstance(found, Tensor) else list(found)
    import onnxruntime

    session = onnxruntime.InferenceSession(content)
    (given,) = session.get_inputs()
    return [torch.from_numpy(found) for found in session.run(None, {given.name: x.numpy()})]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("overrides", CHOICES, ids=" ".join)
@torch.no_grad()
def test_every_choice_is_exported_and_equals_the_model(compose: Compose, overrides: list[str], kind: Any) -> None:
    run = run_of(compose(*overrides, "latent=5"))
    files, differences, _ = export(run, [kind])
    assert set(files) == set(differences) == {f"encoder.{kind}", f"decoder.{kind}"}
    assert max(differences.values()) <= 1e-5
    model, is_random = run.model, "likelihood.binarize=dynamic" in overrides
    model.precision = "float32"
    for count in (1, 5, 40):  # 5 is also the number of latent dimensions
        x = torch.rand(count, *SHAPE)
        posterior = model.encode(x if is_random else model.likelihood.observe(x))
        z = 2 * torch.randn(count, 5)
        loc = location(posterior)
        expected = [loc] if isinstance(posterior, Delta) else [loc, posterior.stddev]
        for found, value in zip(call(files[f"encoder.{kind}"], kind, x), expected, strict=True):
            assert found.shape == (count, 5)
            torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
        (mean,) = call(files[f"decoder.{kind}"], kind, z)
        torch.testing.assert_close(mean, model.decode(z).mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_spectral_normalization_becomes_part_of_the_weights(compose: Compose, kind: Any) -> None:
    run = run_of(compose("network=mlp", "latent=5"))
    linear = [layer for layer in run.model.decoder.modules() if isinstance(layer, nn.Linear)]
    for layer in linear:
        parametrizations.spectral_norm(layer)
    run.model.eval()
    files, *_ = export(run, [kind])
    z = torch.randn(6, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            call(files[f"decoder.{kind}"], kind, z)[0], run.model.decode(z).mean, atol=1e-5, rtol=1e-5
        )
    assert all(hasattr(layer, "parametrizations") for layer in linear)  # the run itself is unchanged
    assert not any("parametrizations" in name for name, _ in parts_of(run)[1].module.named_parameters())


def test_the_plain_form_of_fast_layers_is_exported(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(kernels, "WORTHWHILE", 0)
    run = run_of(compose("likelihood=bernoulli", "latent=5"))
    files, differences, _ = export(run, ["pt2"])
    for content in files.values():
        graph = str(torch.export.load(BytesIO(content)).graph)
        assert "linear" in graph
        assert "mkldnn" not in graph
    assert max(differences.values()) < 1e-5


def test_weights_that_a_part_does_not_use_are_left_out(compose: Compose) -> None:
    run = run_of(compose("latent=5", "prior=vamp", "prior.components=500"))
    encoder, decoder = parts_of(run)
    assert {name.split(".")[1] for name, _ in encoder.module.named_parameters()} == {"encoder"}
    assert {name.split(".")[1] for name, _ in decoder.module.named_parameters()} == {"decoder"}
    assert encoder.outputs == ("loc", "scale")


def test_a_bfloat16_run_is_exported_in_float32(compose: Compose) -> None:
    run = run_of(compose("precision=bfloat16", "latent=5"))
    files, *_ = export(run, ["pt2"])
    assert run.model.precision == "bfloat16"
    z = torch.randn(4, 5)
    with torch.no_grad():
        low = run.model.decode(z).mean
        run.model.precision = "float32"
        whole = run.model.decode(z).mean
    (found,) = call(files["decoder.pt2"], "pt2", z)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert (low - whole).abs().max() > 1e-4


def test_the_files_name_no_folder_of_this_machine(compose: Compose) -> None:
    files, *_ = export(run_of(compose("network=conv", "network.width=8")), ["pt2"] if MISSING else ["pt2", "onnx"])
    for content in files.values():
        assert str(Path(module.__file__).parent).encode() not in content
        assert str(Path(torch.__file__).parent).encode() not in content


def test_a_program_that_differs_from_the_model_is_noticed(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(compose("latent=5"))
    encoder, _ = parts_of(run)
    x = torch.rand(3, *SHAPE)
    loc, scale = encoder.module(x)
    assert difference(encoder, lambda _: (loc, scale), x) == 0
    assert difference(encoder, lambda _: (loc, scale + 1e-3), x) == pytest.approx(1e-3 / float(scale.max()), rel=1e-2)
    assert scale.max() > 1
    assert difference(encoder, lambda _: (loc[:1], scale), x) == float("inf")
    monkeypatch.setattr(module, "ALLOWED", -1.0)
    with pytest.raises(Failure, match=r"differs from the model by .* Nothing was written"):
        export(run, ["pt2"])


@pytest.mark.parametrize("choice", ["standard_normal", "scaled_normal", "mixture", "vamp"])
def test_the_description_of_a_prior_rebuilds_it(compose: Compose, choice: str) -> None:
    model = run_of(compose(f"prior={choice}", "latent=5", *(["prior.components=7"] * (choice == "vamp")))).model
    prior = model.prior()
    found = describe_prior(prior)
    numbers = {name: torch.tensor(value) for name, value in found["parameters"].items()}
    if choice == "standard_normal":
        assert found == {"distribution": "N(0, I)", "parameters": {}}
        numbers = {"loc": torch.zeros(5), "scale": torch.ones(5)}
    rebuilt: Any = Independent(Normal(numbers["loc"], numbers["scale"]), 1)
    if "weights" in numbers:
        rebuilt = MixtureSameFamily(torch.distributions.Categorical(probs=numbers["weights"]), rebuilt)
    z = torch.randn(9, 5)
    torch.testing.assert_close(rebuilt.log_prob(z), prior.log_prob(z).detach())


# The command ----------------------------------------------------------------------------------------------------------

RUNS = {"usual": [], "point": ["sigma=deterministic", "likelihood=bernoulli", "likelihood.binarize=dynamic"]}
WITHOUT_VAE = "import runpy, sys; sys.modules['vae_cli'] = None; runpy.run_path(sys.argv[1])"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in RUNS.items():
            train([*words, "epochs=2", "latent=4", "network.hidden=[16]", f"run_name={name}"])
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with copies of the runs, and return the folder of the usual run."""
    import shutil

    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "usual"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", RUNS)
def test_the_script_works_without_this_package(name: str, kind: str, folder: Path, ask: Ask) -> None:
    found = ask("export", name, "--format", kind)
    assert found.code == 0, found.err
    written = Path("runs") / name / "export"
    script = "use.py" if kind == "pt2" else "use_onnx.py"
    assert f"To try it: python {written / script}" in found.out
    assert {file.name for file in written.iterdir()} == {
        f"encoder.{kind}", f"decoder.{kind}", script, "export.json"
    }  # fmt: skip
    command = [sys.executable, "-W", "error", "-c", WITHOUT_VAE, str(written / script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "reconstructions: (4, 1, 8, 8)\n"
    assert len([line for line in (written / script).read_text().splitlines() if line]) <= 12


def test_the_description(folder: Path, ask: Ask) -> None:
    assert ask("export", "usual", "--format", "pt2", "--weights", "last").code == 0
    found = json.loads((folder / "export" / "export.json").read_text())
    run = load_run("usual", weights="last", device="cpu")
    assert found["weights"]["kind"] == "last"
    assert found["weights"]["step"] == run.step
    assert found["encoder"]["inputs"]["images"]["shape"] == ["B", 1, 8, 8]
    assert found["encoder"]["outputs"]["scale"]["shape"] == found["decoder"]["inputs"]["z"]["shape"] == ["B", 4]
    assert found["posterior"]["distribution"] == "N(loc, diag(scale^2))"
    assert found["likelihood"] == {
        "distribution": "Normal",
        "scale": pytest.approx(float(run.model.likelihood.scale())),
    }
    assert found["prior"]["distribution"] == "N(0, I)"
    x = run.splits.test.batch(torch.arange(20))
    loc, scale = call((folder / "export/encoder.pt2").read_bytes(), "pt2", x)
    torch.testing.assert_close(loc, run.encode(x).mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scale, run.encode(x).stddev, atol=1e-5, rtol=1e-5)
    (mean,) = call((folder / "export/decoder.pt2").read_bytes(), "pt2", loc)
    torch.testing.assert_close(mean, run.decode(loc).mean, atol=1e-5, rtol=1e-5)


def test_what_it_did_not_write_is_not_replaced(folder: Path, ask: Ask) -> None:
    words = ["export", "usual", "--format", "pt2"]
    assert ask(*words).code == 0
    assert ask(*words).code == 0  # its own files
    use = folder / "export" / "use.py"
    use.write_text("print('mine')\n")
    (folder / "export" / "notes.txt").write_text("mine")
    found = ask(*words)
    assert found.code == 2
    assert "contains use.py, which vae export did not write or which has changed since" in found.err
    assert "--overwrite" in found.err
    assert use.read_text() == "print('mine')\n"
    assert ask(*words, "--overwrite").code == 0
    assert use.read_text() != "print('mine')\n"
    assert (folder / "export" / "notes.txt").read_text() == "mine"
    Path("other").mkdir()
    Path("other/encoder.pt2").touch()
    assert "encoder.pt2" in ask(*words, "--to", "other").err
    Path("other/encoder.pt2").unlink()
    Path("other/export.json").write_text('{"weights": 3}')
    assert "export.json" in ask(*words, "--to", "other").err


def test_a_link_is_not_followed(folder: Path, ask: Ask, tmp_path: Path) -> None:
    words = ["export", "usual", "--format", "pt2"]
    (tmp_path / "out").mkdir()
    (folder / "export").symlink_to(tmp_path / "out")
    assert "is a link to a folder outside the run's folder" in ask(*words).err
    (folder / "export").unlink()
    (folder / "export").mkdir()
    (tmp_path / "secret").write_text("as it was")
    (folder / "export" / "use.py").symlink_to(tmp_path / "secret")
    assert ask(*words).code == 2
    assert ask(*words, "--overwrite").code == 0
    assert (tmp_path / "secret").read_text() == "as it was"
    assert not list((tmp_path / "out").iterdir())


def test_files_of_other_weights_are_removed_and_those_of_the_same_weights_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(run: Any, formats: Any) -> Any:
        made = {f"{part}.{kind}": kind.encode() for part in ("encoder", "decoder") for kind in formats}
        return made, dict.fromkeys(made, 0.0), parts_of(run)

    monkeypatch.setattr(export_folder, "export", exported)
    best, there = load_run("usual", device="cpu"), folder / "export"
    export_to(best, there, "best", ["onnx"])
    export_to(best, there, "best", ["pt2"])
    both = {"encoder.pt2", "encoder.onnx", "decoder.pt2", "decoder.onnx", "use.py", "use_onnx.py"}
    assert {file.name for file in there.iterdir()} == both | {"export.json"}
    assert set(json.loads((there / "export.json").read_text())["files"]) == both
    (there / "use_onnx.py").write_text("mine")
    written = export_to(load_run("usual", weights="last", device="cpu"), there, "last", ["pt2"])
    assert {path.name for path in written.removed} == {"encoder.onnx", "decoder.onnx"}
    assert (there / "use_onnx.py").read_text() == "mine"
    assert set(json.loads((there / "export.json").read_text())["files"]) == {"encoder.pt2", "decoder.pt2", "use.py"}


@pytest.mark.parametrize("number", range(1, 6))
def test_an_interrupted_export_can_be_repeated(
    folder: Path, ask: Ask, commands: Any, number: int, tmp_path: Path
) -> None:
    words = ["export", "usual", "--format", "pt2"]
    assert ask(*words, "--weights", "last").code == 0
    done = commands.run(*words, cwd=tmp_path, fault={"at": "replace", "file": "export/", "number": number})
    assert done.returncode == -9
    found = ask(*words)
    assert found.code == 0, found.err
    described = json.loads((folder / "export" / "export.json").read_text())
    assert described["weights"]["kind"] == "best"
    assert all("replaces" not in about for about in described["files"].values())


def test_without_the_extra(
    folder: Path, ask: Ask, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ONNX_NEEDS", ("onnxscript_that_is_missing",))
    said = refused("export", "usual", "--format", "onnx")
    assert "--format onnx needs onnxscript_that_is_missing, which is not installed: type pip install" in said
    found = ask("export", "usual", "--to", "elsewhere")
    assert found.code == 0
    assert "ONNX was not written, because packages are missing: type pip install 'vae-cli[onnx]'" in found.out
    assert {file.name for file in Path("elsewhere").iterdir()} == {
        "encoder.pt2", "decoder.pt2", "use.py", "export.json"
    }  # fmt: skip
    assert not (folder / "export").exists()


def test_a_run_that_starts_again_loses_its_export(folder: Path, ask: Ask) -> None:
    assert ask("export", "usual", "--format", "pt2").code == 0
    words = ["epochs=1", "latent=4", "network.hidden=[16]", "run_name=usual", "overwrite=true"]
    assert ask("train", *words).code == 0
    assert not (folder / "export").exists()


def test_a_model_that_torch_cannot_export_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run("usual", device="cpu")

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    run.model.decoder = nn.Sequential(Branching(), run.model.decoder)
    with pytest.raises(Failure, match=r"torch cannot export the decoder of .*usual"):
        export(run, ["pt2"])
