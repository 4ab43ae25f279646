"""Parameters, types and bounds read from signatures."""

from __future__ import annotations

import collections.abc
import inspect
import pathlib
import types
import typing
from typing import Annotated

from maskwise.bounds import BOUNDS
from maskwise.recipe.yaml_text import ParseError

SIMPLE = (int, float, bool, str)


def parameters_of(maker) -> tuple[dict[str, inspect.Parameter], dict[str, object]]:
    """Return the parameters and annotations of a class or function, with those of parents that get its **kwargs."""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, object] = {}
    functions = [maker]
    if inspect.isclass(maker):
        functions = [vars(cls)["__init__"] for cls in maker.__mro__ if "__init__" in vars(cls)]
    for function in functions:
        own = [parameter for parameter in inspect.signature(function).parameters.values() if parameter.name != "self"]
        try:
            hints = {**typing.get_type_hints(function, include_extras=True), **hints}
        except (NameError, TypeError):
            pass
        for parameter in own:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                parameters.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
            break
    return parameters, hints


def value_type(hint, default):
    """Return the type of an argument from its annotation, or else from its default."""
    annotated = recipe_type(hint)
    if annotated is not None and typing.get_origin(hint) is not collections.abc.Sequence:  # its default has its length
        return annotated
    if type(default) in SIMPLE:
        return type(default)
    if isinstance(default, tuple) and default and all(type(item) in SIMPLE for item in default):
        return tuple[tuple(type(item) for item in default)]
    return typing.Any


def recipe_type(hint):
    """Return an annotation in the types of a recipe: text for a path, a tuple for a sequence; None without one."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is pathlib.Path:
        return str
    if hint in SIMPLE or hint is type(None) or origin is typing.Literal:
        return hint
    if origin not in (Annotated, typing.Union, types.UnionType, tuple, collections.abc.Sequence):
        return None
    if origin is Annotated:
        bare = recipe_type(inner[0])
        return None if bare is None else Annotated[(bare, *inner[1:])]
    parts = [part if part is Ellipsis else recipe_type(part) for part in inner]
    if None in parts:
        return None
    if origin is tuple:
        return tuple[tuple(parts)]
    return tuple[parts[0], ...] if origin is collections.abc.Sequence else typing.Union[tuple(parts)]


def bounds_of(hint) -> list:
    """Return the bounds that an annotation holds, at any depth."""
    bounds = [bound for bound in getattr(hint, "__metadata__", ()) if isinstance(bound, BOUNDS)]
    inner = (hint.__origin__,) if bounds else typing.get_args(hint)
    return bounds + [bound for item in inner for bound in bounds_of(item)]


def check_bounds(hint, value) -> None:
    """Raises ParseError when a number, or one of several, lies outside the bounds of its annotation."""
    numbers = [
        item
        for item in (value if isinstance(value, tuple) else (value,))
        if isinstance(item, (int, float)) and not isinstance(item, bool)
    ]
    for bound in bounds_of(hint):
        for number in numbers:
            if not bound.holds(number):
                raise ParseError(f"must be {bound}, not {number}")
