"""The table of contents: one short function per subcommand. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from vae_cli.core.errors import UserError, explain, nearest, visible
from vae_cli.machine.launch import is_first, refuse_several, this_process

if TYPE_CHECKING:
    from vae_cli.config.catalog import Group

Rows = list[tuple[str, str]]

# Hydra's flags that are not ours, and what to type instead.
_HYDRAS_FLAGS = {
    "--run": "a run needs no flag",
    "-r": "a run needs no flag",
    "--config-path": "add a folder of your own with --config-dir",
    "--shell-completion": "type vae --install-completion",
    "--experimental-rerun": "type the command of the run again",
}


class Command(TyperCommand):
    """A subcommand whose help ends with examples; its epilog holds one on each line, what it does after two spaces."""

    def sections(self) -> Iterator[tuple[str, Rows]]:
        """Yield the titles and rows that stand below the options."""
        lines = [line.strip().partition("  ") for line in self.examples.splitlines()]
        yield "Examples", [(command, does.strip()) for command, _, does in lines if command]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.examples: str = kwargs.pop("epilog", None) or ""
        super().__init__(*args, **kwargs)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the sections as plain text."""
        for title, rows in self.sections():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=34)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, with panels on a terminal."""
        super().format_help(ctx, formatter)
        if self.rich_markup_mode is not None:
            _print_panels(self.sections())


class TrainCommand(Command):
    """The subcommand whose settings come from the configuration files: its help lists them."""

    def sections(self) -> Iterator[tuple[str, Rows]]:
        """Yield the examples, then a section for each group, then the settings."""
        from vae_cli.config import catalog

        yield from super().sections()
        defaults = catalog.defaults()
        for group in [*catalog.groups().values(), catalog.launchers()]:
            default = defaults.get(group.name)
            yield (
                _group_title(group, default.comment if default else ""),
                [
                    (f"{choice.name} (default)" if default and choice.name == default.default else choice.name, text)
                    for choice in group.choices.values()
                    for text in [choice.description]
                ],
            )
        yield (
            "Settings (vae train KEY=VALUE)",
            [(f"{setting.key}={setting.default}", setting.comment) for setting in catalog.settings().values()],
        )


def _group_title(group: Group, comment: str) -> str:
    if group.name == "schedule":
        return "schedule (vae train +schedule@regularizer.beta=CHOICE)"
    if group.name == "hydra/launcher":
        return "hydra/launcher (vae train -m ... hydra/launcher=CHOICE: how the jobs of a sweep are run)"
    return f"{group.name} ({comment})" if comment else group.name


def _print_panels(sections: Iterator[tuple[str, Rows]]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, rows in sections:
        table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
        table.add_column(style="bold cyan", overflow="fold", ratio=None)
        table.add_column(ratio=1)
        for left, right in rows:
            table.add_row(Text(left), Text(right))
        console.print(Panel(table, title=Text(title), title_align="left", border_style="dim"))


class Subcommands(TyperGroup):
    """The subcommands, in the order of this file."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a subcommand; a misspelt one is a UserError that names the nearest."""
        name = args[0]
        if self.get_command(ctx, name) is None and not ctx.resilient_parsing and not name.startswith("-"):
            words = self.list_commands(ctx)
            hint = nearest(name, words)
            if not hint and "=" in name:
                hint = f" Did you mean 'vae train {name}'?"
            raise UserError(f"There is no subcommand '{name}'.{hint} Subcommands: {', '.join(words)}.")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="vae",
    cls=Subcommands,
    help="Train variational auto-encoders and ask what the encoder's noise is for.",
    epilog="Every subcommand has a help of its own: vae train --help",
    rich_markup_mode="rich" if sys.stdout is not None and sys.stdout.isatty() else None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(given: bool) -> None:
    if given:
        from importlib.metadata import version

        typer.echo(f"vae {version('vae-cli')}")
        raise typer.Exit


