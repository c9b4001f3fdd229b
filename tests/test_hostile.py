"""Files from somebody else: a run folder, a picture, a pack. Bad ones are refused with a message: none of their code
runs, nothing is written outside the run's folder, and no memory is allocated for sizes that they merely claim."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from vae_cli.axes.dataset.pack import open_pack
from vae_cli.core.errors import UserError
from vae_cli.core.images import load_image
from vae_cli.runs.find import find_runs
from vae_cli.runs.folder import RunDir

Refused = Callable[..., str]
Ask = Callable[..., Any]
RUN = Path("runs/digits/a")
MARKER = "pwned"
QUESTIONS = [
    ["sample", str(RUN), "--count", "2"],
    ["interpolate", str(RUN), "--pair", "0,1"],
    ["evaluate", str(RUN), "--quick", "--metrics", "rate"],
    ["compare", str(RUN), "runs/digits/b", "--jobs", "1"],
]


class Marks:
    """Its pickle writes a file if loading it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


class Bytes:
    """Its pickle asks for three gigabytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (3_000_000_000,)


def saved(state: object) -> bytes:
    whole = BytesIO()
    torch.save(state, whole)
    return whole.getvalue()


def with_part(ending: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a torch file in which one part is replaced."""
    whole = BytesIO()
    with zipfile.ZipFile(BytesIO(saved({"a": torch.zeros(4)}))) as source, zipfile.ZipFile(whole, "w") as target:
        for name in source.namelist():
            is_it = name.endswith(ending)
            target.writestr(name, content if is_it else source.read(name), compression if is_it else None)
    return whole.getvalue()


def changed(change: Callable[[dict[str, Any]], object], file: str = "best.pt") -> bytes:
    state = torch.load(RUN / file, weights_only=True)
    change(state)
    return saved(state)


def of_shape(shape: object) -> bytes:
    return changed(lambda state: state.update(shape=shape))


def weights(change: Callable[[Tensor], object]) -> bytes:
    return changed(lambda state: state.update(model={name: change(t) for name, t in state["model"].items()}))


CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "pickle that runs a command": lambda: pickle.dumps({"format": 1, "model": Marks()}, 2),
    "torch file that runs a command": lambda: with_part("data.pkl", pickle.dumps({"a": Marks()}, 2)),
    "torch file that runs a command, protocol 4": lambda: with_part("data.pkl", pickle.dumps({"a": Marks()}, 4)),
    "three gigabytes of bytearray": lambda: with_part("data.pkl", pickle.dumps({"a": Bytes()}, 2)),
    "zip bomb": lambda: with_part("data/0", b"\0" * 300_000_000, zipfile.ZIP_DEFLATED),
    "tensor larger than its storage": lambda: with_part(
        "data.pkl", saved_pickle().replace(b"K\x04", b"J" + struct.pack("<i", 2**31 - 1))
    ),
    "expanded tensor of 10^12": lambda: weights(lambda t: torch.zeros(1).expand(10**12)),
    "no zip": lambda: b"hello",
    "nothing": lambda: b"",
    "half": lambda: (RUN / "best.pt").read_bytes()[:3000],
    "list": lambda: saved([1, 2]),
    "no model": lambda: changed(lambda state: state.pop("model")),
    "model that is a number": lambda: changed(lambda state: state.update(model=3)),
    "weights that are numbers": lambda: weights(lambda t: 1),
    "sparse weights": lambda: weights(lambda t: t.to_sparse()),
    "other weights": lambda: weights(lambda t: torch.stack([t, t])),
    "a weight more": lambda: changed(lambda state: state["model"].update(more=torch.zeros(3))),
    "no weights": lambda: changed(lambda state: state.update(model={})),
    "newer format": lambda: changed(lambda state: state.update(format=99)),
    "format of words": lambda: changed(lambda state: state.update(format="x")),
    "step of words": lambda: changed(lambda state: state.update(step="x")),
    "images that are a number": lambda: changed(lambda state: state.update(images=3)),
    "shape of words": lambda: of_shape("abc"),
    "shape of two": lambda: of_shape([1, 8]),
    "shape below 0": lambda: of_shape([1, -8, 8]),
    "no shape": lambda: of_shape(None),
    "shape of 40 GB": lambda: of_shape([1, 99_999, 99_999]),
}


