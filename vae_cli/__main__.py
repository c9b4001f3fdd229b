"""`python -m vae_cli` is `vae`."""

from vae_cli.cli import main

main()
