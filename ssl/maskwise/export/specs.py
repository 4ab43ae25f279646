"""What a folder says of its encoder, looked at before anything is built from it: a description may come from anybody."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from maskwise.functional.errors import UserError
from maskwise.nn.encoder import encoder_from_spec

LARGEST, DEEPEST = 1 << 16, 1 << 10  # of any number, and of those that count layers


@contextlib.contextmanager
def told(origin) -> Iterator[None]:
    """Whatever a description that makes no sense lets go wrong inside ends in one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except Exception as error:  # it may be wrong in any way there is
        first = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise UserError(f"{origin} describes no encoder that can be built ({first}): take it anew from where it came") from None


def check(spec, origin) -> dict:
    """The description of an encoder, if one can be built of it; without memory, and no file and no code that it names is touched.

    Raises UserError.
    """
    with told(origin):
        plausible(spec["backbone"])
        plausible(spec["pooling"])
        with torch.device("meta"):
            encoder_from_spec(spec)
        for key in ("mean", "std", "image_size"):
            if not all(isinstance(value, (int, float)) for value in spec[key]):
                raise ValueError(f"{key}={spec[key]!r}")
        if not 0 < spec["crop_pct"] <= 1:
            raise ValueError(f"crop_pct={spec['crop_pct']}")
    return spec


def plausible(arguments: dict) -> None:
    """Raises ValueError for arguments of a file's that name a further file, or a size that no network has."""
    if {"weights", "pretrained"} & arguments.keys():
        raise ValueError("a description names no file of weights")
    for key, value in arguments.items():
        for number in numbers(value):
            if not abs(number) <= (DEEPEST if key.startswith("depth") else LARGEST):
                raise ValueError(f"{key}={number} is of no network")


def numbers(value) -> Iterator[float]:
    """The numbers in a value, however deep."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)


def json_object(path: Path) -> dict:
    """The object in a JSON file; {} where there is no such file, or something else in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