def saved_pickle() -> bytes:
    with zipfile.ZipFile(BytesIO(saved({"a": torch.zeros(4)}))) as parts:
        return parts.read(next(name for name in parts.namelist() if name.endswith("data.pkl")))


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(place: Path, refused: Refused, name: str) -> None:
    (RUN / "best.pt").write_bytes(CHECKPOINTS[name]())
    before = peak()
    assert re.search(r"best\.pt (is|was|does|has)", refused("sample", str(RUN), code=1))
    assert not (place / MARKER).exists()
    assert peak() - before < 200_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_of_a_process_that_loads_a_hostile_checkpoint(place: Path) -> None:
    (RUN / "best.pt").write_bytes(CHECKPOINTS["three gigabytes of bytearray"]())
    program = (
        "import re, sys\nfrom vae_cli.cli import main\nsys.argv = ['vae', 'sample', 'a']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n"  # not from resource, whose peak includes the parent's
        "    print(stop.code, re.search('VmHWM:\\\\s+(\\\\d+)', open('/proc/self/status').read())[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    code, kilobytes = done.stdout.split()
    assert code == "1"
    assert int(kilobytes) < 1_500_000


def replaced(old: str, new: str) -> Callable[[], str]:
    def text() -> str:
        whole = (RUN / "config.yaml").read_text()
        assert old in whole
        return whole.replace(old, new)

    return text


def fixed(text: str) -> Callable[[], str]:
    return lambda: text


LAUGHS = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
CONFIGS: dict[str, Callable[[], str]] = {
    "tag": fixed(f"!!python/object/apply:os.system ['touch {MARKER}']"),
    "nested tag": replaced("latent: 2\nepochs", f"latent: !!python/object/apply:os.system ['touch {MARKER}']\nepochs"),
    "billion laughs": lambda: "a: &a [x, x, x]\n" + LAUGHS + (RUN / "config.yaml").read_text(),
    "deep": fixed("[" * 3000 + "]" * 3000),
    "deep mapping": fixed("{a: " * 3000 + "}" * 3000),
    "large": fixed("# " + "x" * 2_000_000),
    "system": replaced("vae_cli.axes.sigma.Learned", "os.system"),
    "eval": replaced("vae_cli.axes.sigma.Learned", "builtins.eval"),
    "call": replaced("vae_cli.axes.sigma.Learned", "hydra.utils.call"),
    "own function": replaced("vae_cli.axes.sigma.Learned", "vae_cli.core.files.write_text"),
    "torch.load": replaced("vae_cli.axes.sigma.Learned", "torch.load"),
    "function of an axis": replaced("vae_cli.axes.network.MLP", "vae_cli.axes.network.head"),
    "class of another axis": replaced("vae_cli.axes.network.MLP", "vae_cli.axes.sigma.Fixed"),
    "imported into an axis": replaced("vae_cli.axes.sigma.Learned", "vae_cli.axes.sigma.nn.Module"),
    "partial": replaced("vae_cli.axes.sigma.Learned", "vae_cli.axes.sigma.Learned\n  _partial_: true"),
    "args": replaced("vae_cli.axes.sigma.Learned", "vae_cli.axes.sigma.Learned\n  _args_: [1]"),
    "nested": replaced("  activation: relu", f"  activation:\n    _target_: os.system\n    command: touch {MARKER}"),
    "nested deeper": replaced("  - 8", f"  - _target_: os.system\n    command: touch {MARKER}"),
    "resolver": replaced("  activation: relu", "  activation: ${oc.env:HOME}"),
    "resolver of numbers": replaced("latent: 2\nepochs", "latent: ${oc.decode:2}\nepochs"),
    "no target": replaced("  _target_: vae_cli.axes.sigma.Learned", "  x: 1"),
    "target that is a list": replaced("_target_: vae_cli.axes.sigma.Learned", "_target_: [os.system]"),
    "latent of words": replaced("latent: 2\nepochs", "latent: many\nepochs"),
    "latent of 10^12": replaced("latent: 2\nepochs", "latent: 1000000000000\nepochs"),
    "another latent": replaced("latent: 2\nepochs", "latent: 5\nepochs"),
    "another latent of the prior": replaced("StandardNormal\n  latent: 2", "StandardNormal\n  latent: 100000000000"),
    "no latent": replaced("latent: 2\nepochs", "epochs"),
    "units that do not fit into memory": replaced("  - 8", "  - 99999999"),
    "other units": replaced("  - 8", "  - 9"),
    "seed of words": replaced("seed: 0\nmax", "seed: x\nmax"),
    "epochs in a list": replaced("epochs: 1\n", "epochs: [1]\n"),
    "choices in a list": replaced("  sigma: learned", "  sigma: [1]"),
    "no choices": replaced("choices:\n  dataset: digits", "choices:\n  nowhere: digits"),
    "escape sequences": replaced("  sigma: learned", '  sigma: "\\e[31mred"'),
    "precision": replaced("precision: float32", "precision: float9"),
    "null": fixed("\0\0"),
    "empty": fixed(""),
    "list": fixed("- a"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(place: Path, ask: Ask, name: str) -> None:
    (RUN / "config.yaml").write_text(CONFIGS[name]())
    before = peak()
    for words in QUESTIONS[:2]:
        found = ask(*words)
        assert found.code in (1, 2), (words, found)
        assert found.err.startswith("vae: ")
        assert "HYDRA_FULL" not in found.err
        assert os.environ["HOME"] not in found.err.replace(str(place), "")
    assert ask("runs").code == 0
    assert "\x1b" not in ask("runs").out
    assert not (place / MARKER).exists()
    assert peak() - before < 200_000_000


@pytest.mark.parametrize("name", ["system", "units that do not fit into memory", "escape sequences", "billion laughs"])
def test_configurations_stop_an_evaluation(place: Path, refused: Refused, ask: Ask, name: str) -> None:
    (RUN / "config.yaml").write_text(CONFIGS[name]())
    code = 2 if name == "system" else 1
    refused("evaluate", str(RUN), "--quick", "--metrics", "rate", code=code)
    found = ask(*QUESTIONS[3])
    assert found.code in (1, 2)
    assert "HYDRA_FULL" not in found.err
    assert not (place / MARKER).exists()


def test_places_that_a_configuration_names_are_not_written_to(place: Path, refused: Refused, tmp_path: Path) -> None:
    there = tmp_path / "elsewhere"
    (RUN / "config.yaml").write_text(
        replaced(
            "_target_: vae_cli.axes.dataset.Digits\n  validation: 200",
            f"_target_: vae_cli.axes.dataset.ImageFolder\n  path: photos\n  side: 8\n  channels: 1\n  test: 2\n"
            f"  validation: 1\n  data_dir: {there}",
        )()
    )
    (RUN / "best.pt").write_bytes(changed(lambda state: state.update(images=None)))
    assert "type --data-dir FOLDER" in refused("sample", str(RUN), "--from", "posterior", "--images", "0")
    assert "data_dir=FOLDER" in refused("train", "--repeat", str(RUN))
    assert not there.exists()


def test_the_runs_own_folder_for_data_is_used_when_it_is_named(
    place: Path, ask: Ask, accepted: type[BaseException], tmp_path: Path
) -> None:
    there = tmp_path / "elsewhere"
    words = [
        "_target_: vae_cli.axes.dataset.Digits\n  validation: 200",
        "_target_: vae_cli.axes.dataset.ImageFolder\n  path: photos\n",
    ]
    settings = f"  side: 8\n  channels: 1\n  test: 2\n  validation: 1\n  data_dir: {there}"
    (RUN / "config.yaml").write_text(replaced(words[0], words[1] + settings)())
    for file in ("best.pt", "checkpoint.pt"):
        (RUN / file).write_bytes(changed(lambda state: state.update(images=None), file))
    question = ["sample", str(RUN), "--from", "posterior", "--images", "0", "--data-dir", str(there)]
    assert ask(*question).code == 0
    assert (there / "packed").is_dir()
    assert ask(*question[:-2]).code == 0  # existing data are read
    shutil.rmtree(there)
    with pytest.raises(accepted):
        ask("train", "--repeat", str(RUN), f"data_dir={there}")
    assert (there / "packed").is_dir()


FIELDS: list[Any] = [None, [], {}, "x", "\x1b[31m", True, 10**4000, -1, [[[]]], {"a": {"b": None}}, 1e308, ["<b>"]]


@pytest.mark.usefixtures("place")
def test_every_field_of_a_summary_with_every_kind_of_value(
    ask: Ask, is_long: bool, record_property: Callable[[str, object], None]
) -> None:
    whole = RunDir(RUN).summary()
    tried = 0
    for key in whole:
        for value in FIELDS if is_long else FIELDS[:8]:
            (RUN / "summary.json").write_text(json.dumps({**whole, key: value}))
            for words in (["runs"], ["compare", str(RUN), "runs/digits/b", "--jobs", "1", "--reference", "nowhere"]):
                found = ask(*words)
                assert found.code == (0 if words == ["runs"] else 2), (key, value, found)
                assert "\x1b" not in found.out + found.err
                assert "HYDRA_FULL" not in found.err
            tried += 1
    record_property("summaries with a wrong field", f"{tried} of {tried} survived")


SETTINGS: list[Any] = [
    *FIELDS, float("nan"), float("inf"), -float("inf"), 10**400, -(10**30), 1e-320, {1: 2}, {"_target_": "x"},
    "x" * 20_000, "\udcff", "../..", "NaN", [1, "x"],
]  # fmt: skip


@pytest.mark.usefixtures("place")
def test_settings_of_a_configuration_with_every_kind_of_value(
    ask: Ask, is_long: bool, record_property: Callable[[str, object], None]
) -> None:
    whole = yaml.safe_load((RUN / "config.yaml").read_text())
    keys = [(None, key) for key in whole]
    keys += [(axis, key) for axis, node in whole.items() if isinstance(node, dict) for key in node]
    cases = [(axis, key, value) for axis, key in keys for value in SETTINGS]
    random.Random(0).shuffle(cases)
    cases = cases if is_long else cases[:100]
    refused = 0
    for axis, key, value in cases:
        changed = deepcopy(whole)
        (changed if axis is None else changed[axis])[key] = value
        text = yaml.dump(changed, allow_unicode=True)
        (RUN / "config.yaml").write_bytes(text.encode(errors="surrogateescape"))
        codes = []
        for words in (["runs"], QUESTIONS[0], [*QUESTIONS[3], "--reference", "nowhere"]):
            found = ask(*words)
            codes.append(found.code)
            assert found.code in (0, 1, 2), (axis, key, value, words, found)
            assert "HYDRA_FULL" not in found.err, (axis, key, value, words, found)
            assert "\x1b" not in found.out + found.err
            assert max(map(len, found.err.splitlines()), default=0) < 2000, (axis, key, value, words)
        assert codes[0] == 0, (axis, key, value)
        refused += codes[1] > 0
    record_property("configurations with a wrong setting", f"{len(cases)} survived, {refused} of them refused")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("file", ["best.pt", "checkpoint.pt"])
def test_fields_of_a_checkpoint_with_every_kind_of_value(
    file: str, ask: Ask, is_long: bool, record_property: Callable[[str, object], None]
) -> None:
    whole = torch.load(RUN / file, weights_only=True)
    keys = [(part, key) for part, node in whole.items() if isinstance(node, dict) for key in node]
    cases = [(part, key, value) for part, key in [*((None, key) for key in whole), *keys] for value in SETTINGS]
    random.Random(0).shuffle(cases)
    cases = cases if is_long else cases[:40]
    for part, key, value in cases:
        state = deepcopy(whole)
        (state if part is None else state[part])[key] = value
        (RUN / file).write_bytes(saved(state))
        for words in (["runs"], [*QUESTIONS[0], "--weights", "best" if file == "best.pt" else "last"]):
            found = ask(*words)
            assert found.code in (0, 1, 2), (part, key, value, words, found)
            assert "HYDRA_FULL" not in found.err, (part, key, value, words, found)
    record_property(f"{file} with a wrong field", f"{len(cases)} of {len(cases)} survived")


TEXTS = {
    "deep": "[" * 100_000,
    "digits": '{"status": "finished", "epoch": ' + "9" * 10_000 + "}",
    "not a number": '{"status": "finished", "test": {"rate": NaN}}',
    "infinity": '{"status": "finished", "test": {"rate": -Infinity}}',
    "too large": '{"status": "finished", "test": {"rate": 1e999}}',
    "escape": '{"status": "\\u001b[31mred"}',
    "other status": '{"status": "[red]x"}',
    "half": '{"status": ',
    "bytes": "\udcff\udcfe",
    "nothing": "",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("file", ["summary.json", "metrics.jsonl", "evaluation/metrics.json"])
@pytest.mark.usefixtures("place")
def test_json(ask: Ask, file: str, name: str) -> None:
    (RUN / "evaluation").mkdir()
    (RUN / file).write_bytes(TEXTS[name].encode(errors="surrogateescape"))
    found = ask("runs")
    assert found.code == 0
    assert "\x1b" not in found.out
    assert found.out.count("damaged") == (file == "summary.json")
    for words in ([*QUESTIONS[2], "--device", "tpu"], [*QUESTIONS[3], "--reference", "nowhere"]):
        found = ask(*words)
        assert found.code in (1, 2)
        assert "HYDRA_FULL" not in found.err
        assert "\x1b" not in found.err


def test_an_evaluation_with_wrong_fields(place: Path, ask: Ask) -> None:
    assert ask("evaluate", str(RUN), "--quick", "--metrics", "rate").code == 0
    file = RUN / "evaluation/metrics.json"
    whole = json.loads(file.read_text())
    entry = next(iter(whole["figures"]))
    wrong: list[Mapping[str, Any]] = [{**whole, key: value} for key in whole for value in (None, [], {"a": 1}, "x")]
    wrong += [
        {**whole, "figures": {entry: {**whole["figures"][entry], key: value}}}
        for key in whole["figures"][entry]
        for value in (None, [None], {}, "\x1b[31m", True)
    ]
    for found in wrong:
        file.write_text(json.dumps(found))
        said = ask("evaluate", str(RUN), "--quick", "--metrics", "rate", "--device", "tpu")
        assert said.code in (1, 2), found
        assert "HYDRA_FULL" not in said.err, (found, said)
        assert "\x1b" not in said.err


@pytest.mark.skipif(os.name == "nt", reason="links take rights there")
class TestLinks:
    @pytest.mark.parametrize("name", ["summary.json", "config.yaml", "best.pt", "metrics.jsonl"])
    def test_their_targets_are_not_shown(self, place: Path, ask: Ask, name: str, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("root:secret:0:0\n")
        (RUN / name).unlink()
        (RUN / name).symlink_to(tmp_path / "secret")
        for words in (["runs"], *QUESTIONS[:3], [*QUESTIONS[3], "--reference", "nowhere"]):
            found = ask(*words)
            assert "secret:" not in found.out + found.err
            assert "HYDRA_FULL" not in found.err
        assert (tmp_path / "secret").read_text() == "root:secret:0:0\n"

    @pytest.mark.parametrize(("kind", "question"), [("samples", 0), ("interpolations", 1), ("evaluation", 2)])
    def test_links_to_other_folders_are_not_written_through(
        self, place: Path, refused: Refused, kind: str, question: int, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (RUN / kind).symlink_to(tmp_path / "out")
        assert "is a link to a folder outside the run's folder" in refused(*QUESTIONS[question])
        assert not list((tmp_path / "out").iterdir())

    def test_links_to_other_files_are_replaced_and_not_written_through(
        self, place: Path, ask: Ask, tmp_path: Path
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_text("as it was")
        (RUN / "samples").mkdir()
        (RUN / "evaluation").mkdir()
        for name in ("samples/prior_count-2.png", "samples/prior_count-2.npz", "events.out.tfevents.1.evaluation"):
            (RUN / name).symlink_to(secret)
        assert ask(*QUESTIONS[0]).code == 0
        assert ask(*QUESTIONS[2]).code == 0
        assert secret.read_text() == "as it was"

    @pytest.mark.parametrize("name", [".lock", "train.log", "metrics.jsonl"])
    def test_nothing_is_appended_through_them(self, place: Path, refused: Refused, name: str, tmp_path: Path) -> None:
        (RUN / name).unlink()
        (RUN / name).symlink_to(tmp_path / "made")
        words = ["train", "epochs=2", "network.hidden=[8]", "latent=2", "run_name=digits/a"]
        assert "does not write through links" in refused(*words)
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize("name", ["summary.json", "config.yaml", "evaluation/metrics.json"])
    def test_pipes_and_devices_are_not_waited_for(self, place: Path, ask: Ask, name: str) -> None:
        (RUN / "evaluation").mkdir()
        (RUN / name).unlink(missing_ok=True)
        os.mkfifo(RUN / name)
        assert ask("runs").code == 0
        assert ask(*QUESTIONS[2]).code in (1, 2)
        (RUN / name).unlink()
        (RUN / name).symlink_to("/dev/zero")
        assert ask("runs").code == 0
        assert ask(*QUESTIONS[2]).code in (1, 2)

    def test_a_sweep_names_no_runs_elsewhere(self, place: Path) -> None:
        (place / "runs/.sweeps/one").mkdir(parents=True)
        for listed in (["../../../../../../etc"], ["/etc"], ["a\0b"], ["\x1b[31m"], [3], 3, None, {"a": 1}):
            (place / "runs/.sweeps/one/sweep.json").write_text(json.dumps({"runs": listed}))
            with suppress(UserError):
                assert find_runs(place / "runs/.sweeps/one") == []


def test_names_cannot_control_the_terminal_or_add_markup(place: Path, ask: Ask) -> None:
    name = "\x1b[31mred\n<b>[bold]x"
    RUN.rename(RUN.parent / name)
    for words in (["runs"], ["sample", str(RUN.parent / name), "--count", "2"], ["sample", "nowhere"]):
        found = ask(*words)
        assert "\x1b" not in found.out + found.err, words
    assert r"\x1b[31mred" in ask("runs").out
    (RUN.parent / name / "summary.json").write_text("{")
    assert "\x1b" not in ask("runs").out


def test_the_report_shows_html_as_text(place: Path, ask: Ask) -> None:
    attack = "<script>alert(1)</script>"
    for run in ("a", "b"):
        folder = RunDir(Path(f"runs/digits/{run}"))
        whole = folder.summary()
        folder.write_summary({**whole, "device": attack, "git_commit": attack, "versions": {attack: attack}})
        text = folder.config_file.read_text()
        folder.config_file.write_text(text.replace("  network: mlp", f"  network: '{attack}{run}'"))
    found = ask("compare", "runs/digits/a", "runs/digits/b", "--jobs", "1")
    assert found.code == 0, found.err
    report = Path("runs/digits/compare/report.html").read_text()
    assert report.count("<script") == 1  # the report's own
    assert attack not in report
    assert "&lt;script&gt;" in report


# Pictures and packs.


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * min(height * (width + 1), 1_000_000), 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b"")


def small_png() -> bytes:
    whole = BytesIO()
    Image.new("L", (40, 40), 9).save(whole, "PNG")
    return whole.getvalue()


def jpeg() -> bytes:
    whole = BytesIO()
    Image.effect_noise((200, 200), 60).save(whole, "JPEG")
    return whole.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "50,000 pixels a side": lambda: png(50_000, 50_000),
    "2^31 pixels a side": lambda: png(2**31 - 1, 2**31 - 1),
    "no pixel": lambda: png(0, 0),
    "text of 100 MB": lambda: png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 100_000_000, 9))),
    "half a PNG": lambda: small_png()[:50],
    "half a JPEG": lambda: jpeg()[:800],
    "text": lambda: b"no picture",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "nothing": lambda: b"",
    "pickle": lambda: pickle.dumps(Marks()),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(place: Path, refused: Refused, name: str) -> None:
    for number in range(3):
        (place / f"photos/bad{number}.png").write_bytes(PICTURES[name]())
    before = peak()
    with pytest.raises(UserError, match=r"bad0\.png"):
        load_image(place / "photos/bad0.png", (1, 8, 8))
    words = ["dataset=image_folder", "dataset.path=photos", "dataset.validation=1", "dataset.side=8"]
    assert re.search(r"Cannot read these images .*bad0\.png", refused("train", *words))
    assert peak() - before < 200_000_000
    assert not (place / MARKER).exists()


def test_a_color_profile_of_100_mb_takes_no_memory(place: Path) -> None:
    (place / "big.png").write_bytes(png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 100_000_000, 9))))
    before = peak()
    with suppress(UserError):
        load_image(place / "big.png", (1, 8, 8))
    assert peak() - before < 200_000_000


