"""Lines of `evaluate.also` (which evaluation, how often, on how many images), and `key=value` words as arguments."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType, Optional

from maskwise.compat import RENAMED_EVALUATION_OPTIONS
from maskwise.errors import UserError
from maskwise.recipe.schema import nearest
from maskwise.recipe.signatures import parameters_of, value_type
from maskwise.recipe.yaml_text import ParseError, Word, convert

PATH = NewType("PATH", str)
WHEN = ("every", "limit_train", "limit_test", "test")  # words of a line that are no options of the evaluation
NOT_FOR_USERS = ("world", "device", "classifier", "out", "say", "data_options", "test_options", "keep_list")


@dataclass(frozen=True)
class Scheduled:
    """One scheduled evaluation: report name, name in EVALUATIONS, epochs between reports (0: at the end), options.

    test: path of images in a layout that the evaluation reads, in place of the recipe's test images.
    """

    name: str
    evaluation: str
    every: int
    limit_train: int | None = None
    limit_test: int | None = None
    test: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def schedule(
    every: int = 0, limit_train: int | None = None, limit_test: int | None = None, test: object = None
) -> dict:
    """Return the words of a line that are no options of the evaluation; raises UserError for values out of range."""
    wrong = []
    for key, value, least in (("every", every, 0), ("limit_train", limit_train, 1), ("limit_test", limit_test, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            wrong.append(f"{key}={value} must be a whole number from {least}")
    if wrong:
        raise UserError(*wrong)
    return {"every": every, "limit_train": limit_train, "limit_test": limit_test, "test": test}


def scheduled(lines: Sequence[str] | None) -> list[Scheduled]:
    """Parse lines `NAME [every=EPOCHS] [limit_train=N] [limit_test=N] [test=PATH] [option=value ...]`.

    Raises UserError with a line for each mistake.
    """
    from maskwise.evaluation import EVALUATIONS

    plans: list[Scheduled] = []
    wrong: list[str] = []
    for line in lines or ():
        try:
            name, words = evaluation_words(line)
            options = options_of(words, name, schedule, EVALUATIONS[name].options)
            when = schedule(**{key: options.pop(key) for key in WHEN if key in options})
            if when["test"] is not None and not EVALUATIONS[name].readers:
                readers = ", ".join(row for row, entry in EVALUATIONS.items() if entry.readers)
                raise UserError(f"{name}: test={when['test']}: only {readers} read images of their own")
        except UserError as error:
            wrong += str(error).splitlines()
            continue
        repeats = sum(plan.evaluation == name for plan in plans)
        report = "knn_also" if name == "knn" else name  # evaluate.knn_every reports as knn
        plans.append(Scheduled(f"{name}_{repeats + 1}" if repeats else report, name, **when, options=options))
    if wrong:
        raise UserError(*wrong)
    return plans


def names_test(line: str) -> bool:
    """Return whether a line names its own test images."""
    return any(word.startswith("test=") for word in line.split())


def evaluation_words(line: str) -> tuple[str, list[str]]:
    """Split a line `NAME [option=value ...]` into an evaluation's name and words; quotes enclose blanks.

    Raises UserError for another name.
    """
    from maskwise.evaluation import EVALUATIONS

    try:
        name, *words = shlex.split(line) or [""]
    except ValueError:
        raise UserError(f"`{line}` has a quotation mark without its pair") from None
    if name not in EVALUATIONS:
        raise UserError(f"no evaluation {name!r}{nearest(name, EVALUATIONS)}; there are {', '.join(EVALUATIONS)}")
    return name, words


def requested(lines: Sequence[str]) -> dict[str, dict]:
    """Parse lines `NAME [option=value ...]` -> {evaluation: options}. Raises UserError for the first mistake."""
    from maskwise.evaluation import EVALUATIONS

    parsed = [evaluation_words(line) for line in lines]
    return {name: options_of(words, name, EVALUATIONS[name].options) for name, words in parsed}


def options_of(words: Sequence[str], verb: str, *functions) -> dict[str, object]:
    """Return `key=value` words as keyword arguments; raises UserError with a line for each that no function takes."""
    accepted = {name: kind for function in functions for name, kind in option_types(function).items()}
    options: dict[str, object] = {}
    wrong: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        key = RENAMED_EVALUATION_OPTIONS.get(verb.removeprefix("evaluate "), {}).get(key, key)
        if not equals:
            wrong.append(f"{verb}: `{word}` is not key=value")
        elif key not in accepted:
            wrong.append(f"{verb} has no option {key}{nearest(key, accepted)}; it accepts {', '.join(accepted)}")
        elif key in options:
            wrong.append(f"{verb}: {key} is given twice; keep one")
        else:
            try:
                options[key] = option_value(verb, key, text, accepted[key])
            except UserError as error:
                wrong.append(str(error))
    if wrong:
        raise UserError(*wrong)
    return options


def option_types(function) -> dict[str, object]:
    """Return the types of the options of a function; an object, such as a model or a dataset, is given as a path."""
    parameters, hints = parameters_of(function)
    types: dict[str, object] = {}
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty or name in NOT_FOR_USERS:
            continue
        hint, default = hints.get(name, object), parameter.default
        if default is None and hint in (object, Optional[str]):
            types[name] = PATH if hint is object else hint
        else:
            types[name] = Any if isinstance(default, (bool, tuple)) else value_type(None, default)
    return types


def option_value(verb: str, key: str, text: str, kind):
    """Return the text of an option in its type; a path with `~` for the home folder. Raises UserError."""
    try:
        return os.path.expanduser(text) if kind is PATH else convert(Word(text), kind)
    except ParseError as error:
        raise UserError(f"{verb}: {key}: {error}") from None
