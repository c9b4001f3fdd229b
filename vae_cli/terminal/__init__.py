"""Terminal features shared by all subcommands: help, completion and error reporting."""

__all__ = ["completion", "errors", "help"]