def test_only_the_first_frame_of_an_animation_is_read(place: Path) -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in (255, 0)]
    frames[0].save(place / "film.gif", save_all=True, append_images=frames[1:])
    assert float(load_image(place / "film.gif", (1, 8, 8)).min()) == 1.0


def header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    whole = BytesIO()
    np.lib.format.write_array_header_1_0(whole, {"descr": kind, "fortran_order": False, "shape": shape})
    return whole.getvalue()


PACKS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "images of 2^40 bytes": ("images.npy", lambda: header((2**34, 1, 8, 8))),
    "images of 2^70 bytes": ("images.npy", lambda: header((2**64, 1, 8, 8))),
    "labels of 2^40 bytes": ("labels.npy", lambda: header((2**37,), "<i8")),
    "objects": ("images.npy", lambda: header((3,), "|O") + pickle.dumps([Marks()])),
    "labels that are objects": ("labels.npy", lambda: header((3,), "|O") + pickle.dumps([Marks()])),
    "another shape": ("images.npy", lambda: header((3,)) + b"123"),
    "nothing": ("images.npy", lambda: b""),
    "no labels": ("labels.npy", lambda: b""),
    "list": ("about.json", lambda: b"[]"),
    "no keys": ("about.json", lambda: b"{}"),
    "deep": ("about.json", lambda: b"[" * 100_000),
}


