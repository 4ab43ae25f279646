"""Rows of all recipe keys: readers, type, default, bounds, meaning and source of each."""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path

from maskwise.nn.backbones.timm_registry import extra_arguments, family_of, timm_class
from maskwise.recipe.meanings import MEANINGS
from maskwise.recipe.schema import REQUIRED, UNSET, Key, named, schema, tables
from maskwise.recipe.sections import SECTIONS
from maskwise.recipe.signatures import bounds_of
from maskwise.recipe.yaml_text import words, write

PACKAGE = Path(__file__).parents[1]
TIMM_MODELS = (  # one of each of timm's classes, whose arguments are keys of section backbone
    "vit_small_patch16_224",
    "eva02_small_patch14_224",
    "resnet50",
    "convnext_small",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "maxvit_tiny_tf_224",
    "pit_s_224",
    "efficientnet_b0",
    "mixer_s16_224",
)


@dataclass(frozen=True)
class KeyRow:
    """A recipe key as texts.

    readers: the names or methods with which a recipe may hold the key with this type and default, "" for all.
    """

    key: str
    readers: str
    type: str
    default: str
    bounds: str
    meaning: str
    source: str

    @property
    def section(self) -> str:
        """Section of the key, "" for one outside sections."""
        return self.key.rpartition(".")[0]


def key_rows() -> list[KeyRow]:
    """Return the rows of all keys, in the order of the sections."""
    names = {section: cls.name for section, cls in SECTIONS.items() if hasattr(cls, "name")}
    by_method = {method: keys_for(names, method=method) for method in tables()["method"]}
    seed = by_method[names["method"]]["seed"]
    rows = [row("seed", "", seed, "recipe/schema.py")]
    for section in SECTIONS:
        base = next(method for method in (names["method"], *by_method) if inside(by_method[method], section))
        if section == "backbone":
            choices = {model: keys_for(names, backbone=model) for model in TIMM_MODELS}
        elif section in tables() and section != "method":
            choices = {name: keys_for(names, method=base, **{section: name}) for name in tables()[section]}
        else:
            choices = {}
        kinds = (*by_method.values(), *choices.values())
        for key in dict.fromkeys(key for keys in kinds for key in inside(keys, section)):
            rows += rows_of(key, choices, by_method)
    return rows


def keys_for(names: Mapping[str, str], **changed: str) -> dict[str, Key]:
    """Return the keys of a recipe with these names, of timm's arguments those in MEANINGS."""
    keys, _ = schema({**names, **changed}, {})
    return {
        key: rule
        for key, rule in keys.items()
        if not rule.unused and (rule.default is not UNSET or meaning(key) is not None)
    }


def inside(keys: Mapping[str, Key], section: str) -> list[str]:
    """Return the keys of one section."""
    return [key for key in keys if key.startswith(section + ".")]


def rows_of(key: str, choices: Mapping[str, dict[str, Key]], methods: Mapping[str, dict[str, Key]]) -> list[KeyRow]:
    """Return a row for each type and default of a key, by the section's names or else by methods."""
    section = key.partition(".")[0]
    by_name = grouped(key, choices)
    own = section == "method" or (bool(by_name) and list(by_name.values()) != [list(choices)])
    axis = choices if own and section != "method" else methods
    rows = []
    for names in grouped(key, axis).values():
        readers = names_text([called(section, name) for name in names], len(axis))
        owners = names if own else list(choices)
        source = sources(section, key, owners)
        rows.append(row(key, readers if own or not readers else f"method {readers}", axis[names[0]][key], source))
    return rows


def names_text(names: Sequence[str], of: int) -> str:
    """Return names for a row, "" where they are all `of` names."""
    return "" if len(names) == of else ", ".join(names)


def called(section: str, name: str) -> str:
    """Return a name as rows show it: the class of a timm model, other names as they are."""
    return timm_class(name).__name__ if section == "backbone" and name in TIMM_MODELS else name


def grouped(key: str, axis: Mapping[str, dict[str, Key]]) -> dict[tuple[str, str], list[str]]:
    """Return {(type, default): names} of the names under which a key exists."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, keys in axis.items():
        if key in keys:
            groups.setdefault((type_text(keys[key]), default_text(keys[key])), []).append(name)
    return groups


def row(key: str, readers: str, rule: Key, source: str) -> KeyRow:
    """Return the row of one key with one type and default."""
    bounds = ", ".join(dict.fromkeys(str(bound) for bound in bounds_of(rule.type)))
    return KeyRow(key, readers, type_text(rule), default_text(rule), bounds, meaning(key) or "", source)


def meaning(key: str) -> str | None:
    """Return what a key means, None for one without a text."""
    section, _, name = key.rpartition(".")
    return MEANINGS.get(section, {}).get(name)


def type_text(rule: Key) -> str:
    """Return the type of a key in words."""
    return "any" if rule.type is typing.Any else words(rule.type)


def default_text(rule: Key) -> str:
    """Return the default of a key as a recipe spells it."""
    if rule.default is REQUIRED:
        return "required"
    return "timm's" if rule.default is UNSET else write(rule.default)


def sources(section: str, key: str, names: Sequence[str]) -> str:
    """Return the files below the package that declare a key, for a section and the classes of some names."""
    name = key.partition(".")[2]
    fields = [cls for cls in reversed(SECTIONS[section].__mro__) if name in getattr(cls, "__dataclass_fields__", ())]
    if fields:
        return file_of(fields[0])
    if section == "backbone" and name in extra_arguments(names[0]):
        return file_of(type(family_of(names[0])))
    declared = [declaration(named(section, choice), name) for choice in names]
    files = list(dict.fromkeys(file_of(found) for found in declared if found is not None))
    return os.path.commonpath(files) + "/" if len(files) > 2 else ", ".join(files) or "timm"


def declaration(maker, name: str):
    """Return the class or function that declares an argument of a constructor, None where timm does."""
    makers = [cls for cls in maker.__mro__ if "__init__" in vars(cls)] if inspect.isclass(maker) else [maker]
    for each in makers:
        function = inspect.unwrap(each.__init__ if inspect.isclass(each) else each)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name == name:
                return each
            if is_dataclass(parameter.default) and name in parameter.default.__dataclass_fields__:
                return type(parameter.default)
    return None


def file_of(declared) -> str:
    """Return the file of a class or function, below the package."""
    return Path(inspect.getsourcefile(declared)).relative_to(PACKAGE).as_posix()
