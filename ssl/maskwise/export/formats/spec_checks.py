"""Validation of encoder descriptions: config.json and encoder.json may come from untrusted sources."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from maskwise.errors import UserError
from maskwise.nn.encoder import encoder_from_spec
from maskwise.process.external_code import VARIABLE, is_permitted, module_of

MAX_NUMBER, MAX_DEPTH = 1 << 16, 1 << 10  # of any argument, and of arguments that count layers


@contextlib.contextmanager
def user_errors(origin) -> Iterator[None]:
    """Turn any exception raised inside into a one-line UserError that names `origin`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except Exception as error:  # an invalid description can fail anywhere in timm or torch
        first = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise UserError(
            f"{origin} does not describe an encoder that can be built ({first}): export or download it again"
        ) from None


def check(spec, origin) -> dict:
    """Return an encoder description after checking that it can be built.

    Builds on the meta device: allocates no memory and opens no file and runs no code named in it. Raises UserError.
    """
    with user_errors(origin):
        for section in ("backbone", "pooling"):
            refuse_code(str(spec[section]["name"]))
        check_arguments(spec["backbone"])
        check_arguments(spec["pooling"])
        with torch.device("meta"):
            encoder_from_spec(spec)
        for key in ("mean", "std", "image_size"):
            if not all(isinstance(value, (int, float)) for value in spec[key]):
                raise ValueError(f"{key}={spec[key]!r}")
        if not 0 < spec["crop_pct"] <= 1:
            raise ValueError(f"crop_pct={spec['crop_pct']}")
    return spec


def refuse_code(name: str) -> None:
    """Raise UserError for a class `module:Name` whose import has not been permitted."""
    if ":" in name and not is_permitted(name):
        raise UserError(
            f"it names `{name}`, which is code, and a file alone does not import code; if you trust it, set "
            f"{VARIABLE}={module_of(name)}"
        )


def check_arguments(arguments: dict) -> None:
    """Raise ValueError for constructor arguments that name a weights file or an implausible size."""
    if {"weights", "pretrained"} & arguments.keys():
        raise ValueError("a description may not name a weights file")
    for key, value in arguments.items():
        for number in numbers(value):
            if not abs(number) <= (MAX_DEPTH if key.startswith("depth") else MAX_NUMBER):
                raise ValueError(f"{key}={number} is out of range")


def numbers(value) -> Iterator[float]:
    """Yield the numbers in a value, nested lists and dicts included."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from numbers(entry)


def json_object(path: Path) -> dict:
    """Read the object in a JSON file; {} for a missing file or other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
