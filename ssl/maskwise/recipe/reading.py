"""Reading a recipe: files, parents and command line in layers, resolved and checked; all mistakes in one error."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from maskwise.compat import RENAMED_RECIPE_KEYS
from maskwise.errors import UserError
from maskwise.recipe import run_length
from maskwise.recipe.consistency import Conflict, conflicts, unbuildable
from maskwise.recipe.evaluation_schedule import names_test, scheduled
from maskwise.recipe.external_code import COMMAND_LINE, untrusted
from maskwise.recipe.mistakes import Mistake, doubts, error_of
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.schema import NAMED_SECTIONS, REQUIRED, UNSET, Key, meant, nearest, schema, unread
from maskwise.recipe.sections import SECTIONS
from maskwise.recipe.signatures import check_bounds
from maskwise.recipe.splits import absent_splits, earlier
from maskwise.recipe.yaml_text import Entry, ParseError, Scalar, Word, convert, header, read, write

SHIPPED = Path(__file__).parents[1] / "configs"
NEEDS_TEST = "needs labeled test images; give data.test_path, data.test_split or data.holdout, or"
TEST_KEYS = "data.test_path data.test_split data.holdout data.name"

__all__ = ["SHIPPED", "Recipe", "locate", "read_recipe", "shipped"]


def read_recipe(path: str | Path, *overrides: str, try_model: bool = True, trusted: Collection[str] = ()) -> Recipe:
    """Return the recipe of a file, a run folder or a shipped name, with `section.key=value` overrides.

    A shipped name is like `pretrain/attmask_hint_vits16`. With `try_model` false the model is not built for a check. A
    class that a file names as `module:Name` is imported only if it is in `trusted`, an override names it too, or
    MASKWISE_MODULES lists its module. Raises UserError that names every mistake with its place.
    """
    file, source = locate(path)
    layers, mistakes = file_layers(file, source)
    if overrides:
        layer, more = override_layer(overrides)
        layers.append(layer)
        mistakes += more
    entries, keys, unknown = merge(layers, trusted)
    values, more = resolve(entries, keys, unknown, source)
    mistakes += more
    intended = run_length.intended_lengths(layers, keys)
    notes, found = adapt(values, entries, layers, intended)
    doubtful = doubts(mistakes)
    found += conflicts(values, doubtful) + without_test(values, entries, layers) + schedule_conflicts(values)
    mistakes += conflict_lines(found, doubtful, entries, source)
    if try_model:
        doubtful = doubts(mistakes)
        mistakes += conflict_lines(unbuildable(values, doubtful), doubtful, entries, source)
    if mistakes and not overrides and (missing := header(file.read_text(encoding="utf-8-sig")).not_yet):
        raise UserError(f"{source} cannot run yet: {missing}")
    if mistakes:
        raise error_of(mistakes, source)
    ordered = {key: values[key] for key in keys if key in values}
    origins = {key: entry.origin for key, entry in entries.items()}
    return Recipe.of(ordered, source=source, origins=origins, intended=intended, notes=tuple(notes))


def locate(path: str | Path) -> tuple[Path, str]:
    """Return the file of a recipe, and its name in messages."""
    given = Path(path).expanduser()
    if given.is_dir() and (given / "recipe.yaml").is_file():
        return given / "recipe.yaml", str(given / "recipe.yaml")
    if given.is_file():
        return given, str(path)
    for name in (str(path), f"{path}.yaml"):
        inside = SHIPPED / name.removeprefix("configs/")
        if not given.is_absolute() and inside.is_file():
            return inside, f"configs/{inside.relative_to(SHIPPED).as_posix()}"
    if given.is_dir():
        raise UserError(f"{path} is a folder without a recipe.yaml; give a recipe file")
    near = nearest(str(path).removesuffix(".yaml").removeprefix("configs/"), shipped())
    raise UserError(f"no recipe {path}{near}; give a YAML file, or one that `maskwise list recipes` names")


def shipped() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(file.relative_to(SHIPPED).with_suffix("").as_posix() for file in SHIPPED.glob("*/*.yaml"))


def file_layers(path: Path, source: str) -> tuple[list[dict[str, Entry]], list[Mistake]]:
    """Return the entries of a recipe and of its parents, the oldest first, and the mistakes of their form."""
    layers: list[dict[str, Entry]] = []
    mistakes: list[Mistake] = []
    visited: list[Path] = []
    child = source
    try:
        while True:
            if path.resolve() in visited:
                raise UserError(f"{source}: `extends` comes back to this file; break the circle")
            visited.append(path.resolve())
            entries, more = read(path, source)
            mistakes += more
            parent = entries.pop("extends", None)
            layers.insert(0, with_names(entries))
            if parent is None:
                return layers, mistakes
            path, source = parent_file(parent, path, source)
    except UserError as error:  # what the other keys mean depends on the parent: none is checked
        raise error_of([*mistakes, Mistake(str(error))], child) from None


def parent_file(parent: Entry, path: Path, source: str) -> tuple[Path, str]:
    """Return the file that `extends` names in the recipe `path`, and its name in messages."""
    if not isinstance(parent.value, Scalar):
        raise UserError(f"{parent.origin}: extends: a recipe has one parent; name one file")
    near = path.parent / parent.value.text
    if near.is_file():
        return near, Path(os.path.normpath(Path(source).parent / parent.value.text)).as_posix()
    try:
        return locate(parent.value.text)
    except UserError as error:
        raise UserError(f"{parent.origin}: extends: {error}") from None


def with_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Spell out names (`masking: none` is `masking.name`), drop empty sections, give old keys their present names."""
    plain = {}
    for key, entry in entries.items():
        if key in SECTIONS and isinstance(entry.value, Scalar):
            if entry.value.text:
                plain[f"{key}.name" if key in NAMED_SECTIONS else key] = entry
        else:
            present = RENAMED_RECIPE_KEYS.get(key, key)
            plain[key if present in entries else present] = entry  # with both written the old one is unknown
    return plain