def _complete_override(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from vae_cli.config import catalog

    *before, word = _words_typed() or [*(ctx.params.get("overrides") or []), incomplete]
    own = ctx.params.get("config_dir")
    # The shell replaces only what it takes for the last word.
    start = len(word) - len(incomplete)
    found = catalog.complete(before, word, *([Path(own)] if own else []))
    return [(text[start:], phrase) for text, phrase in found if text.startswith(word)]


def _words_typed() -> list[str]:
    """Return what was typed in bash, which splits words at '=', '@' and ':', in one piece again."""
    if os.environ.get("_VAE_COMPLETE") != "complete_bash":
        return []
    words: list[str] = []
    glue = False
    for word in os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]:
        breaks = bool(word) and not word.strip("=@:")
        if words and word and (glue or breaks):
            words[-1] += word
        else:
            words.append(word)
        glue = breaks
    return words


def _complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    from vae_cli.runs.find import find_runs

    folders = find_runs(Path(ctx.params.get("runs_dir") or "runs"))
    return [word for word in ["latest", *map(str, folders)] if word.startswith(incomplete)]


def _trust(modules: list[str] | None) -> None:
    # Worker processes of a sweep inherit it.
    if modules:
        os.environ["VAE_TRUST"] = " ".join(modules)


Run = Annotated[str, typer.Argument(help="A run's folder, or latest for the newest one.", autocompletion=_complete_run)]
WhichWeights = Annotated[
    Literal["best", "last"], typer.Option("--weights", help="Weights at the best validation loss, or the newest.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.", min=0, max=2**32 - 1)]
Out = Annotated[Path | None, typer.Option(help="Folder to write to; without it, inside the run's folder.")]
RunsDir = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        envvar="VAE_TRUST",
        metavar="MODULE",
        callback=_trust,
        help="Module of your own whose classes a configuration may build; can be given several times.",
    ),
]
DataDir = Annotated[str | None, typer.Option(help="Where datasets lie; without it, where the run found them.")]


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand not in (None, "train"):
        refuse_several(f"vae {ctx.invoked_subcommand}")
    if ctx.invoked_subcommand is None and (help_text := ctx.get_help()):
        typer.echo(help_text)


@app.command(
    cls=TrainCommand,
    epilog="""
    vae train  the defaults
    vae train sigma=fixed  one word changes the mode
    vae train sigma=fixed sigma.value=0.5 latent=8  values
    vae train -m sigma=learned,fixed,deterministic latent=2,8,32  a sweep of nine runs
    vae train -m sigma=learned,fixed hydra/launcher=joblib  runs side by side
    vae train +schedule@regularizer.beta=linear  a number becomes a schedule
    vae train experiment=cv_vae  a published composition
    vae train sigma=fixed --cfg job  show the configuration and train nothing
    vae train sigma=fixed --cfg job -p sigma  show the settings of one choice
    """,
)
def train(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="What differs from the defaults, as key=value.", autocompletion=_complete_override),
    ] = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Sweep: one run for every combination of values with commas.")
    ] = False,
    cfg: Annotated[
        Literal["job", "hydra", "all"] | None,
        typer.Option("--cfg", "-c", help="Show the composed configuration instead of training."),
    ] = None,
    package: Annotated[
        str | None, typer.Option("--package", "-p", help="With --cfg: show only this part, for example sigma.")
    ] = None,
    resolve: Annotated[bool, typer.Option("--resolve", help="With --cfg: fill in references like ${latent}.")] = False,
    info: Annotated[
        Literal["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"] | None,
        typer.Option("--info", "-i", help="Show how Hydra composes the configuration."),
    ] = None,
    config_name: Annotated[
        str | None, typer.Option(help="Start from this file of --config-dir instead of train.yaml.")
    ] = None,
    config_dir: Annotated[
        str | None, typer.Option(help="Folder of your own with more choices: sigma/mine.yaml adds sigma=mine.")
    ] = None,
    hydra_help: Annotated[bool, typer.Option("--hydra-help", help="Show Hydra's own help.")] = False,
    repeat: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Train a finished run once more, beside it, and report what differs.",
            autocompletion=_complete_run,
        ),
    ] = None,
    trust: Trust = None,
) -> None:
    """Train one model, or sweep over many."""
    flags = {
        "multirun": multirun,
        "cfg": cfg,
        "package": package,
        "resolve": resolve,
        "info": info,
        "config_name": config_name,
        "config_dir": config_dir,
        "hydra_help": hydra_help,
    }
    if repeat is not None:
        from vae_cli.commands import repeat as again

        again.main(repeat, overrides or [], **flags)
        return
    from vae_cli.commands import train as command

    command.main(overrides or [], **flags)


