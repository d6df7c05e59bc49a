"""The command line: verbs only, everything else is configuration."""

from vinedresser.cli.app import main

__all__ = ["main"]
