"""`key=value` words as arguments, and the lines of `evaluate.also`: which evaluation is due when, on how many images."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Mapping, Sequence

from maskwise.functional.errors import UserError
from maskwise.recipe_schema import kind_of, nearest
from maskwise.recipe_text import Misread, convert, parse

NOT_FOR_USERS = ("world", "device", "classifier", "out", "say")


@dataclass(frozen=True)
class Scheduled:
    """One line of `evaluate.also`: name of the report, row of EVALUATIONS, epochs between two (0: only at the end), subsets, options."""

    name: str
    evaluation: str
    every: int
    limit_train: int | None = None
    limit_test: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def schedule(every: int = 0, limit_train: int | None = None, limit_test: int | None = None) -> dict:
    """The words of a line that are not options of the evaluation itself; raises UserError for those that cannot be."""
    for key, value, least in (("every", every, 0), ("limit_train", limit_train, 1), ("limit_test", limit_test, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UserError(f"{key}={value} must be a whole number from {least}")
    return {"every": every, "limit_train": limit_train, "limit_test": limit_test}


def scheduled(lines: Sequence[str] | None) -> list[Scheduled]:
    """The lines `NAME [every=EPOCHS] [limit_train=N] [limit_test=N] [option=value ...]`; raises UserError for the first mistake."""
    from maskwise.evaluation import EVALUATIONS

    found: list[Scheduled] = []
    for line in lines or ():
        name, *words = line.split() or [""]
        if name not in EVALUATIONS:
            raise UserError(f"no evaluation {name!r}{nearest(name, EVALUATIONS)}; there are {', '.join(EVALUATIONS)}")
        given = options_of(words, name, schedule, EVALUATIONS[name])
        when = schedule(**{key: given.pop(key) for key in ("every", "limit_train", "limit_test") if key in given})
        again = sum(one.evaluation == name for one in found)
        found.append(Scheduled(f"{name}_{again + 1}" if again else name if name != "knn" else "knn_also", name, **when, options=given))
    return found


def options_of(words: Sequence[str], verb: str, *functions) -> dict[str, object]:
    """`key=value` words as keyword arguments of a verb's functions; raises UserError for one that none of them has."""
    parameters = [each for function in functions for each in inspect.signature(function).parameters.values()]
    accepted = {each.name: each.default for each in parameters if each.default is not each.empty and each.name not in NOT_FOR_USERS}
    options: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{verb}: `{word}` is not key=value")
        if key not in accepted:
            raise UserError(f"{verb} has no option {key}{nearest(key, accepted)}; it accepts {', '.join(accepted)}")
        if key in options:
            raise UserError(f"{verb}: {key} is given twice; keep one")
        entries, _ = parse(f"value: {text}", word)
        try:
            options[key] = convert(entries["value"].value, kind_of(None, accepted[key]) if not isinstance(accepted[key], (bool, tuple)) else Any)
        except (KeyError, Misread) as error:
            raise UserError(f"{verb}: {key}: {error if isinstance(error, Misread) else f'cannot read `{text}`'}") from None
    return options
