"""The outermost layer of the program: every error becomes one message and an exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import typer

from vae_cli.core.errors import UserError, explain, nearest, visible
from vae_cli.machine.launch import is_first, this_process

# Hydra's flags that `vae train` does not have, and what to do instead.
HYDRA_FLAGS = {
    "--run": "it is the default; leave it out",
    "-r": "it is the default; leave it out",
    "--config-path": "add a folder of your own with --config-dir",
    "--shell-completion": "type vae --install-completion",
    "--experimental-rerun": "type the command of the run again",
}


def exit_code(call: Callable[[], object]) -> int:
    """Call the program, print the error that stops it, if any, and return the exit code.

    The exit code is 0 for success or if there is nothing to do, 1 for a failure, 2 for a mistake on the command line,
    and 130 for Ctrl-C. Raises BrokenPipeError.
    """
    try:
        code = call()
        sys.stdout.flush()  # raises if the disk is full or the reader has closed the pipe
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        raise
    except SystemExit as stop:  # completion ends like this, and Typer turns a broken pipe into it
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        return stop.code if isinstance(stop.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:  # whatever happened, the user reads one message
        return _report(error)


def _report(error: Exception) -> int:
    message, code = explain_error(error)
    message = visible(message)
    if not is_first():  # a UserError occurs in every process, so only the first one prints it
        if not _is_for_the_user(error):
            print_error(f"{this_process()}: {message}")
    elif code == 0:  # there was nothing to do
        print(message)
    else:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            import traceback

            traceback.print_exception(error)
        print_error(message)
    return code


def explain_error(error: Exception) -> tuple[str, int]:
    """Return the message for an error and the exit code.

    >>> explain_error(UserError("There is no run 'a'."))
    ("There is no run 'a'.", 2)
    """
    if hasattr(error, "format_message"):
        return _explain_usage(error), 2
    message, code = explain(error)
    is_plain = _is_for_the_user(error) or (isinstance(error, OSError) and error.strerror)
    return (message if is_plain else f"{message} (set HYDRA_FULL_ERROR=1 for the traceback)"), code


def _is_for_the_user(error: Exception) -> bool:
    # Typer's usage errors have a format_message, but no public name in all of its versions.
    return isinstance(error, UserError) or hasattr(error, "format_message")


def _explain_usage(error: Any) -> str:
    """Explain one of Typer's usage errors: an unknown flag, a value that is not allowed, a missing argument."""
    ctx = getattr(error, "ctx", None)
    command = ctx.command_path if ctx else "vae"
    name = getattr(error, "option_name", None)
    if name is not None and hasattr(error, "possibilities"):
        return _explain_unknown_flag(name, ctx, command)
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    flag, value = _typed(getattr(error, "param", None))
    if value is None:
        return f"{message}. See {command} --help."
    reason = message.partition(": ")[2]
    allowed = re.findall(r"'([^']*)'", reason.partition(" is not one of ")[2])
    reason = reason.partition(", unable to parse")[0].replace("Input should be", "must be")
    return f"{flag} {value}: {reason}.{nearest(value, allowed)} See {command} --help."


def _explain_unknown_flag(name: str, ctx: Any, command: str) -> str:
    if command == "vae train":
        from vae_cli.config import catalog

        if name in HYDRA_FLAGS:
            return f"vae train does not support Hydra's flag {name}: {HYDRA_FLAGS[name]}."
        word = name.lstrip("-").replace("-", "_")
        if word.partition(".")[0] in catalog.defaults() or word in catalog.settings():
            following = next((after for given, after in pairwise(sys.argv) if given == name), "")
            value = following if following and "=" not in following and following[0] != "-" else "VALUE"
            return f"There is no flag {name}. Settings are typed without dashes: {word}={value}."
        if hint := nearest(word, [*catalog.settings(), *catalog.defaults()]):
            return f"There is no flag {name}.{hint} Settings are typed without dashes: KEY=VALUE. See {command} --help."
    # The opts of an argument are its name, without dashes.
    flags = [flag for param in ctx.command.get_params(ctx) for flag in param.opts if flag[0] == "-"] if ctx else []
    return f"There is no flag {name}.{nearest(name, flags)} See {command} --help."


def _typed(parameter: Any) -> tuple[str, str | None]:
    """Return the flag of a parameter and its value as they were typed; the value is None if they cannot be found."""
    for word, after in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        for flag in getattr(parameter, "opts", []):
            if word == flag:
                return flag, after
            if word.startswith(f"{flag}="):
                return flag, word.removeprefix(f"{flag}=")
    return "", None


def print_error(message: str) -> None:
    """Print a message to stderr, in color on a terminal."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text.assemble(("vae: ", "bold red"), message), soft_wrap=True)
    else:
        print(f"vae: {message}", file=sys.stderr)


def leave_pipe() -> int:
    """Discard the remaining output after the reader of a pipe has exited, and return exit code 141 (SIGPIPE)."""
    # Otherwise the interpreter complains when it flushes stdout at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
