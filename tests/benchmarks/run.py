"""Measure how fast `vae` is, relative to a bare loop, to other libraries and to the matrix products alone.

The candidates alternate within one call, round after round, each in its own process; a table gives the median ratio
with the minimum and the maximum. The images are MNIST if --data-dir (or $VAE_DATA_DIR) has it; otherwise they are
mostly black images of the same shape.

    python tests/benchmarks/run.py                 every section, in about an hour
    python tests/benchmarks/run.py training peers  two sections
    python tests/benchmarks/run.py --quick         fewer images and rounds, in a few minutes
    python tests/benchmarks/run.py --save          also keeps all figures, as JSON in tests/benchmarks/results
    python tests/benchmarks/run.py --table         prints the results kept there, as Markdown for tests/README.md
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SIGMAS = ("learned", "shared", "fixed", "deterministic")
MNIST = [
    "dataset=mnist",
    "likelihood=bernoulli",
    "latent=20",
    "batch_size=128",
    "optimizer.lr=1e-3",
    "dataset.validation=1000",
]
NETWORKS = {
    "mlp": ["network=mlp", "network.hidden=[400]"],
    "conv": ["network=conv"],
    "small": [
        *("network=mlp", "network.hidden=[200,200]", "network.activation=tanh", "latent=50", "batch_size=20"),
        "likelihood.binarize=dynamic",
    ],
}
RESULTS = HERE / "results"
# Variables that limit torch, oneDNN and MKL to older instructions; avx2 or AVX2 leaves out AVX-512.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


@dataclass
class Row:
    """One row of the table: our figure in each round, and the figure that it is compared with in the same round."""

    section: str
    name: str
    unit: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    more_is_better: bool = True

    def ratios(self) -> list[float]:
        """Return ours / theirs for each round, or nothing if there is no comparison."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)] if self.theirs else []


@dataclass
class Bench:
    """The settings of a benchmark, the rows measured so far, and the commands that measure."""

    folder: Path
    rounds: int
    epochs: int
    threads: int
    images: dict[str, Path]  # for each network, a tensor for the bare loop
    data: dict[str, Path]  # for each network, a data folder for dataset=mnist
    rows: list[Row] = field(default_factory=list)
    _count: int = 0

    def add(self, row: Row) -> Row:
        """Append a row and return it."""
        self.rows.append(row)
        return row

    def vae(self, *words: str, subcommand: str = "train") -> Finished:
        """Run a subcommand of vae in its own process."""
        return run([sys.executable, "-m", "vae_cli", subcommand, *words], self.folder)

    def train(self, network: str, *words: str, name: str | None = None) -> dict[str, Any]:
        """Train as a user does, and return the summary with the wall time and the peak memory."""
        self._count += 1
        name = name or f"run{self._count}"
        done = self.vae(
            *(*MNIST, *NETWORKS[network], f"data_dir={self.data[network]}", f"epochs={self.epochs}"),
            *(f"threads={self.threads}", f"run_name={name}", *words),
        )
        summary: dict[str, Any] = json.loads((self.folder / "runs" / name / "summary.json").read_text())
        return {**summary, "wall": done.seconds, "memory": done.memory}

    def bare(self, network: str, sigma: str = "learned", *more: str) -> Finished:
        """Train with the bare loop."""
        words = [f"--network={network}", f"--sigma={sigma}", f"--epochs={self.epochs}", f"--threads={self.threads}"]
        return run([sys.executable, str(HERE / "bare.py"), str(self.images[network]), *words, *more], self.folder)

    def speed_of_bare(self, network: str, sigma: str = "learned") -> float:
        """Return the images per second of the bare loop."""
        said = json.loads(self.bare(network, sigma).said)
        return float(said["images"] * len(said["seconds"]) / sum(said["seconds"]))


@dataclass
class Finished:
    """A command that has ended: its output, its seconds, and its peak memory in MB."""

    said: str
    seconds: float
    memory: float


