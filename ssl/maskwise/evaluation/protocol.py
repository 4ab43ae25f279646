"""Rows of EVALUATIONS and the base of their options."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence

import torch

from maskwise.bounds import BOUNDS
from maskwise.data.class_matching import numbered_like
from maskwise.data.datasets.labels import why_unlabeled
from maskwise.errors import UserError
from maskwise.evaluation.report import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of an evaluation; types and bounds in the annotations are checked at construction. Raises UserError."""

    evaluation: typing.ClassVar[str] = "evaluation"

    def __post_init__(self) -> None:
        for key, hint in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, key)
            if not fits(value, hint):
                several = [part for part in parts_of(hint) if typing.get_origin(part) is Sequence]
                if several and is_list(value):  # name the entry, not the list
                    value = next((entry for entry in value if not fits(entry, typing.get_args(several[0])[0])), value)
                text = " or ".join(dict.fromkeys(filter(None, map(described, parts_of(hint)))))
                raise UserError(f"{self.evaluation}: {key} is {value}; it must be {text}")


def parts_of(hint) -> tuple:
    """Return the alternatives of a type hint."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def fits(value, hint) -> bool:
    """Return whether a value has the type of a hint and lies within its bounds; `object` takes all."""
    return any(fits_part(value, part) for part in parts_of(hint))


def fits_part(value, hint) -> bool:
    """Return whether a value fits one alternative of a type hint."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *bounds = typing.get_args(hint)
        return fits(value, kind) and all(bound.holds(value) for bound in bounds if isinstance(bound, BOUNDS))
    if typing.get_origin(hint) is Sequence:
        return is_list(value) and all(fits(entry, typing.get_args(hint)[0]) for entry in value)
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and not isinstance(value, bool) and math.isfinite(value)
    return not isinstance(hint, type) or isinstance(value, hint)


NUMBERS = {int: numbers.Integral, float: numbers.Real}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", os.PathLike: "a path"}


def described(hint) -> str | None:
    """Return one alternative of a type hint in words, None for a list and for None."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *bounds = typing.get_args(hint)
        texts = [str(bound) for bound in bounds if isinstance(bound, BOUNDS)]
        return ", ".join(texts if kind is float else [NAMES[kind], *texts])
    return NAMES.get(hint)


def is_list(value) -> bool:
    """Return whether a value is a list of several, not a text."""
    return isinstance(value, Sequence) and not isinstance(value, str)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A row of EVALUATIONS, callable as (encoder, data, world, **options) -> Report.

    options: the class of the options; requires: roles that `data` must hold; labels: whether train and test images need
    labels; readers: role -> reader of a benchmark's own folder layout, which returns {} for any other folder.
    """

    run: Callable[..., Report]
    options: type[Options]
    requires: tuple[str, ...] = ("train", "test")
    labels: bool = True
    readers: Mapping[str, Callable[..., dict]] = dataclasses.field(default_factory=dict)

    def __call__(self, encoder, data: dict, world=None, **options) -> Report:
        return self.run(encoder, data, world, **options)

    @property
    def option_names(self) -> tuple[str, ...]:
        """Names of the options, in order."""
        return tuple(field.name for field in dataclasses.fields(self.options))


ROLES = {"train": "the training images", "test": "the test images", "gallery": "the gallery images"}


def labeled_sets(evaluation: str, data: dict, *roles: str) -> dict:
    """Return `data` with the classes of all roles numbered as in the first one, matched by name.

    Raises UserError for a role without images or labels, and for classes that the first role does not have.
    """
    for role in roles:
        images = data.get(role)
        what = ROLES[role]
        if images is None:
            raise UserError(
                f"{evaluation} needs labels, and {what} have none; give {role}=FOLDER with one subfolder per class"
            )
        if images.labels is None:
            raise UserError(f"{evaluation} needs labels: {why_unlabeled(images, what)}")
        if not len(images):
            raise UserError(f"{evaluation}: {what} are an empty set; give {role}=FOLDER that holds images")
        if missing := int((torch.as_tensor(images.labels) < 0).sum()):
            raise UserError(f"{evaluation}: {missing} of {what} have no label, only a number below 0; leave them out")
    data = dict(data)
    for role in roles[1:]:
        data[role] = numbered_like(data[role], data[roles[0]], evaluation, ROLES[role], ROLES[roles[0]])
    return data


def fitting_warmup(epochs: int, published: Mapping) -> int:
    """Return the published epochs of warm-up, in proportion where a run of `epochs` is not longer than they are."""
    warmup = published["warmup_epochs"]
    return warmup if warmup < epochs else warmup * epochs // published["epochs"]


def as_tuple(value) -> tuple:
    """Return several values as a tuple, a single one as a tuple of one."""
    return tuple(value) if is_list(value) else (value,)
