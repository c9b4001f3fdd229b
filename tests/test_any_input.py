"""Properties of any input: every command line ends in an exit code, networks map shapes, and losses are finite."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from vae_cli.config import catalog
from vae_cli.config.build import build_model, build_parts
from vae_cli.config.naming import check_path, clean, run_folder, run_name
from vae_cli.core.compatibility import offers
from vae_cli.core.errors import UserError

Ask = Callable[..., Any]
KEYS = [*catalog.defaults(), *catalog.settings(), "sigma.value", "regularizer.beta", "optimizer.lr", "network.hidden"]
# The special characters of Hydra's grammar and of a shell, and some letters.
LETTERS = st.sampled_from([*"=,.:[]{}()~+@$/\\'\"!#&|;<>?*`^%- \t0123456789eExnab_", "é", "\u200b", "\U0001f600"])
TEXT = st.text(LETTERS, max_size=12)
VALUE = TEXT | st.sampled_from(
    ["null", "true", "nan", "-inf", "1e400", "[]", "{}", "???", "fixed", "1", "0", "-1", "1.5"]
)
WORD = st.one_of(
    TEXT,
    st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), st.sampled_from(KEYS), VALUE),
    st.builds("{}.{}={}".format, st.sampled_from(list(catalog.defaults())), TEXT, VALUE),
    st.builds("+schedule@{}={}".format, st.sampled_from(KEYS) | TEXT, VALUE),
)


def profile(examples: int) -> Callable[[Any], Any]:
    """Return settings for the same examples each time, without shrinking a failing one, which takes long."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def survives(ask: Ask, accepted: type[BaseException], listed: Callable[[], Any], place: Path) -> Callable[..., int]:
    """Run the program with any arguments, and return its exit code; 0 if training would have started."""

    def call(words: list[str]) -> int:
        before = listed()
        try:
            found = ask(*words)
        except accepted:
            for made in sorted(listed().keys() - before.keys(), reverse=True):  # Hydra's record of a training
                Path(made).rmdir() if Path(made).is_dir() else Path(made).unlink()
            return 0
        assert found.code in (0, 1, 2), (words, found)
        assert "Traceback" not in found.err + found.out, (words, found)
        assert "HYDRA_FULL_ERROR" not in found.err, (words, found)
        if found.code:
            assert found.err.startswith("vae: "), (words, found)
            assert listed() == before, words
        return int(found.code)

    return call


def refusals(codes: list[int]) -> str:
    return f"{sum(map(bool, codes))} of {len(codes)} refused, none with a traceback"


def test_overrides(survives: Callable[..., int], is_long: bool, record_property: Callable[..., None]) -> None:
    codes: list[int] = []

    @profile(2000 if is_long else 60)
    @given(st.lists(WORD, min_size=1, max_size=3), st.booleans())
    def attack(words: list[str], is_sweep: bool) -> None:
        words = [word for word in words if not word.lstrip().startswith(("runs_dir", "run_name", "-"))]
        codes.append(survives(["train", *(["-m"] if is_sweep else []), "--", *words, "epochs=0"]))

    attack()
    record_property("overrides at random", refusals(codes))


@pytest.mark.parametrize("command", ["sample", "interpolate", "evaluate", "compare", "runs"])
def test_names_of_runs(
    command: str, survives: Callable[..., int], is_long: bool, record_property: Callable[..., None]
) -> None:
    names = TEXT | st.sampled_from(
        ["..", ".", "/", "~", "latest ", "runs/", "runs/digits/../..", "*", "a" * 300, "é/é"]
    )
    codes: list[int] = []

    @profile(500 if is_long else 40)
    @given(names)
    def attack(name: str) -> None:
        codes.append(survives([command, *(["--device", "tpu"] if command != "runs" else []), "--", name]))

    attack()
    record_property("names of runs at random", refusals(codes))


def test_every_network_maps_every_shape_or_refuses_it(
    compose: Callable[..., dict[str, Any]], is_long: bool, record_property: Callable[..., None]
) -> None:
    configs = {
        name: compose(f"network={name}", *(["network.hidden=[8]"] if name in ("mlp", "conv") else []))
        for name in catalog.groups()["network"].choices
    }
    configs["conv"]["network"]["hidden"] = 8
    for name in ("conv", "resnet"):
        configs[name]["network"] |= {"width": 4, "max_width": 8}
    refused: list[bool] = []
    side = st.integers(1, 40)

    @profile(600 if is_long else 60)
    @given(st.sampled_from(list(configs)), st.sampled_from([1, 2, 3]), side, side, st.integers(1, 9), st.integers(1, 3))
    def attack(name: str, channels: int, height: int, width: int, latent: int, batch: int) -> None:
        config = {**configs[name], "latent": latent, "prior": {**configs[name]["prior"], "latent": latent}}
        shape = (channels, height, width)
        try:
            model = build_model(config, shape).eval()
        except UserError as error:
            if not ("8 to 128 pixels" in str(error) and name in ("conv", "resnet") and min(height, width) < 8):
                raise
            refused.append(True)
            return
        refused.append(False)
        inference = model(torch.rand(batch, *shape))
        assert inference.loc.shape == (batch, latent)
        assert inference.likelihood.mean.shape == (batch, *shape)
        assert model.decode(torch.randn(batch, latent)).mean.shape == (batch, *shape)

    attack()
    record_property("shapes", f"{len(refused)} tried, {sum(refused)} refused with a message")


