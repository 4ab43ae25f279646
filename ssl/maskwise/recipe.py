"""Recipes: YAML files become frozen sections; mistakes are all told at once, with file, line and the accepted keys."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Collection, Mapping

from maskwise.functional.errors import UserError
from maskwise.recipe_code import COMMAND_LINE, not_consented
from maskwise.recipe_contradictions import contradictions, unbuildable
from maskwise.recipe_evaluations import scheduled
from maskwise.recipe_schema import REQUIRED, UNSET, Key, check_bounds, nearest, schema, unread
from maskwise.recipe_sections import (
    SECTIONS, Augment, BackboneSection, ClassifierSection, Crops, Data, Evaluate, Head, MaskingSection, MethodSection, Optimizer, PoolingSection, Section,
    Speed, Teacher, Train,
)  # fmt: skip
from maskwise.recipe_text import Entry, Misread, Scalar, convert, header, parse, read, write

SHIPPED = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Recipe:
    """A whole run, resolved: every value set, each with the place it came from."""

    seed: int = 0
    data: Data = field(default_factory=Data)
    crops: Crops = field(default_factory=Crops)
    augment: Augment = field(default_factory=Augment)
    backbone: BackboneSection = field(default_factory=BackboneSection)
    pooling: PoolingSection = field(default_factory=PoolingSection)
    head: Head = field(default_factory=Head)
    classifier: ClassifierSection = field(default_factory=ClassifierSection)
    method: MethodSection = field(default_factory=MethodSection)
    masking: MaskingSection = field(default_factory=MaskingSection)
    teacher: Teacher = field(default_factory=Teacher)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    speed: Speed = field(default_factory=Speed)
    source: str = field(default="", compare=False)
    values: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def learns_labels(self) -> bool:
        """Whether the method learns labels: then sections augment and classifier are read in place of crops, head and masking."""
        return "augment.size" in self.values

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images that the encoder is trained on."""
        return self.augment.size if self.learns_labels else self.crops.global_size

    def origin(self, key: str) -> str:
        """Where the value of a dotted key was written: `file:line`, `command line` or `default`."""
        return self.origins.get(key, "default")

    def resolved_yaml(self) -> str:
        """Every value as YAML; read_recipe reads it back to an equal recipe."""
        return self.laid_out(lambda key: "")

    def explained(self) -> str:
        """Every value as YAML with its origin beside it."""
        width = max(len(key.partition(".")[2]) + len(write(value)) for key, value in self.values.items()) + 6
        return self.laid_out(lambda key: "# " + self.origin(key), min(width, 64))

    def laid_out(self, remark: Callable[[str], str], width: int = 0) -> str:
        lines, section = [], ""
        for key, value in self.values.items():
            head, _, name = key.partition(".")
            if name and head != section:
                lines.append(f"{head}:")
                section = head
            line = f"  {name}: {write(value)}" if name else f"{key}: {write(value)}"
            lines.append(f"{line:<{width}}{remark(key)}".rstrip())
        return "\n".join(lines) + "\n"

    def hash(self) -> str:
        """Sixteen hex digits over every value that can change a result (section speed cannot)."""
        text = json.dumps({key: value for key, value in self.values.items() if not key.startswith("speed.")}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def code(self) -> set[str]:
        """The classes from elsewhere that this recipe names as `module:Name`."""
        return {value for key, value in self.values.items() if key.endswith(".name") and ":" in str(value)}

    def diff(self, other: Recipe) -> list[str]:
        """One line for each value in which `other` differs, section speed left out."""
        keys = [key for key in (*self.values, *(key for key in other.values if key not in self.values)) if not key.startswith("speed.")]
        mine, theirs = ({key: write(each.values[key]) if key in each.values else "not set" for key in keys} for each in (self, other))
        return [f"{key}: {mine[key]} -> {theirs[key]}" for key in keys if mine[key] != theirs[key]]


def read_recipe(path: str | Path, *overrides: str, try_model: bool = True, consented: Collection[str] = ()) -> Recipe:
    """The recipe of a file, a run folder or a shipped name (`pretrain/attmask_hint_vits16`), with `section.key=value` overrides.

    Raises UserError that names every mistake at once, each with its place. Without `try_model` nobody asks whether the model can be built. Code that a file names as
    `module:Name` is imported only if it is in `consented` or an override says it, too (or MASKWISE_MODULES allows its module).
    """
    found, source = locate(path)
    layers, mistakes = chain(found, source)
    if overrides:
        layer, more = command_line(overrides)
        layers.append(layer)
        mistakes += more
    entries, keys, unknown = merge(layers, consented)
    values: dict[str, Any] = {}
    for section, why in unknown.items():
        mistakes.append(f"{entries[f'{section}.name'].origin}: {section}.name: {why}")
    for key, entry in entries.items():
        if key in keys:
            try:
                values[key] = convert(entry.value, keys[key].kind)
                check_bounds(key, values[key])
            except Misread as error:
                mistakes.append(f"{entry.origin}: {key}: {error}")
        elif key.partition(".")[0] not in unknown:
            mistakes.append(f"{entry.origin}: {key}: {unread(key, keys, SECTIONS)}")
    for key, rule in keys.items():
        if rule.default is REQUIRED and key not in values and key not in entries:
            mistakes.append(f"{source}: {key}: missing; write it into the recipe or give {key}=... on the command line")
        elif rule.default is not UNSET and key not in values:
            values[key] = rule.default
    if not mistakes:
        for concerned, why in contradictions(values) or (unbuildable(values) if try_model else []):
            keys_said = concerned.split()
            written = [entries[key].origin for key in keys_said if key in entries]
            named = "" if why.startswith(f"{keys_said[0]}.") else f"{keys_said[0]}: "
            mistakes.append(f"{written[0] if written else source}: {named}{why}")
    for key, what in (("evaluate.knn_every", "k-NN"), ("evaluate.top1_every", "the accuracy")):
        if not mistakes and values.get(key) and not has_test(values):
            if key in entries:
                mistakes = [f"{entries[key].origin}: {key}: {what} needs labelled test images; give data.test_path or data.test_split, or 0"]
            values[key] = 0
    if not mistakes and values["evaluate.also"]:
        try:
            scheduled(values["evaluate.also"])
            why = "" if has_test(values) else "needs labelled test images; give data.test_path or data.test_split, or leave it out"
        except UserError as error:
            why = str(error)
        mistakes = [f"{entries['evaluate.also'].origin}: evaluate.also: {why}"] if why else []
    if mistakes and not overrides and (awaited := header(found.read_text(encoding="utf-8-sig")).not_yet):
        raise UserError(f"{source} cannot run yet: {awaited}")
    if mistakes:
        raise UserError(told(mistakes, source))
    ordered = {key: values[key] for key in keys if key in values}
    origins = {key: entry.origin for key, entry in entries.items()}
    return Recipe(ordered["seed"], **built(ordered), source=source, values=MappingProxyType(ordered), origins=MappingProxyType(origins))


def check_run(recipe: Recipe, images: int, world_size: int) -> None:
    """Raises UserError when the recipe cannot run on so many images and ranks; `images` is the length of the training set."""
    batch = recipe.train.batch_size
    if world_size > images:
        raise UserError(f"more ranks ({world_size}) than images ({images}); start fewer ranks or give more images")
    if batch > images:
        most = images // world_size * world_size
        raise UserError(f"train.batch_size is {batch} and there are only {images} images; give train.batch_size={most} or less, or more images")
    if batch % world_size:
        near = max(world_size, batch // world_size * world_size)
        raise UserError(f"train.batch_size {batch} (the global batch) does not divide over {world_size} ranks; give train.batch_size={near}")
    if batch // world_size % recipe.train.accumulate:
        share = "" if world_size == 1 else f" / {world_size} ranks"
        raise UserError(f"train.batch_size {batch}{share} does not divide into train.accumulate={recipe.train.accumulate} micro-batches; give a divisor")
    if (recipe.augment.mixup or recipe.augment.cutmix) and batch // world_size % 2:
        raise UserError(f"train.batch_size {batch} leaves {batch // world_size} images to a rank, which cannot be mixed in pairs; give train.batch_size={batch + world_size}")
    if recipe.train.steps is not None:
        epochs = recipe.train.steps / (images // batch)
        for key, what in (("optimizer.warmup_epochs", "learning-rate"), ("teacher.warmup_temp_epochs", "temperature")):
            if recipe.values.get(key, 0) > math.ceil(epochs):
                length = f"train.steps={recipe.train.steps} is {epochs:.3g} epochs of {images} images"
                raise UserError(f"{key}: the {what} warm-up ({recipe.values[key]:g} epochs) is longer than the run ({length}); shorten it or lengthen the run")


def locate(path: str | Path) -> tuple[Path, str]:
    """The file of a recipe and the name it goes by in messages."""
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
    """The names of the recipes that come with the package."""
    return sorted(each.relative_to(SHIPPED).with_suffix("").as_posix() for each in SHIPPED.glob("*/*.yaml"))


def chain(path: Path, source: str) -> tuple[list[dict[str, Entry]], list[str]]:
    """The entries of a recipe and its parents, the oldest first."""
    layers: list[dict[str, Entry]] = []
    mistakes: list[str] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise UserError(f"{source}: `extends` comes back to this file; break the circle")
        seen.append(path.resolve())
        entries, more = read(path, source)
        mistakes += more
        parent = entries.pop("extends", None)
        layers.insert(0, with_names(entries))
        if parent is None:
            return layers, mistakes
        if not isinstance(parent.value, Scalar):
            raise UserError(f"{parent.origin}: extends: a recipe has one parent; name one file")
        near = path.parent / parent.value.text
        if near.is_file():
            path, source = near, Path(os.path.normpath(Path(source).parent / parent.value.text)).as_posix()
        else:
            try:
                path, source = locate(parent.value.text)
            except UserError as error:
                raise UserError(f"{parent.origin}: extends: {error}") from None


def with_names(entries: dict[str, Entry]) -> dict[str, Entry]:
    """`masking: none` means `masking.name`; a section that holds nothing says nothing."""
    plain = {}
    for key, entry in entries.items():
        if key in SECTIONS and isinstance(entry.value, Scalar):
            if entry.value.text:
                plain[f"{key}.name" if hasattr(SECTIONS[key], "name") else key] = entry
        else:
            plain[key] = entry
    return plain


def command_line(overrides) -> tuple[dict[str, Entry], list[str]]:
    """`section.key=value` words as the last layer of a recipe."""
    layer: dict[str, Entry] = {}
    mistakes = []
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            mistakes.append(f"command line: `{word}` is not section.key=value")
            continue
        try:
            entries, _ = parse(f"value: {text}", COMMAND_LINE)
            layer[key] = Entry(entries["value"].value, COMMAND_LINE)
        except (UserError, KeyError):
            layer[key] = Entry(Scalar(text), COMMAND_LINE)
    return with_names(layer), mistakes


def merge(layers: list[dict[str, Entry]], consented: Collection[str] = ()) -> tuple[dict[str, Entry], dict[str, Key], dict[str, str]]:
    """One layer over the other; a name changed by a child drops the inherited keys that the new name does not read."""
    entries: dict[str, Entry] = {}
    before: dict[str, Key] = {}
    for layer in layers:
        renamed = {**entries, **layer}
        names = {section: cls.name for section, cls in SECTIONS.items() if hasattr(cls, "name")}
        refused = {}
        for section in names:
            given = renamed.get(f"{section}.name")
            if given and isinstance(given.value, Scalar):
                names[section] = given.value.text
                if why := not_consented(section, given, consented):
                    refused[section] = why
        keys, unknown = schema(SECTIONS, names, refused)
        entries = {key: entry for key, entry in entries.items() if key in keys and not keys[key].idle or key not in before}
        entries.update(layer)
        before = keys
    return entries, keys, unknown


def has_test(values: Mapping[str, Any]) -> bool:
    """Whether the recipe says where labelled test images are; data without a path (shapes) makes its own."""
    return "data.path" not in values or values.get("data.test_path") is not None or values.get("data.test_split") is not None


def built(values: Mapping[str, Any]) -> dict[str, Section]:
    """The sections from resolved values: own fields, and the rest as arguments."""
    sections = {}
    for section, cls in SECTIONS.items():
        own = {each.name for each in fields(cls)}
        here = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(section + ".")}
        more = {"arguments": MappingProxyType({key: here[key] for key in here if key not in own})} if "arguments" in own else {}
        sections[section] = cls(**{key: here[key] for key in here if key in own}, **more)
    return sections


def told(mistakes: list[str], source: str) -> str:
    """One mistake as one line, several under a line that counts them."""
    if len(mistakes) == 1:
        return mistakes[0]
    return f"{source}: {len(mistakes)} mistakes\n" + "\n".join(f"  {each}" for each in mistakes)
