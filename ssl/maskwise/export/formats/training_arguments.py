"""Arguments of a research training run: those in its file, and in a YAML file beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

FILES = ("configs.yaml", "args.yaml")


class TolerantLoader(yaml.SafeLoader):
    """YAML loader that reads Python's tuple tags as lists and ignores other Python tags."""


def _python(loader, suffix, node):
    return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else None


TolerantLoader.add_multi_constructor("tag:yaml.org,2002:python/", _python)


def arguments(content: dict, path: Path) -> dict:
    """Return a training file's arguments, completed by those of configs.yaml or args.yaml in its folder."""
    args = content.get("args")
    return beside(path) | (vars(args) if isinstance(args, argparse.Namespace) else {})


def beside(path: Path) -> dict:
    """Return the arguments in a YAML file of a weights file's folder; {} without one that can be read."""
    for name in FILES:
        try:
            settings = yaml.load((path.parent / name).read_text(encoding="utf-8"), Loader=TolerantLoader)
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
            continue
        if isinstance(settings, dict):
            return settings
    return {}
