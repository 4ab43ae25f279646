"""`Recipe`: a run with every value resolved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from maskwise.recipe.schema import NAMED_SECTIONS, SUPERVISED_CONSTANTS, learns_labels
from maskwise.recipe.sections import (
    SECTIONS,
    Augment,
    BackboneSection,
    ClassifierSection,
    Crops,
    Data,
    Evaluate,
    Head,
    MaskingSection,
    MethodSection,
    Optimizer,
    PoolingSection,
    Section,
    Speed,
    Teacher,
    Train,
)
from maskwise.recipe.yaml_text import write

NO_RESULT = ("speed.", "train.mirror", "train.loggers")  # keys that cannot change a result
WIDEST_VALUE = 64  # columns before the origins, in `explained`


def sections_of(values: Mapping[str, Any]) -> dict[str, Section]:
    """Return the sections of resolved values: their own fields, and the rest as arguments."""
    if learns_labels(values["method.name"]):
        values = {**SUPERVISED_CONSTANTS, **values}
    sections = {}
    for section, cls in SECTIONS.items():
        own = {field.name for field in fields(cls)}
        here = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(section + ".")}
        options = {key: value for key, value in here.items() if key in own}
        if section in NAMED_SECTIONS:
            options["arguments"] = MappingProxyType({key: value for key, value in here.items() if key not in own})
        sections[section] = cls(**options)
    return sections


@dataclass(frozen=True)
class Recipe:
    """A whole run, resolved: every value is set, and the place where it was written is known."""

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
    intended: Mapping[str, tuple] = field(default_factory=dict, repr=False, compare=False)
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, values: Mapping[str, Any], **about) -> Recipe:
        """Return the recipe of resolved values; about: source, origins, intended and notes.

        intended: see `run_length.intended_lengths`; notes: lines on values that were adapted to the run.
        """
        return cls(values["seed"], **sections_of(values), values=MappingProxyType(dict(values)), **about)

    def with_values(self, changed: Mapping[str, Any], notes: Sequence[str] = ()) -> Recipe:
        """Return this recipe with some values changed, and lines on these."""
        about = {"source": self.source, "intended": self.intended}
        origins = {**self.origins, **{key: f"was {write(self.values[key])}, {self.origin(key)}" for key in changed}}
        return Recipe.of({**self.values, **changed}, origins=origins, notes=(*self.notes, *notes), **about)

    @property
    def learns_labels(self) -> bool:
        """Whether the method is supervised: then sections augment and classifier replace crops, head and masking."""
        return learns_labels(self.method.name)

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Size in pixels of the images that the encoder is trained on: their side, or (height, width)."""
        return self.augment.size if self.learns_labels else self.crops.global_size

    def origin(self, key: str) -> str:
        """Return where the value of a dotted key was written: `file:line`, `command line` or `default`."""
        return self.origins.get(key, "default")

    def resolved_yaml(self) -> str:
        """Return every value as YAML; read_recipe reads it back to an equal recipe."""
        return self._as_yaml(lambda key: "")

    def explained(self) -> str:
        """Return every value as YAML, each line with its origin as a comment."""
        width = max(len(key.partition(".")[2]) + len(write(value)) for key, value in self.values.items()) + 6
        return self._as_yaml(lambda key: "# " + self.origin(key), min(width, WIDEST_VALUE))

    def _as_yaml(self, comment: Callable[[str], str], width: int = 0) -> str:
        lines, current = [], ""
        for key, value in self.values.items():
            section, _, name = key.partition(".")
            if name and section != current:
                lines.append(f"{section}:")
                current = section
            line = f"  {name}: {write(value)}" if name else f"{key}: {write(value)}"
            lines.append(f"{line:<{width}}{comment(key)}".rstrip())
        return "\n".join(lines) + "\n"

    def hash(self) -> str:
        """Return sixteen hex digits over every value that can change a result, unlike section speed."""
        values = {key: value for key, value in self.values.items() if not key.startswith(NO_RESULT)}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def code(self) -> set[str]:
        """Return the external classes that this recipe names as `module:Name`."""
        return {value for key, value in self.values.items() if key.endswith(".name") and ":" in str(value)}

    def diff(self, other: Recipe) -> list[str]:
        """Return one line for each value in which `other` differs, section speed left out."""
        return [f"{key}: {here} -> {there}" for key, (here, there) in self.changes(other).items()]

    def changes(self, other: Recipe) -> dict[str, tuple[str, str]]:
        """Return {key: (value here, value there)} where `other` differs, section speed left out."""
        keys = [key for key in dict.fromkeys((*self.values, *other.values)) if not key.startswith("speed.")]
        changes = {}
        for key in keys:
            here, there = (write(recipe.values[key]) if key in recipe.values else "not set" for recipe in (self, other))
            if here != there:
                changes[key] = (here, there)
        return changes
