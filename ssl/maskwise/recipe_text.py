"""Recipe files as text: every scalar keeps its spelling and its line, and the key that reads it decides its type."""

from __future__ import annotations

import itertools
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from maskwise.functional.errors import UserError

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
WHOLE = re.compile(r"[-+]?\d[\d_]*")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = {"", "~", "null", "none"}


@dataclass(frozen=True)
class Scalar:
    """One scalar as it was spelled; a quoted one is always text."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Entry:
    """A value (Scalar, or a list of them, nested) and the place where it was written."""

    value: object
    origin: str


@dataclass(frozen=True)
class Header:
    """What the comment at the head of a recipe says: its first line, and the lines `command`, `cost` and `result`."""

    title: str = ""
    command: str = ""
    cost: str = ""
    result: str = ""

    @property
    def published(self) -> str:
        """The published part of the result, "" where there is none."""
        return self.result.partition("published: ")[2]

    @property
    def not_yet(self) -> str:
        """What the recipe waits for, "" where it can run."""
        return self.result.removeprefix("not yet: ").partition("; ")[0] if self.result.startswith("not yet: ") else ""


class Misread(Exception):
    """A value that its key cannot take; the text says what the key expects."""


def parse(text: str, source: str) -> tuple[dict[str, Entry], list[str]]:
    """Dotted keys of a YAML text with their places, and the mistakes of its form, one line each."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{source}{line}: this is not YAML: {why}") from None
    entries: dict[str, Entry] = {}
    mistakes: list[str] = []
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
        raise Misread("expects a value or a list of values")

    def add(key: str, key_node, node) -> None:
        if key in entries:
            mistakes.append(f"{place(key_node)}: {key}: written twice, first at {entries[key].origin}; keep one")
            return
        try:
            entries[key] = Entry(value_of(node), place(key_node))
        except Misread as error:
            mistakes.append(f"{place(key_node)}: {key}: {error}")

    sections: dict[str, str] = {}
    for key_node, node in root.value:
        name = str(key_node.value)
        if not isinstance(node, yaml.MappingNode):
            add(name, key_node, node)
            continue
        if name in sections:
            mistakes.append(f"{place(key_node)}: section {name}: written twice, first at {sections[name]}; keep one")
        sections.setdefault(name, place(key_node))
        for inner_key, inner in node.value:
            add(f"{name}.{inner_key.value}", inner_key, inner)
    return entries, mistakes


def read(path: Path, source: str) -> tuple[dict[str, Entry], list[str]]:
    """The entries and mistakes of one recipe file; one that cannot be read raises UserError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the recipe {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{source} is not a text file; a recipe is YAML in UTF-8") from None
    return parse(text, source)


def header(text: str) -> Header:
    """The header of a recipe's text; what it does not say stays empty."""
    lines = [line[1:] for line in itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())]
    said = {name: rest.strip() for line in lines for name, _, rest in [line.strip().partition("  ")] if name in ("command", "cost", "result")}
    return Header(lines[0].strip() if lines else "", **said)


def plain(value) -> object:
    """A value whose key states no type: YAML 1.2 numbers, true / false and null; anything else is text."""
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


def convert(value, kind) -> object:
    """A spelled value as `kind` (int, float, bool, str, a Literal, tuple[...] or a union of them); raises Misread."""
    origin = typing.get_origin(kind)
    if kind is typing.Any:
        return plain(value)
    if origin in (typing.Union, types.UnionType):
        for choice in sorted(typing.get_args(kind), key=lambda each: each is not type(None)):
            try:
                return convert(value, choice)
            except Misread:
                continue
        raise Misread(f"expects {words(kind)}, not {spell(value)}")
    if origin is typing.Literal:
        if isinstance(value, Scalar) and value.text in typing.get_args(kind):
            return value.text
        raise Misread(f"expects {words(kind)}, not {spell(value)}")
    if origin is tuple:
        inner = typing.get_args(kind)
        if isinstance(value, list):
            if inner[-1] is Ellipsis and value:
                return tuple(convert(item, inner[0]) for item in value)
            if len(inner) == len(value) and inner[-1] is not Ellipsis:
                return tuple(convert(item, each) for item, each in zip(value, inner))
        raise Misread(f"expects {words(kind)}, not {spell(value)}")
    found = scalar(value, kind) if isinstance(value, Scalar) else Misread
    if found is Misread:
        raise Misread(f"expects {words(kind)}, not {spell(value)}")
    return found


def scalar(value: Scalar, kind):
    text = value.text
    if kind is str:
        return text if value.quoted or text.lower() not in NOTHING - {"none"} else Misread
    if value.quoted:
        return Misread
    if kind is type(None):
        return None if text.lower() in NOTHING else Misread
    if kind is bool:
        return WORDS.get(text.lower(), Misread)
    if kind is int:
        if NUMBER.fullmatch(text) and math.isfinite(float(text.replace("_", ""))):
            number = text.replace("_", "")
            if WHOLE.fullmatch(text):
                return int(number)
            return int(float(number)) if float(number).is_integer() else Misread
        return Misread
    if kind is float:
        if NUMBER.fullmatch(text) and math.isfinite(float(text.replace("_", ""))):
            return float(text.replace("_", ""))
        return Misread
    return Misread


def words(kind) -> str:
    """What a kind is called when it is asked for."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(each) for each in typing.get_args(kind))
    if origin is typing.Literal:
        return " or ".join(str(each) for each in typing.get_args(kind))
    if origin is tuple:
        inner = typing.get_args(kind)
        many = {int: "whole numbers", float: "numbers"}.get(inner[0], "values")
        return f"a list of {many}" if inner[-1] is Ellipsis else f"a list of {len(inner)} {many}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[kind]


def spell(value) -> str:
    """A value as the recipe spelled it."""
    if isinstance(value, list):
        return "[" + ", ".join(spell(item) for item in value) + "]"
    return f'"{value.text}"' if value.quoted else f"`{value.text}`" if value.text else "nothing"


def write(value) -> str:
    """A value as YAML that reads back equal."""
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

    return json.dumps(value, ensure_ascii=False)
