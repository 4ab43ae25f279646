"""The command line."""

from maskwise.cli.main import main

__all__ = ["main"]
