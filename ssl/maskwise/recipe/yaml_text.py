"""YAML of recipes: scalars with their spelling and line; the type of a key decides how a scalar is read."""

from __future__ import annotations

import itertools
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from maskwise.errors import UserError
from maskwise.recipe.mistakes import Mistake

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
WHOLE = re.compile(r"[-+]?\d[\d_]*")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = {"", "~", "null", "none"}
SIMPLE = (int, float, bool, type(None))
CONTINUES, CONTINUED = "\\", " " * 8  # the end and the indent of a continued line of a header


@dataclass(frozen=True)
class Scalar:
    """A scalar as written; a quoted one is always text."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Word(Scalar):
    """A value of the command line: text as it is where the key is text, YAML otherwise."""

    def read_as(self, hint) -> object:
        """Return the Scalar or list to convert to `hint`."""
        choices, plain_text = alternatives(hint), Scalar(self.text)
        lists = any(typing.get_origin(choice) is tuple for choice in choices)
        if str not in choices or not self.text or (lists and self.text.startswith("[")):
            return self.parsed()
        others = [choice for choice in choices if choice in SIMPLE]
        if any(scalar(plain_text, choice) is not ParseError for choice in others):
            return plain_text
        return Scalar(self.text, quoted=True)

    def parsed(self) -> object:
        """Return the word read as YAML, itself where it is not YAML."""
        try:
            entries, _ = parse(f"value: {self.text}", "")
            return entries["value"].value
        except (UserError, KeyError):
            return Scalar(self.text)


@dataclass(frozen=True)
class Entry:
    """A value (Scalar, or a nested list of them) and the place where it was written."""

    value: object
    origin: str


@dataclass(frozen=True)
class Header:
    """The comment at the head of a recipe: first line, `command`, `cost`, `result`, and `raw`, the source of both."""

    title: str = ""
    command: str = ""
    cost: str = ""
    result: str = ""
    raw: str = ""

    @property
    def published(self) -> str:
        """Published part of the result, "" without one."""
        return self.result.partition("published: ")[2]

    @property
    def not_yet(self) -> str:
        """Part that the recipe needs and that does not exist yet, "" where it can run."""
        return self.result.removeprefix("not yet: ").partition("; ")[0] if self.result.startswith("not yet: ") else ""


class ParseError(Exception):
    """A value of the wrong type or out of bounds; the text states what the key expects."""


def parse(text: str, source: str) -> tuple[dict[str, Entry], list[Mistake]]:
    """Return the dotted keys of a YAML text with their places, and the mistakes of form."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{source}{line}: this is not YAML: {why}") from None
    entries: dict[str, Entry] = {}
    mistakes: list[Mistake] = []
    if root is None:
        return entries, mistakes
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{source}:1: a recipe is made of sections (`section:` and indented `key: value` lines)")

    def place(node) -> str:
        return f"{source}:{node.start_mark.line + 1}"

    def value_of(node, depth=0):
        if isinstance(node, yaml.ScalarNode):
            return Scalar(node.value, quoted=node.style is not None)
        if isinstance(node, yaml.SequenceNode) and depth < 3:
            return [value_of(child, depth + 1) for child in node.value]
        raise ParseError("expects a value or a list of values")

    def add(key: str, key_node, node) -> None:
        if key in entries:
            line = f"{place(key_node)}: {key}: written twice, first at {entries[key].origin}; keep one"
            mistakes.append(Mistake(line, (key,)))
            return
        try:
            entries[key] = Entry(value_of(node), place(key_node))
        except ParseError as error:
            mistakes.append(Mistake(f"{place(key_node)}: {key}: {error}", (key,)))

    sections: dict[str, str] = {}
    for key_node, node in root.value:
        name = str(key_node.value)
        if not isinstance(node, yaml.MappingNode):
            add(name, key_node, node)
            continue
        if name in sections:
            line = f"{place(key_node)}: section {name}: written twice, first at {sections[name]}; keep one"
            mistakes.append(Mistake(line))
        sections.setdefault(name, place(key_node))
        for inner_key, inner in node.value:
            add(f"{name}.{inner_key.value}", inner_key, inner)
    return entries, mistakes