def run(command: Sequence[str], folder: Path, **more: Any) -> Finished:
    """Run a command; exit with its output if it fails."""
    # The system reports the peak memory over all ended children, so a process in between has this one child only.
    code = (
        "import json, resource, subprocess, sys, time\n"
        "begin = time.perf_counter()\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print(json.dumps([done.returncode, done.stdout, done.stderr, time.perf_counter() - begin, used]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=folder, capture_output=True, text=True, check=True, **more
    )
    status, out, err, seconds, memory = json.loads(ended.stdout)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}:\n{err or out}")
    return Finished(out, seconds, memory / (1024 if sys.platform != "darwin" else 1024**2))


# Sections -------------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> None:
    """Compare the images per second of `vae train` and of the bare loop, for each network and sigma.

    mlp is 784-400-20 with batches of 128, small 784-200-200-50 with batches of 20, for which overhead matters most.
    """
    rows = {(n, s): bench.add(Row("training", f"{n}, sigma={s}", "images/s")) for n in bench.images for s in SIGMAS}
    for _ in range(bench.rounds):
        for (network, sigma), row in rows.items():
            row.ours.append(bench.train(network, f"sigma={sigma}")["images_per_second"])
            row.theirs.append(bench.speed_of_bare(network, sigma))


def steps(bench: Bench) -> None:
    """Compare the images per second of our steps and of those of the bare loop, in turns of 100 steps in one process.

    The speed of a shared machine changes from second to second. Two turns that follow each other see about the same
    machine, so their ratio varies less than that of two commands. Only what happens once per epoch is left out.
    """
    for network in bench.images:
        for sigma in SIGMAS:
            row = bench.add(Row("steps", f"{network}, sigma={sigma}", "images/s"))
            words = [*MNIST, *NETWORKS[network], f"sigma={sigma}", f"data_dir={bench.data[network]}"]
            given = [str(bench.images[network]), network, sigma, str(bench.threads), str(30 * bench.rounds), *words]
            said = json.loads(run([sys.executable, str(HERE / "steps.py"), *given], bench.folder).said.splitlines()[-1])
            row.ours, row.theirs = said["ours"], said["theirs"]


def peers(bench: Bench) -> None:
    """Compare the images per second of `vae train`, pythae and Lightning on the same network."""
    rows = {peer: bench.add(Row("peers", f"mlp, against {peer}", "images/s")) for peer in ("pythae", "lightning")}
    for _ in range(bench.rounds):
        ours = bench.train("mlp")["images_per_second"]
        for peer, row in rows.items():
            words = [peer, str(bench.images["mlp"]), f"--epochs={bench.epochs}", f"--threads={bench.threads}"]
            said = json.loads(run([sys.executable, str(HERE / "peers.py"), *words], bench.folder).said.splitlines()[-1])
            row.ours.append(ours)
            row.theirs.append(said["images"] * len(said["seconds"]) / sum(said["seconds"]))


def floor(bench: Bench) -> None:
    """Compare the images per second of `vae train` with those of the matrix products alone."""
    row = bench.add(Row("floor", "mlp, against its matrix products", "images/s"))
    for _ in range(bench.rounds):
        row.ours.append(bench.train("mlp")["images_per_second"])
        said = json.loads(bench.bare("mlp", "learned", "--floor").said)
        row.theirs.append(said["images"] * len(said["seconds"]) / sum(said["seconds"]))


STARTS = {
    "python": "pass",
    "torch": "import torch",
    "torch, its optimizers and hydra": "import torch, hydra; torch.optim.Adam([torch.zeros(1, requires_grad=True)])",
    "these and tensorboard": "import torch, hydra; torch.optim.Adam([torch.zeros(1, requires_grad=True)]); "
    "from torch.utils.tensorboard import SummaryWriter",
}