def override_layer(overrides) -> tuple[dict[str, Entry], list[Mistake]]:
    """Return `section.key=value` words as the last layer of a recipe, and the words of another form."""
    layer: dict[str, Entry] = {}
    mistakes = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            mistakes.append(Mistake(f"command line: `{word}` is not section.key=value", (word,)))
            continue
        layer[key] = Entry(Word(text), COMMAND_LINE)
    return with_names(layer), mistakes


def merge(
    layers: list[dict[str, Entry]], trusted: Collection[str] = ()
) -> tuple[dict[str, Entry], dict[str, Key], dict[str, str]]:
    """Lay each layer over the one before; returns the entries, the keys of the last schema and its unknown names.

    Where a layer changes a name, inherited keys that the new name does not read are dropped.
    """
    entries: dict[str, Entry] = {}
    before: dict[str, Key] = {}
    for layer in layers:
        merged = {**entries, **layer}
        names = {section: SECTIONS[section].name for section in NAMED_SECTIONS}
        refused = {}
        for section in names:
            given = merged.get(f"{section}.name")
            if given and isinstance(given.value, Scalar):
                names[section] = given.value.text
                if reason := untrusted(section, given, trusted):
                    refused[section] = reason
        keys, unknown = schema(names, refused)
        entries = {
            key: entry for key, entry in entries.items() if key in keys and not keys[key].unused or key not in before
        }
        entries.update(layer)
        before = keys
    return entries, keys, unknown