@app.command(
    cls=Command,
    epilog="""
    vae sample latest  images drawn from the prior
    vae sample latest --count 16 --temperature 0.7  fewer, and nearer to the mean
    vae sample runs/digits/default --from posterior --images 0,5,9 --draws 4  test images and draws of their codes
    vae sample latest --from mixture --components 20  codes from a mixture fitted to the training codes
    """,
)
def sample(
    run: Run,
    count: Annotated[int | None, typer.Option(help="Number of images; 64 without it.", min=1)] = None,
    source: Annotated[
        Literal["prior", "posterior", "aggregate", "mixture"] | None,
        typer.Option(
            "--from",
            help="Where codes come from: the prior, the posterior of test images, the aggregate posterior of the "
            "training images, or a Gaussian mixture fitted to it. Without it, what suits the run.",
        ),
    ] = None,
    components: Annotated[int | None, typer.Option(help="Components of --from mixture; 10 without it.", min=1)] = None,
    temperature: Annotated[
        float, typer.Option(help="Factor on the scale the codes are drawn with.", min=0.0, max=1000.0)
    ] = 1.0,
    seed: Seed = 0,
    draw: Annotated[
        bool, typer.Option("--draw/--mean", help="Draw the pixels from the likelihood, or show its mean.")
    ] = False,
    images: Annotated[
        str | None, typer.Option(help="Test images of --from posterior, for example 0,5,9; 0-7 without it.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Draws for each image of --from posterior; 8 without it.", min=1, max=1000)
    ] = None,
    weights: WhichWeights = "best",
    device: Device = "auto",
    out: Out = None,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Draw images from a trained run."""
    from vae_cli.commands import sample as command

    command.main(
        run,
        count=count,
        source=source,
        components=components,
        temperature=temperature,
        seed=seed,
        draw=draw,
        images=images,
        draws=draws,
        weights=weights,
        device=device,
        out=out,
        runs_dir=runs_dir,
        data_dir=data_dir,
    )


@app.command(
    cls=Command,
    epilog="""
    vae interpolate latest  eight random pairs of test images
    vae interpolate latest --pair 0,1 --pair 4,7 --path slerp  pairs by their number in the test set
    vae interpolate latest --classes 3,8 --steps 15 --gif  from one class to another, also as a film
    vae interpolate latest --file one.png --file two.png  images of your own
    vae interpolate latest --grid 0,1,2,3  a square between four images
    vae interpolate latest --traverse --span 2  each latent dimension on its own
    """,
)
def interpolate(
    run: Run,
    pairs: Annotated[
        list[str] | None, typer.Option("--pair", metavar="I,J", help="Two test images; can be given several times.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B", help="Pairs that lead from one class of the test set to another.")
    ] = None,
    files: Annotated[list[Path] | None, typer.Option("--file", help="An image file; give two for each pair.")] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of pairs where none are named; 8 without it.", min=1, max=1000)
    ] = None,
    path: Annotated[
        Literal["linear", "slerp", "norm-corrected"] | None,
        typer.Option(help="Straight (the default), along the sphere, or straight with the norm interpolated too."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Images on the way, both ends included.", min=2, max=1000)] = 11,
    corners: Annotated[
        str | None, typer.Option("--grid", metavar="I,J,K,L", help="Four test images as corners of a square.")
    ] = None,
    gif: Annotated[bool, typer.Option("--gif", help="Also write a film.")] = False,
    traverse: Annotated[
        bool, typer.Option("--traverse", help="Move along each latent dimension instead of between images.")
    ] = False,
    span: Annotated[
        float | None,
        typer.Option(help="Standard deviations to either side of --traverse; 3 without it.", min=0.0, max=1000.0),
    ] = None,
    seed: Seed = 0,
    weights: WhichWeights = "best",
    device: Device = "auto",
    out: Out = None,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Show what lies between images in the latent space of a trained run."""
    from vae_cli.commands import interpolate as command

    command.main(
        run,
        pairs=pairs or [],
        classes=classes,
        files=files or [],
        count=count,
        path=path,
        steps=steps,
        corners=corners,
        gif=gif,
        traverse=traverse,
        span=span,
        seed=seed,
        weights=weights,
        device=device,
        out=out,
        runs_dir=runs_dir,
        data_dir=data_dir,
    )


@app.command(
    cls=Command,
    epilog="""
    vae evaluate latest  everything that is defined for the run, in minutes
    vae evaluate latest --quick  fewer images and draws, in seconds
    vae evaluate latest --full  all test images, and 5000 draws for the importance-weighted bound
    vae evaluate latest --metrics noise_probe,jacobian  only these
    vae evaluate latest --metrics bound --samples 1000  iw_bound_k1000
    """,
)
def evaluate(
    run: Run,
    quick: Annotated[bool, typer.Option("--quick", help="Look at fewer images and draws.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Look at all images, with 5000 draws.")] = False,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these metrics; or a class of your own such as mine.Loudness."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="K", help="Draws for the importance-weighted bound.", min=1, max=1_000_000)
    ] = None,
    seed: Seed = 0,
    weights: WhichWeights = "best",
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an evaluation that is damaged, or more thorough than this one.")
    ] = False,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Measure what the noise of a trained run does, on images it has not seen."""
    from vae_cli.commands import evaluate as command

    command.main(
        run,
        quick=quick,
        full=full,
        metrics=metrics,
        samples=samples,
        seed=seed,
        weights=weights,
        device=device,
        overwrite=overwrite,
        runs_dir=runs_dir,
        data_dir=data_dir,
    )


@app.command(
    cls=Command,
    epilog="""
    vae runs  everything below runs/
    vae runs runs/digits  one dataset
    """,
)
def runs(folder: Annotated[Path, typer.Argument(help="Folder to look through.")] = Path("runs")) -> None:
    """List the runs with their status and final figures."""
    from vae_cli.commands import runs as command

    command.main(folder)


@app.command(
    cls=Command,
    epilog="""
    vae compare  all finished runs below runs/
    vae compare runs/digits  one dataset
    vae compare runs/digits/default runs/digits/sigma-fixed  two runs
    vae compare runs/digits --reference "fixed 1.0"  differences to another arm than the usual one
    vae compare runs/digits --profile default --jobs 4  a more thorough evaluation, four runs at a time
    """,
)
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="Runs, or folders of runs; without any, all runs.", autocompletion=_complete_run
        ),
    ] = None,
    profile: Annotated[
        Literal["quick", "default", "full"] | None,
        typer.Option(
            help="How thoroughly to evaluate what is not, or is less so. Without it, like most of the runs, or quickly."
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs that are evaluated at a time; without it, one a core, 8 at most.", min=1)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="ARM", help="The arm that all others are compared with, as the table names it."),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write curves of the mean and deviation over seeds.")
    ] = False,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; without it, compare/ in the folder that holds the runs.")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    data_dir: DataDir = None,
    trust: Trust = None,
) -> None:
    """Set finished runs side by side, and write a report that answers the questions about the noise."""
    from vae_cli.commands import compare as command

    command.main(
        runs or [],
        profile=profile,
        jobs=jobs,
        reference=reference,
        tensorboard=tensorboard,
        device=device,
        out=out,
        runs_dir=runs_dir,
        data_dir=data_dir,
    )


def main() -> None:
    """Run the command line and exit: 0, 1 for a failure, 2 for a mistake of the user's, 130 for Ctrl-C."""
    try:
        code = _run()
    except BrokenPipeError:
        code = _leave_pipe()
    except KeyboardInterrupt:  # another one, while the first was answered
        code = 130
    sys.exit(code)


