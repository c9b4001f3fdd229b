"""One module per subcommand: its options, its examples and its function, which Typer calls.

A module `explain.py` holds a function `explain`, whose docstring is the help and whose annotated parameters are the
options, and a text EXAMPLES with one example per line: the command, two spaces, and what it does. One line in `cli.py`
registers it: `app.command(cls=Command, epilog=explain.EXAMPLES)(explain.explain)`.

`vae --help` imports all of these modules, so torch, Hydra, numpy and rich are imported inside the functions or by the
layers that do the work. `options.py` has the options that several subcommands share.
"""

__all__ = ["compare", "evaluate", "explain", "interpolate", "options", "output", "runs", "sample", "train"]
