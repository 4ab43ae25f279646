"""Constructors that gather keyword options into frozen dataclasses.

    @option_groups
    def __init__(self, dim: int, *, ablation: Ablation = Ablation()): ...

accepts `iterations=3` as well as `ablation=Ablation(iterations=3)`, and its signature lists the fields of the
dataclass, so recipe keys are read from it as from any other constructor.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace


def option_groups(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor take the fields of its dataclass parameters as keywords of their own.

    A parameter whose default is a dataclass instance is such a group. Fields not given keep the value of that default.
    """
    parameters = list(inspect.signature(init).parameters.values())
    hints = typing.get_type_hints(init, include_extras=True)
    groups = {parameter.name: parameter.default for parameter in parameters if is_dataclass(parameter.default)}
    flat: list[inspect.Parameter] = []
    for parameter in parameters:
        flat += _fields_as_parameters(groups[parameter.name]) if parameter.name in groups else [parameter]

    @functools.wraps(init)
    def construct(self, *args, **options):
        for name, default in groups.items():
            given = {field.name: options.pop(field.name) for field in fields(default) if field.name in options}
            if given:
                options[name] = replace(options.get(name, default), **given)
        init(self, *args, **options)

    construct.__signature__ = inspect.Signature(flat)
    construct.__annotations__ = {name: hint for name, hint in hints.items() if name not in groups}
    for default in groups.values():
        construct.__annotations__.update(typing.get_type_hints(type(default), include_extras=True))
    return construct


def _fields_as_parameters(default: object) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(type(default), include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(default, field.name),
            annotation=hints[field.name],
        )
        for field in fields(default)
    ]
