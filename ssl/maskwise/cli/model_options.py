"""Options of `maskwise.load` as `key=value` words, for every command that reads a model."""

from __future__ import annotations

from typing import Any, Optional, Union

from maskwise.errors import UserError

TEXT_OVERRIDES = ("name", "alias", "position", "min_scope", "layout", "weights")  # taken as they are


def free_options(words: list[str], verb: str) -> dict[str, object]:
    """Parse `key=value` words: text as it is for TEXT_OVERRIDES, else YAML; the callee checks the names."""
    from maskwise.recipe.yaml_text import Word, convert

    options: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{verb}: `{word}` is not key=value")
        if key in options:
            raise UserError(f"{verb}: {key} is given twice; keep one")
        kind = Optional[Union[str, tuple[str, ...]]] if key in TEXT_OVERRIDES else Any
        options[key] = convert(Word(text), kind)
    return options


def split(words: list[str], verb: str) -> tuple[dict[str, object], list[str]]:
    """Split the words of a command into the options of `maskwise.load` and the other words."""
    from maskwise.api import MODEL_OPTIONS

    of_model = [word for word in words if word.partition("=")[0] in MODEL_OPTIONS]
    return free_options(of_model, verb), [word for word in words if word not in of_model]