def startup(bench: Bench) -> None:
    """Measure the seconds from Enter to the first step on digits, of `vae sample` and of `vae evaluate --quick`,
    relative to the imports."""
    imports = {name: bench.add(Row("startup", name, "s", more_is_better=False)) for name in STARTS}
    first = bench.add(Row("startup", "vae train, to the first step, against the imports", "s", more_is_better=False))
    sample = bench.add(Row("startup", "vae sample, whole, against the imports", "s", more_is_better=False))
    evaluate = bench.add(Row("startup", "vae evaluate --quick, whole, against torch", "s", more_is_better=False))
    helped = bench.add(Row("startup", "vae --help, against python", "s", more_is_better=False))
    bench.vae("epochs=1", "run_name=to_sample")
    evaluation = ["runs/to_sample", "--quick", "--overwrite"]
    bench.vae(*evaluation, subcommand="evaluate")  # trains the feature net
    for number in range(max(3, bench.rounds)):
        for name, code in STARTS.items():
            imports[name].ours.append(run([sys.executable, "-c", code], bench.folder).seconds)
        stamp = bench.folder / f"first{number}"
        code = (
            "import sys, time\n"
            "from vae_cli.training.meter import Meter\n"
            "add = Meter.add\n"
            "def first(self, *given):\n"
            f"    print(time.time(), file=open({str(stamp)!r}, 'x'))\n"
            "    Meter.add = add\n"
            "    return add(self, *given)\n"
            "Meter.add = first\n"
            "from vae_cli.cli import main\n"
            "main()\n"
        )
        begin = time.time()
        run([sys.executable, "-c", code, "train", "epochs=1", f"run_name=first{number}"], bench.folder)
        first.ours.append(float(stamp.read_text()) - begin)
        sample.ours.append(bench.vae("runs/to_sample", subcommand="sample").seconds)
        evaluate.ours.append(bench.vae(*evaluation, subcommand="evaluate").seconds)
        helped.ours.append(bench.vae("--help", subcommand="train").seconds)
    first.theirs = list(imports["torch, its optimizers and hydra"].ours)
    sample.theirs = list(imports["torch"].ours)
    evaluate.theirs = list(imports["torch"].ours)
    helped.theirs = list(imports["python"].ours)


def whole(bench: Bench) -> None:
    """Compare the seconds of a complete run with the bare loop's training, and its memory with that of the imports."""
    seconds = bench.add(Row("whole", "mlp, training part, against the bare loop", "s", more_is_better=False))
    rest = bench.add(Row("whole", "mlp, start-up, evaluation and writing", "s", more_is_better=False))
    memory = bench.add(Row("whole", "mlp, peak memory beyond the imports'", "MB", more_is_better=False))
    code = STARTS["these and tensorboard"]
    for _ in range(bench.rounds):
        summary = bench.train("mlp")
        said = json.loads(bench.bare("mlp").said)
        spent = said["images"] * bench.epochs / summary["images_per_second"]
        seconds.ours.append(spent)
        seconds.theirs.append(sum(said["seconds"]))
        rest.ours.append(summary["wall"] - spent)
        memory.ours.append(summary["memory"] - run([sys.executable, "-c", code], bench.folder).memory)


def questions(bench: Bench) -> None:
    """Measure the seconds of `vae sample`, of `vae evaluate`, and of packing an image folder."""
    bench.train("mlp", name="asked")
    sample = bench.add(Row("questions", "vae sample --count 10000", "s", more_is_better=False))
    evaluate = bench.add(Row("questions", "vae evaluate --quick", "s", more_is_better=False))
    pack = bench.add(Row("questions", "pack a folder of 2000 images of 64x64, and train one epoch", "s"))
    again = bench.add(Row("questions", "the same again, from the packed file", "s"))
    photos = bench.folder / "photos"
    _write_photos(photos, 2000)
    for number in range(bench.rounds):
        sample.ours.append(bench.vae("runs/asked", "--count", "10000", "--draw", subcommand="sample").seconds)
        words = ["runs/asked", "--quick", "--overwrite", "--data-dir", str(bench.data["mlp"])]
        evaluate.ours.append(bench.vae(*words, subcommand="evaluate").seconds)
        cache = bench.folder / f"cache{number}"
        for row in (pack, again):
            words = [
                "dataset=image_folder",
                f"dataset.path={photos}",
                f"data_dir={cache}",
                "epochs=1",
                "overwrite=true",
            ]
            row.ours.append(bench.vae(*words, "run_name=photos", "network.hidden=[64]").seconds)


