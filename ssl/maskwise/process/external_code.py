"""External classes, `module:Name`: their import, and the modules that a file may name."""

from __future__ import annotations

import importlib
import inspect
import os

VARIABLE = "MASKWISE_MODULES"
_permitted: set[str] = set()


class NoClass(Exception):
    """Signal a `module:Name` that is no importable class; the text gives the reason."""


def permit(name: str) -> None:
    """Permit descriptions of encoders to name the module of `module:Name`, as a recipe read in this process does."""
    _permitted.add(module_of(name))


def is_listed(name: str) -> bool:
    """Return whether MASKWISE_MODULES lists the module of `module:Name`."""
    return module_of(name) in os.environ.get(VARIABLE, "").replace(",", " ").split()


def is_permitted(name: str) -> bool:
    """Return whether the description of an encoder may name `module:Name`: permitted, or listed."""
    return module_of(name) in _permitted or is_listed(name)


def module_of(name: str) -> str:
    """Return the module of `module:Name`."""
    return name.partition(":")[0]


def external_class(name: str) -> type:
    """Import the class `module:Name`; raises NoClass for anything else."""
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise NoClass(f"`{name}` cannot be imported: {error}") from None
    if not inspect.isclass(cls):
        raise NoClass(f"`{name}` is no class")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise NoClass(f"`{name}` does not implement {missing}, which its base class requires")
    return cls
