"""Make `python -m vae_cli` run the command `vae`."""

from vae_cli.cli import main

if __name__ == "__main__":
    main()