def _run() -> int:
    try:
        code = app(prog_name="vae", standalone_mode=False)
        sys.stdout.flush()  # a full disk or a reader that has gone shows itself here at the latest
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        raise
    except SystemExit as stop:
        # Typer turns a broken pipe into this, and completion ends with it.
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:  # the border: whatever happened, a person reads one message
        message, code = _explain(error)
        message = visible(message)
        if not is_first():  # of several processes the first says what all of them see
            if not _is_told(error):
                _print_error(f"{this_process()}: {message}")
            return code
        if code == 0:  # nothing went wrong, there was only nothing to do
            print(message)
            return code
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exception(error)
        _print_error(message)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    if hasattr(error, "format_message"):  # Typer's own, which has no public name in all versions
        return _explain_usage(error), 2
    message, code = explain(error)
    is_plain = _is_told(error) or (isinstance(error, OSError) and error.strerror)
    return (message if is_plain else f"{message} (set HYDRA_FULL_ERROR=1 for the traceback)"), code


def _is_told(error: Exception) -> bool:
    """Whether an error is one that every process meets."""
    return isinstance(error, UserError) or hasattr(error, "format_message")


def _explain_usage(error: Any) -> str:
    ctx = getattr(error, "ctx", None)
    command = ctx.command_path if ctx else "vae"
    name = getattr(error, "option_name", None)
    if name is None or not hasattr(error, "possibilities"):
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        flag, given = _given(getattr(error, "param", None))
        if given is not None:
            reason = message.partition(": ")[2]
            allowed = re.findall(r"'([^']*)'", reason.partition(" is not one of ")[2])
            reason = reason.partition(", unable to parse")[0].replace("Input should be", "has to be")
            return f"{flag} {given}: {reason}.{nearest(given, allowed)} See {command} --help."
        return f"{message}. See {command} --help."
    if command == "vae train":
        from vae_cli.config import catalog

        if name in _HYDRAS_FLAGS:
            return f"{name} is a flag of Hydra's that vae does not take: {_HYDRAS_FLAGS[name]}."
        word = name.lstrip("-").replace("-", "_")
        if word.partition(".")[0] in catalog.defaults() or word in catalog.settings():
            return f"There is no flag {name}: settings have no dashes, type {word}=VALUE."
        if hint := nearest(word, [*catalog.settings(), *catalog.defaults()]):
            return f"There is no flag {name}.{hint} Settings have no dashes: KEY=VALUE. See {command} --help."
    # An argument has a name and no dashes.
    flags = [flag for param in ctx.command.get_params(ctx) for flag in param.opts if flag[0] == "-"] if ctx else []
    return f"There is no flag {name}.{nearest(name, flags)} See {command} --help."


def _given(parameter: Any) -> tuple[str, str | None]:
    """The flag of a parameter as it was typed, and the word behind it, where that can be told."""
    for word, after in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        for flag in getattr(parameter, "opts", []):
            if word == flag:
                return flag, after
            if word.startswith(f"{flag}="):
                return flag, word.removeprefix(f"{flag}=")
    return "", None


def _print_error(message: str) -> None:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text.assemble(("vae: ", "bold red"), message), soft_wrap=True)
    else:
        print(f"vae: {message}", file=sys.stderr)


def _leave_pipe() -> int:
    # The reader has gone; without this the interpreter complains when it flushes at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