@pytest.mark.parametrize("name", PACKS)
def test_packs(tmp_path: Path, name: str) -> None:
    home = tmp_path / "pack/x"
    home.mkdir(parents=True)
    (home / "images.npy").write_bytes(header((3, 1, 2, 2)) + b"\7" * 12)
    (home / "labels.npy").write_bytes(header((3,), "<i8") + b"\0" * 24)
    (home / "about.json").write_text('{"images": 3, "labels": true, "classes": ["a"]}')
    assert open_pack(tmp_path / "pack", "x") is not None
    file, content = PACKS[name]
    (home / file).write_bytes(content())
    before = peak()
    assert open_pack(tmp_path / "pack", "x") is None
    assert peak() - before < 100_000_000
    assert not Path(MARKER).exists()


def test_files_of_mnist_that_claim_two_billion_images(place: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = place / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for name, magic in (("images-idx3", 2051), ("labels-idx1", 2049)):
        for part in ("train", "t10k"):
            (raw / f"{part}-{name}-ubyte").write_bytes(struct.pack(">IIII", magic, 2**31 - 1, 28, 28) + b"\0" * 100)
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: None)
    before = peak()
    found = ask("train", "dataset=mnist", "data_dir=data")
    assert found.code == 1, found
    assert "incomplete or damaged: remove them" in found.err
    assert "HYDRA_FULL" not in found.err
    assert peak() - before < 400_000_000