def test_the_loss_of_every_sigma_and_likelihood_is_finite_on_extreme_images(
    compose: Callable[..., dict[str, Any]], record_property: Callable[..., None]
) -> None:
    one = torch.zeros(1, 1, 8, 8)
    one[..., 3, 4] = 1
    batches = [torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), one, torch.ones(3, 1, 8, 8), one.repeat(2, 1, 1, 1)]
    batches.append(torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 255)
    tried = 0
    for sigma in catalog.groups()["sigma"].choices:
        for likelihood in catalog.groups()["likelihood"].choices:
            words = [f"sigma={sigma}", f"likelihood={likelihood}", "network.hidden=[8]", "latent=2"]
            config = compose(*words, *(["prior=sphere"] if sigma == "power_spherical" else []))
            model, parts = build_model(config, (1, 8, 8)), build_parts(config)
            assert offers(parts["sigma"], "noise") == (sigma != "deterministic")
            for x in batches:
                for is_training in (True, False):
                    model.train(is_training)
                    inference = model(x)
                    loss = (inference.distortion + parts["regularizer"](inference)).mean()
                    assert torch.isfinite(loss), (sigma, likelihood, x.mean())
                    loss.backward()
                    gradients = [p.grad for p in model.parameters() if p.grad is not None]
                    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients), (sigma, likelihood)
                    tried += 1
    record_property("losses of extreme images that are finite", f"{tried} of {tried}")


def test_the_name_of_a_run_needs_no_quotes(is_long: bool) -> None:
    choices = {name: setting.default for name, setting in catalog.defaults().items() if name != "experiment"}
    values = (
        st.text()
        | st.floats(allow_subnormal=False)
        | st.integers()
        | st.none()
        | st.booleans()
        | st.lists(st.text(), max_size=3)
    )

    @profile(2000 if is_long else 200)
    @given(st.dictionaries(st.text(min_size=1, max_size=8), values, min_size=1, max_size=4), st.text(min_size=1))
    def attack(config: dict[str, Any], choice: str) -> None:
        name = run_name(config, {**choices, "sigma": choice}, {"choices": choices})
        assert shlex.split(name) == [name]
        assert shlex.quote(name) == name
        override = OverridesParser.create().parse_override(f"run_name={name}")
        assert str(override.value()) == name or override.value() == name
        check_path("run_name", name)
        assert clean(name) == clean(clean(name))
        assert len(name.encode()) <= 150

    attack()


def test_different_values_give_different_names(is_long: bool) -> None:
    numbers = st.floats(allow_nan=False, allow_subnormal=False) | st.integers()
    values = TEXT | st.text(st.sampled_from("ab_- ,.é"), max_size=4) | numbers

    @profile(2000 if is_long else 300)
    @given(values, values)
    def attack(one: object, other: object) -> None:
        names = [run_name({"x": value}, {}, {"choices": {}}) for value in (one, other)]
        assert names[0] != names[1] or str(one) == str(other)

    attack()


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("photos", "image-folder-photos"),
        ("./my_photos/", "image-folder-my_photos"),
        ("my-photos", "image-folder-my-photos"),
        (".", "image-folder-here"),
        ("..", r"image-folder-.*-\w{8}"),
        ("/data/photos", r"image-folder-photos-\w{8}"),
        ("x/photos", r"image-folder-photos-\w{8}"),
        ("写真", r"image-folder-\w{8}"),
        ("my photos", r"image-folder-my-photos-\w{8}"),
        ("/", r"image-folder-\w{8}"),
    ],
)
def test_runs_are_stored_under_the_name_of_the_image_folder(
    path: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = {
        "runs_dir": "runs", "run_name": None, "choices": {"dataset": "image_folder"}, "dataset": {"path": path},
    }  # fmt: skip
    found = run_folder(config, "default")
    assert re.fullmatch(folder, found.parent.name), found
    assert found.name == "default"
    assert run_name({"dataset": {"path": path}}, {}, {"choices": {}}) == "default"