def resolve(
    entries: dict[str, Entry], keys: dict[str, Key], unknown: dict[str, str], source: str
) -> tuple[dict[str, Any], list[Mistake]]:
    """Return the values of all keys, written or default, and the mistakes; doubtful keys have their default."""
    values: dict[str, Any] = {}
    mistakes = []
    for section, why in unknown.items():
        name = f"{section}.name"
        mistakes.append(Mistake(f"{entries[name].origin}: {name}: {why}", (name,)))
    for key, entry in entries.items():
        if key in keys:
            try:
                value = convert(entry.value, keys[key].type)
                check_bounds(keys[key].type, value)
                values[key] = value
            except ParseError as error:
                mistakes.append(Mistake(f"{entry.origin}: {key}: {error}", (key,)))
        elif key.partition(".")[0] not in unknown:
            intended = meant(key, keys)
            doubtful = () if intended is None else (intended,)
            mistakes.append(Mistake(f"{entry.origin}: {key}: {unread(key, keys)}", doubtful))
    for section in unknown:
        values.pop(f"{section}.name", None)
    doubtful_keys = doubts(mistakes)
    for key, rule in keys.items():
        if rule.default is REQUIRED and key not in values:
            values[key] = None
            if key not in entries and key not in doubtful_keys:
                text = f"missing; write it into the recipe or give {key}=... on the command line"
                mistakes.append(Mistake(f"{source}: {key}: {text}", (key,)))
        elif rule.default is not UNSET and key not in values:
            values[key] = rule.default
    return values, mistakes


def adapt(
    values: dict[str, Any],
    entries: dict[str, Entry],
    layers: list[dict[str, Entry]],
    intended: dict[str, tuple[run_length.Length, ...]],
) -> tuple[list[str], list[Conflict]]:
    """Fit values to a shorter run and to the folder of images, with their origins; returns lines, and conflicts.

    Of values written for another run or folder only; what was written for this one is a conflict or stays.
    """
    changed, notes = absent_splits(values, layers)
    found: list[Conflict] = []
    if values["train.steps"] is None:
        fit = run_length.fit(values, intended, 0, f"train.epochs is {values['train.epochs']}")
        changed |= fit.values
        notes += fit.notes
        found = fit.conflicts
    for key, value in changed.items():
        before = entries[key].origin if key in entries else "default"
        entries[key] = Entry(Scalar(write(value)), f"was {write(values[key])}, {before}")
        values[key] = value
    return notes, found


def conflict_lines(
    found: Iterable[Conflict], doubtful: Collection[str], entries: dict[str, Entry], source: str
) -> list[Mistake]:
    """Return conflicts as mistakes, without those that depend on a doubtful key."""
    mistakes = []
    for concerned, why in found:
        keys = concerned.split()
        if not set(keys).intersection(doubtful):
            mistakes.append(Mistake(blamed(entries, keys, why, source), tuple(keys)))
    return mistakes


def blamed(entries: dict[str, Entry], concerned: list[str], why: str, source: str) -> str:
    """Return a conflict as a line: where the first of its keys was written, the worst of them and the text."""
    written = [entries[key].origin for key in concerned if key in entries]
    prefix = "" if why.startswith(f"{concerned[0]}.") else f"{concerned[0]}: "
    return f"{written[0] if written else source}: {prefix}{why}"


def without_test(values: dict[str, Any], entries: dict[str, Entry], layers: list[dict[str, Entry]]) -> list[Conflict]:
    """Switch off the evaluations during training where there are no test images; returns those that were asked for.

    A data.test_split=null written after an evaluation switches it off.
    """
    if has_test(values):
        return []
    found = []
    for key, name in (("evaluate.knn_every", "k-NN"), ("evaluate.top1_every", "the accuracy")):
        if values.get(key):
            values[key] = 0
            if key in entries and not earlier(layers, key, "data.test_split"):
                found.append((f"{key} {TEST_KEYS}", f"{name} {NEEDS_TEST} 0"))
    if any(not names_test(line) for line in values["evaluate.also"] or ()):
        found.append((f"evaluate.also {TEST_KEYS}", f"{NEEDS_TEST} leave it out"))
    return found


def schedule_conflicts(values: Mapping[str, Any]) -> list[Conflict]:
    """Return the mistakes in the lines of evaluate.also."""
    try:
        scheduled(values["evaluate.also"])
    except UserError as error:
        return [("evaluate.also", text) for text in str(error).splitlines()]
    return []


def has_test(values: Mapping[str, Any]) -> bool:
    """Return whether the recipe names labeled test images; data without a path (shapes) makes its own."""
    return (
        "data.path" not in values
        or values.get("data.test_path") is not None
        or values.get("data.test_split") is not None
        or values.get("data.holdout") is not None
    )