def sweeps(bench: Bench) -> None:
    """Compare the seconds of a sweep of 12 short runs under each installed launcher with those under basic."""
    sweep = ["-m", "sigma=learned,shared,fixed,deterministic", "seed=0,1,2", "epochs=30"]
    extra = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": [], "ray": []}
    rows = {name: Row("sweeps", f"12 runs, {name}", "s", more_is_better=False) for name in extra}
    per_job = bench.add(Row("sweeps", "12 runs, basic: seconds of a job beyond its training", "s"))
    for number in range(bench.rounds):
        folder = f"sweep{number}"
        basic = bench.vae(*sweep, f"runs_dir={folder}", "threads=1").seconds
        summaries = [json.loads(file.read_text()) for file in (bench.folder / folder).rglob("summary.json")]
        start = bench.vae("--cfg", "job").seconds
        per_job.ours.append((basic - start - sum(summary["seconds"] for summary in summaries)) / len(summaries))
        for name, words in extra.items():
            if not _is_installed(name):
                continue
            seconds = bench.vae(
                *sweep, f"hydra/launcher={name}", *words, f"runs_dir={folder}{name}", "threads=1"
            ).seconds
            rows[name].ours.append(seconds)
            rows[name].theirs.append(basic)
    bench.rows += [row for row in rows.values() if row.ours]


def growth(bench: Bench) -> None:
    """Measure how the cost grows with latent size, image size, number of images, and number of runs in a folder."""
    sizes: dict[str, list[tuple[str, list[str]]]] = {
        "latent": [(f"latent={size}", [f"latent={size}"]) for size in (2, 20, 200, 2000)],
        "side": [(f"sprites of {side}x{side}", [f"dataset.side={side}"]) for side in (16, 32, 64)],
        "images": [(f"{count} sprites", [f"dataset.images={count}"]) for count in (2000, 8000, 32000)],
    }
    for axis, cases in sizes.items():
        base: Row | None = None
        for name, words in cases:
            row = bench.add(Row("growth", f"{axis}: {name}", "images/s"))
            for _ in range(bench.rounds):
                if axis == "latent":
                    row.ours.append(bench.train("mlp", *words)["images_per_second"])
                else:
                    bench._count += 1
                    run_name = f"grow{bench._count}"
                    words_of_run = ["dataset=shapes", "epochs=4", "network.hidden=[400]", f"threads={bench.threads}"]
                    bench.vae(*words_of_run, f"run_name={run_name}", *words)
                    summary = json.loads((bench.folder / "runs" / run_name / "summary.json").read_text())
                    row.ours.append(summary["images_per_second"])
            base = base or row
            row.theirs = list(base.ours)
    example = bench.folder / "runs" / "one"
    bench.vae("epochs=1", "run_name=one")
    base = None
    for count in (10, 100, 1000):
        folder = bench.folder / f"many{count}"
        for number in range(count):
            shutil.copytree(example, folder / f"run{number}", ignore=shutil.ignore_patterns("events*", "projector*"))
        row = bench.add(Row("growth", f"vae runs over {count} runs", "s", more_is_better=False))
        row.ours = [bench.vae(str(folder), subcommand="runs").seconds for _ in range(bench.rounds)]
        base = base or row
        row.theirs = list(base.ours)