def read(path: Path, source: str) -> tuple[dict[str, Entry], list[Mistake]]:
    """Return the entries and mistakes of a recipe file. Raises UserError for one that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the recipe {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{source} is not a text file; a recipe is YAML in UTF-8") from None
    return parse(text, source)


def header(text: str) -> Header:
    """Return the header of a recipe's text; missing parts are empty.

    Indented lines continue the one before; the title is the first paragraph.
    """
    lines = [line[1:] for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())]
    title = " ".join(line.strip() for line in itertools.takewhile(str.strip, lines))
    stated: dict[str, str] = {}
    current = ""
    for line in lines:
        name, _, rest = line.strip().partition("  ")
        if name in ("command", "cost", "result", "raw"):
            current = name
            stated[name] = rest.strip()
        elif current and line.startswith(CONTINUED):
            stated[current] = f"{stated[current].removesuffix(CONTINUES).rstrip()} {line.strip()}"
        else:
            current = ""
    return Header(title, **stated)


def plain(value) -> object:
    """Read a value without a type: YAML 1.2 numbers, true / false and null; anything else is text."""
    if isinstance(value, list):
        return tuple(plain(item) for item in value)
    text = value.text
    if value.quoted:
        return text
    if text.lower() in NOTHING:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if WHOLE.fullmatch(text):
        return int(text.replace("_", ""))
    if NUMBER.fullmatch(text):
        return float(text.replace("_", ""))
    return text


def alternatives(hint) -> list:
    """Return the types that a type allows: the members of its unions, without annotations."""
    if typing.get_origin(hint) is typing.Annotated:
        return alternatives(hint.__origin__)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [choice for member in typing.get_args(hint) for choice in alternatives(member)]
    return [hint]


def convert(value, hint) -> object:
    """Read a value as a type: int, float, bool, str, a Literal, tuple[...] or a union of them. Raises ParseError."""
    if isinstance(value, Word):
        value = value.read_as(hint)
    origin = typing.get_origin(hint)
    if hint is typing.Any:
        return plain(value)
    if origin is typing.Annotated:
        return convert(value, hint.__origin__)
    if origin in (typing.Union, types.UnionType):
        return convert_union(value, hint)
    expected = ParseError(f"expects {words(hint)}, not {spell(value)}")
    if origin is typing.Literal:
        if isinstance(value, Scalar) and value.text in typing.get_args(hint):
            return value.text
        raise expected
    if origin is tuple:
        inner = typing.get_args(hint)
        if isinstance(value, list):
            if inner[-1] is Ellipsis and value:
                return tuple(convert(item, inner[0]) for item in value)
            if len(inner) == len(value) and inner[-1] is not Ellipsis:
                return tuple(convert(item, item_hint) for item, item_hint in zip(value, inner))
        raise expected
    result = scalar(value, hint) if isinstance(value, Scalar) else ParseError
    if result is ParseError:
        raise expected
    return result


def convert_union(value, hint) -> object:
    """Read a value as the first type of a union that takes it, null before the others. Raises ParseError."""
    for choice in sorted(typing.get_args(hint), key=lambda choice: choice is not type(None)):
        try:
            return convert(value, choice)
        except ParseError:
            continue
    raise ParseError(f"expects {words(hint)}, not {spell(value)}")


def scalar(value: Scalar, hint):
    """Return a scalar as a plain type, or the class ParseError where it is of another."""
    text = value.text
    if hint is str:
        return text if value.quoted or text.lower() not in NOTHING - {"none"} else ParseError
    if value.quoted:
        return ParseError
    if hint is type(None):
        return None if text.lower() in NOTHING else ParseError
    if hint is bool:
        return WORDS.get(text.lower(), ParseError)
    number = text.replace("_", "")
    if hint not in (int, float) or not NUMBER.fullmatch(text) or not math.isfinite(float(number)):
        return ParseError
    if hint is float:
        return float(number)
    if WHOLE.fullmatch(text):
        return int(number)
    return int(float(number)) if float(number).is_integer() else ParseError


def words(hint) -> str:
    """Return the name of a type in messages."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return words(hint.__origin__)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(choice) for choice in inner)
    if origin is typing.Literal:
        return " or ".join(str(choice) for choice in inner)
    if origin is tuple:
        item = inner[0].__origin__ if typing.get_origin(inner[0]) is typing.Annotated else inner[0]
        many = {int: "whole numbers", float: "numbers"}.get(item, "values")
        many = f"{many} ({words(item)})" if typing.get_origin(item) is typing.Literal else many
        return f"a list of {many}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {many}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[hint]


def spell(value) -> str:
    """Return a value as the recipe spells it, for messages."""
    if isinstance(value, list):
        return "[" + ", ".join(spell(item) for item in value) + "]"
    if value.quoted:
        return f'"{value.text}"'
    return f"`{value.text}`" if value.text else "nothing"


def write(value) -> str:
    """Return a value as YAML that reads back equal."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(write(item) for item in value) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    if re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value.lower() not in NOTHING | set(WORDS):
        return value
    import json

    text = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)
