"""What every subcommand has in common at the terminal: help, completion and how errors are reported."""

__all__ = ["completion", "errors", "help"]