def test_how_many(record_property: Callable[[str, object], None]) -> None:
    count = len(CHECKPOINTS) + len(CONFIGS) + 3 * len(TEXTS) + len(PICTURES) + len(PACKS) + 21
    record_property("hostile files tried, each refused or read as plain data", count)


@pytest.mark.parametrize("file", ["best.pt", "checkpoint.pt", ".lock", "train.log", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
@pytest.mark.usefixtures("place")
def test_what_is_no_regular_file_is_never_waited_for(ask: Ask, file: str, kind: str) -> None:
    if file in (".lock", "train.log", "metrics.jsonl"):
        command = ["train", "run_name=digits/a", "epochs=99"]
    else:
        command = ["sample", str(RUN), "--weights", "last" if file == "checkpoint.pt" else "best"]
    (RUN / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(RUN / file)
    else:
        (RUN / file).symlink_to("/dev/zero" if kind == "device" else file)
    begin = time.monotonic()
    found = ask(*command)
    assert found.code in (1, 2), found
    assert str(RUN) in found.err
    assert "HYDRA_FULL" not in found.err
    assert time.monotonic() - begin < 60
    assert ask("runs").code == 0
    assert "digits/b" in ask("runs").out


def test_an_older_format_in_front_of_an_archive_is_refused(place: Path, ask: Ask) -> None:
    """zipfile finds the archive at the end, torch would load what is in front."""
    file = RUN / "best.pt"
    front = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"a": Marks()}]
    file.write_bytes(b"".join(pickle.dumps(part, 2) for part in front) + file.read_bytes())
    found = ask(*QUESTIONS[0])
    assert found.code == 1
    assert "not a checkpoint of vae" in found.err
    assert not (place / MARKER).exists()


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
def test_code_is_refused_whatever_the_case_of_its_name(place: Path, ask: Ask, name: str) -> None:
    file = RUN / "best.pt"
    with zipfile.ZipFile(file) as parts:
        contents = {part: parts.read(part) for part in parts.namelist()}
    with zipfile.ZipFile(file, "w") as parts:
        for part, content in contents.items():
            if part.endswith("data.pkl"):
                parts.writestr(part.replace("data.pkl", name), pickle.dumps(Marks(), 2))
            else:
                parts.writestr(part, content)
    found = ask(*QUESTIONS[0])
    assert found.code == 1
    assert "it would run" in found.err
    assert "weights_only" not in found.err
    assert not (place / MARKER).exists()


def test_weights_that_are_not_finite_are_refused(ask: Ask, place: Path) -> None:
    for file in ("best.pt", "checkpoint.pt"):
        state = torch.load(RUN / file, weights_only=True)
        state["model"] = {name: tensor * float("nan") for name, tensor in state["model"].items()}
        torch.save(state, RUN / file)
    found = ask(*QUESTIONS[0])
    assert found.code == 1
    assert "some weights are not finite" in found.err


def test_one_bad_run_does_not_hide_the_others(ask: Ask, place: Path) -> None:
    for name, file, target in (
        ("dangling", "config.yaml", "/nowhere"),
        ("device", "metrics.jsonl", "/dev/zero"),
        ("huge", "metrics.jsonl", None),
        ("a\udcff", "", None),
        ("red\x1b[31m", "summary.json", "/dev/zero"),
    ):
        folder = RUN.parent / name
        shutil.copytree(RUN, folder)
        if file:
            (folder / file).unlink()
            if target is not None:
                (folder / file).symlink_to(target)
            else:
                with (folder / file).open("wb") as created:
                    created.truncate(3 << 30)
    listed = ask("runs")
    assert listed.code == 0
    assert "digits/b" in listed.out
    assert "\x1b" not in listed.out
    assert ask("sample", "latest", "--count", "2").code in (0, 2)
    compared = ask("compare", "runs", "--jobs", "1")
    assert compared.code == 0, compared
    assert "\x1b" not in compared.out + compared.err
    assert compared.out.count("Left out") >= 3
