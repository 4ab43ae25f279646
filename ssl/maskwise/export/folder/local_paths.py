"""Local paths in what is exported, shortened to their last name: they can name the user and the machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

BEGINS = r"(?:file:/+|/(?!/)|~[\w.-]*/|\.\.?/|[A-Za-z]:[\\/]|\\\\)"  # of an absolute path, or one relative to . or ~
WHOLE = re.compile(rf"{BEGINS}.+", re.S)
IN_TEXT = re.compile(rf"(?<![\w./\\-]){BEGINS}[^\s'\"`,;|<>()\[\]{{}}]+")
PATH_KEYS = {"path", "test_path", "train", "test", "root", "classes", "folder", "file", "cache"}
MODEL_KEYS = {"start_from", "model", "weights", "guide", "head"}
FILE_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors", ".bin", ".ckpt")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def without_paths(value, key: str = ""):
    """Shorten the paths in a value, in its keys and inside longer text; `key` names the value in a recipe."""
    if isinstance(value, dict):
        shortened: dict = {}
        for name, entry in value.items():
            shortened[unused(without_paths(name), shortened)] = without_paths(entry, str(name))
        return shortened
    if isinstance(value, (list, tuple)):
        return [without_paths(entry, key) for entry in value]
    if not isinstance(value, str):
        return value
    if key in MODEL_KEYS:
        return model_name(value)
    if WHOLE.fullmatch(value) or key in PATH_KEYS and not re.search(r"\s/\s", value):
        return last_name(value)
    for root in (str(Path.home()), os.getcwd()):  # they may contain spaces
        value = value.replace(root + os.sep, os.sep) if len(root) > 1 else value
    return IN_TEXT.sub(lambda match: last_name(match[0]), value)


def model_name(model: str) -> str:
    """Return the name of a model without local folders, the prefix hub: and the revision."""
    name = model.removeprefix("hub:").removeprefix("hf-hub:").partition("@")[0]
    is_file = os.path.splitext(name)[1] in FILE_SUFFIXES or os.path.exists(os.path.expanduser(model))
    if name == model and (is_file or not HUB_NAME.fullmatch(name)):
        return last_name(model)
    return name


def last_name(path: str) -> str:
    """Return the last name of a path of any system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def unused(name, taken: dict):
    """Return a name, or the name with the first number that is not taken."""
    if name not in taken:
        return name
    return next(numbered for i in range(2, len(taken) + 2) if (numbered := f"{name} ({i})") not in taken)