def beyond(bench: Bench) -> None:
    """Compare the images per second of a convolutional encoder that reads a packed file larger than memory would hold
    (nothing of it is cached) with the same images in memory, and measure how much memory the reading takes."""
    file = bench.folder / "images.npy"
    code = (
        "import json, os, sys, time, numpy as np, torch\n"
        "from vae_cli.axes.dataset import Split\n"
        "from vae_cli.axes.dataset.mapped import Mapped\n"
        "from torch import nn\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "array = np.load(sys.argv[1], mmap_mode='r')\n"
        "mapped = Mapped(sys.argv[1], array.offset, array.shape)\n"
        "if sys.argv[2] == 'memory':\n"
        "    split = Split(torch.from_numpy(np.array(array[:50000])), None, torch.arange(50000))\n"
        "else:\n"
        "    split = Split(mapped.images, None, torch.randperm(len(array)), mapped)\n"
        "    with open(sys.argv[1], 'rb') as file:\n"
        "        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "net = nn.Sequential(nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.Flatten(),\n"
        "                    nn.Linear(16384, 20))\n"
        "optimizer = torch.optim.Adam(net.parameters(), fused=True)\n"
        "anonymous = lambda: [int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('RssAnon')][0]\n"
        "count = 0\n"
        "for step, positions in enumerate(split.shuffled(torch.Generator(), 64)):\n"
        "    if step == 20: begin, before = time.perf_counter(), anonymous()\n"
        "    net(split.batch(positions)).square().mean().backward()\n"
        "    optimizer.step(); optimizer.zero_grad()\n"
        "    if step == 320: break\n"
        "print(json.dumps([300 * 64 / (time.perf_counter() - begin), (anonymous() - before) / 1024]))\n"
    )
    with open(file, "wb") as written:
        shape = (100_000, 3, 64, 64)  # 1.2 GB
        np.lib.format.write_array_header_1_0(written, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for _ in range(100):
            written.write(torch.randint(0, 256, (1000, *shape[1:]), dtype=torch.uint8).numpy().tobytes())
        written.flush()
        os.fsync(written.fileno())  # only pages that are on the disk can be dropped from the cache
    speed = bench.add(Row("beyond", "encoder of 64x64 images, from a cold file, against memory", "images/s"))
    grown = bench.add(Row("beyond", "memory that these 300 steps added", "MB", more_is_better=False))
    for _ in range(bench.rounds):
        for kind, measured in (("file", speed.ours), ("memory", speed.theirs)):
            words = [sys.executable, "-c", code, str(file), kind, str(bench.threads)]
            figures = json.loads(run(words, bench.folder).said)
            measured.append(figures[0])
            if kind == "file":
                grown.ours.append(figures[1])
    file.unlink()


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "training": training,
    "steps": steps,
    "peers": peers,
    "floor": floor,
    "whole": whole,
    "startup": startup,
    "questions": questions,
    "sweeps": sweeps,
    "growth": growth,
    "beyond": beyond,
}


# Data -----------------------------------------------------------------------------------------------------------------


def _images(data_dir: Path | None, count: int) -> torch.Tensor:
    """Return 8-bit images (N, 1, 28, 28): MNIST if the folder has it, otherwise blots on black."""
    for name in ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"):
        found = next(iter(data_dir.rglob(name)), None) if data_dir is not None else None
        if found is not None:
            raw = (gzip.open if found.suffix == ".gz" else open)(found, "rb").read()
            return torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).reshape(-1, 1, 28, 28)[:count].clone()
    noise = torch.rand(count, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    blots = torch.nn.functional.interpolate(noise, size=20, mode="bicubic").clamp(0, 1)
    blots = torch.where(blots > 0.6, blots, torch.zeros(()))
    return torch.nn.functional.pad(blots, (4, 4, 4, 4)).mul(255).to(torch.uint8)


def _write_mnist(folder: Path, train: torch.Tensor, test: torch.Tensor) -> None:
    """Write images in the file format of MNIST."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, images in (("train", train), ("t10k", test)):
        count = len(images)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + images.numpy().tobytes()
        )
        labels = (torch.arange(count) % 10).to(torch.uint8)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.numpy().tobytes())


def _write_photos(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir()
    pixels = torch.randint(0, 255, (count, 64, 64, 3), dtype=torch.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture.numpy()).save(folder / f"{number}.png")


def _is_installed(launcher: str) -> bool:
    from importlib.util import find_spec

    module = {"submitit_local": "hydra_submitit_launcher"}.get(launcher, f"hydra_{launcher}_launcher")
    return find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.{module}") is not None


# Table ----------------------------------------------------------------------------------------------------------------


def _median(values: Sequence[float], unit: str) -> str:
    middle = statistics.median(values)
    return f"{middle:,.0f} {unit}" if middle >= 1000 else f"{middle:.3g} {unit}"


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    console = Console()
    table = Table(box=None if not console.is_terminal else Table().box)
    for name in ("section", "what"):
        table.add_column(name, overflow="fold")
    for name in ("median", "compared with", "ratio", "least", "greatest"):
        table.add_column(name, justify="right")
    for row in rows:
        ratios = row.ratios()
        cells = [_median(row.ours, row.unit)]
        cells += [_median(row.theirs, row.unit) if row.theirs else ""]
        cells += [f"{value:.2f}" for value in (statistics.median(ratios), min(ratios), max(ratios))] if ratios else []
        table.add_row(row.section, row.name, *cells)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


# Results --------------------------------------------------------------------------------------------------------------


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def save(bench: Bench, size: str) -> None:
    """Write machine, versions, date and all figures to results/, in place of earlier ones of the same day and kind."""
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "cores": os.cpu_count(),
        "threads": bench.threads,
        "images": size,
        "epochs": bench.epochs,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    rows = [{**asdict(row), "ratios": row.ratios()} for row in bench.rows]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{about['date']}-{about['instructions'].lower()}-{size}.json"
    if file.exists():  # other rows of the same day stay, in their place
        measured = {(row["section"], row["name"]): row for row in rows}
        before = json.loads(file.read_text())["rows"]
        rows = [measured.pop((row["section"], row["name"]), row) for row in before] + list(measured.values())
    file.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(file)


def markdown() -> str:
    """Return the newest saved results of each section for each set of instructions (AVX2, AVX512 ...), and those for
    each GPU, as tables."""
    newest, seen = list[dict[str, Any]](), set[tuple[str, str]]()
    for file in sorted(RESULTS.glob("*.json"), reverse=True):
        saved = json.loads(file.read_text())
        kind = saved["about"].get("gpu") or saved["about"]["instructions"]
        sections = {(kind, row["section"]) for row in saved.get("rows", [{"section": ""}])}
        saved["rows"] = [row for row in saved.get("rows", []) if (kind, row["section"]) not in seen]
        if sections - seen:
            newest.insert(0, saved)
        seen |= sections
    parts = []
    for saved in newest:
        about = saved["about"]
        if "gpu" in about:  # written by tests/gpu
            parts += [f"{about['date']}, {about['gpu']}, torch {about['torch']}, batches of 128:", ""]
            rows = [f"| {name} | {figure} |" for name, figure in saved["figures"].items()]
            parts += ["| what | figure |", "|---|---:|", *rows, ""]
            continue
        rows = sorted(saved["rows"], key=lambda row: list(SECTIONS).index(row["section"]))
        parts += [
            f"{about['date']}, {about['cores']} cores ({about['processor']}; {_instructions(about)}), "
            f"{about['threads']} threads, torch {about['torch']}, {about['images']} size:",
            "",
            "| what | median | compared with | ratio | least to greatest |",
            "|---|---:|---:|---:|---:|",
            *(_markdown_row(Row(**{k: v for k, v in row.items() if k != "ratios"})) for row in rows),
            "",
        ]
    return "\n".join(parts)


def _instructions(about: dict[str, Any]) -> str:
    limits = " ".join(f"{name}={value}" for name, value in about["limits"].items())
    return about["instructions"] + (f" by `{limits}`" if limits else "")


def _markdown_row(row: Row) -> str:
    ratios = row.ratios()
    against = {"training": ", against the bare loop", "steps": ", steps against those of the bare loop, in one process"}
    cells = [row.name + against.get(row.section, ""), _median(row.ours, row.unit)]
    cells += [_median(row.theirs, row.unit) if row.theirs else ""]
    cells += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"] if ratios else ["", ""]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the images, three rounds")
    parser.add_argument("--network", choices=list(NETWORKS), help="network of the section training; default: all")
    parser.add_argument("--rounds", type=int, help="default: 5, or 3 with --quick")
    # Denormal numbers slow training down from the second epoch on.
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each training; default: 4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("VAE_DATA_DIR"), help="folder that holds MNIST")
    parser.add_argument("--save", action="store_true", help="also write all figures to a file in results/")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the saved results as Markdown")
    given = parser.parse_args()
    if given.table:
        print(markdown(), end="")
        return
    unknown = [name for name in given.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]}; sections are {', '.join(SECTIONS)}")
    counts = {"mlp": 6000 if given.quick else 60000, "conv": 2000 if given.quick else 10000}
    counts["small"] = counts["conv"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, data = {}, {}
        for network, count in counts.items():
            if given.network not in (None, network):
                continue
            every = _images(given.data_dir, count)
            data[network], images[network] = folder / f"data-{network}", folder / f"{network}.pt"
            _write_mnist(data[network], every, every[:1000])
            torch.save(every[1000:].clone(), images[network])  # as many as dataset.validation=1000 leaves
        bench = Bench(folder, given.rounds or (3 if given.quick else 5), given.epochs, given.threads, images, data)
        for section in given.sections or SECTIONS:
            SECTIONS[section](bench)
            show([row for row in bench.rows if row.section == section])
    if given.save:
        save(bench, "quick" if given.quick else "full")


if __name__ == "__main__":
    main()
