"""One module per subcommand: its options, its examples and its function, which Typer calls.

For example, `explain.py` contains the function `explain`, whose docstring is the help text and whose annotated
parameters are the options, and a string EXAMPLES with one example per line: the command, two spaces, and what it does.
One line in `cli.py` registers the command: `app.command(cls=Command, epilog=explain.EXAMPLES)(explain.explain)`.

`vae --help` imports all of these modules, so they do not import torch, Hydra, numpy or rich at the top level, only
inside functions. `options.py` has the options that several subcommands share.
"""

__all__ = ["compare", "evaluate", "explain", "export", "interpolate", "options", "output", "runs", "sample", "train"]
