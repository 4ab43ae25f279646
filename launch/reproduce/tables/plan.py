"""Plan of a table: settings with their rows, seeds, evaluations and predicted differences, and the runs of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe
from maskwise.recipe.yaml_text import write

BUDGETS = ("cpu", "gpu", "full")
HELD_EQUAL = ("seed", "data.", "crops.", "augment.", "train.", "optimizer.", "backbone.", "head.", "evaluate.")
CURVE_POINTS = 8  # reports of a run, for the plot of learning speed
WHOLE = 1.0
# overrides that shrink a run to seconds
TINY = (
    "data.name=shapes",
    "data.count=64",
    "data.size=32",
    "train.epochs=2",
    "train.batch_size=16",
    "train.log_every=1",
    "train.save_every=1",
    "optimizer.warmup_epochs=0",
)
TINY_CROPS = ("crops.global_size=32", "crops.local_size=16", "crops.local_number=2", "head.prototypes=16")


@dataclass(frozen=True)
class Row:
    """A row of a table: its label, overrides, a recipe of its own (full budget), and published numbers by metric."""

    label: str
    words: tuple[str, ...] = ()
    recipe: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contrast:
    """A difference to look at: row less reference; published: by the paper, in points, the source in words.

    sign: the direction that the paper leads one to expect, 0 where it publishes no difference of half a point.
    """

    row: str
    reference: str
    sign: int
    published: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Setting:
    """Rows trained alike, of one network on one data set.

    metric: the number that contrasts compare, a key of `measures.NUMBERS`; measures: names of evaluations; backbone_of:
    a recipe whose network is taken over; gate: a row whose first seed must pass its untrained network, else the setting
    ends there; same_images: whether all seeds are tested on the same images; pack: of images, unpacked to `data.path`.
    """

    title: str
    recipe: str
    rows: Mapping[str, Row]
    contrasts: tuple[Contrast, ...]
    words: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "knn"
    measures: tuple[str, ...] = ("knn", "linear", "few_shot")
    backbone_of: str | None = None
    gate: str | None = None
    same_images: bool = False
    pack: str | None = None


@dataclass(frozen=True)
class Story:
    """A table: its title, and the settings of each budget."""

    title: str
    settings: Mapping[str, Mapping[str, Setting]]


@dataclass(frozen=True)
class Job:
    """One run: a setting's row with a seed, its recipe and overrides, without the folder."""

    setting: str
    row: str
    seed: int
    recipe: str
    words: tuple[str, ...]

    @property
    def key(self) -> str:
        """Name in the results: setting/row/seed."""
        return f"{self.setting}/{self.row}/{self.seed}"

    def folder(self, out: Path) -> Path:
        """Return the run folder."""
        return out / "runs" / self.setting / self.row / f"seed{self.seed}"

    def read(self, *more: str, try_model: bool = False) -> Recipe:
        """Return the resolved recipe."""
        return read_recipe(self.recipe, *self.words, *more, try_model=try_model)

    def command(self, out: Path) -> list[str]:
        """Return the words of `maskwise` that do this run."""
        return ["train", self.recipe, "--out", str(self.folder(out)), *self.words]


def chosen(
    settings: Mapping[str, Setting],
    names: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    seeds: int | None = None,
) -> dict[str, Setting]:
    """Return the named settings with the named rows and that many seeds; contrasts of other rows are left out."""
    kept = {}
    for name, setting in settings.items():
        here = {row: made for row, made in setting.rows.items() if rows is None or row in rows}
        if (names is None or name in names) and here:
            contrasts = tuple(pair for pair in setting.contrasts if pair.row in here and pair.reference in here)
            numbers = setting.seeds if seeds is None else tuple(range(seeds))
            gate = setting.gate if setting.gate in here else None
            kept[name] = dataclasses.replace(setting, rows=here, contrasts=contrasts, seeds=numbers, gate=gate)
    return kept


def jobs(name: str, setting: Setting, more: Sequence[str] = (), scale: float = WHOLE) -> list[Job]:
    """Return the runs of a setting: all rows with one seed, then with the next. more: last overrides of every run."""
    network = backbone_words(setting.backbone_of) if setting.backbone_of else ()
    shared = {row: (*network, *setting.words, *made.words, *more) for row, made in setting.rows.items()}
    recipes = {row: made.recipe or setting.recipe for row, made in setting.rows.items()}
    length = {
        row: length_words(read_recipe(recipes[row], *words, try_model=False), scale) for row, words in shared.items()
    }
    return [
        Job(name, row, seed, recipes[row], (f"seed={seed}", *shared[row], *length[row]))
        for seed in setting.seeds
        for row in setting.rows
    ]


def length_words(recipe: Recipe, scale: float) -> tuple[str, ...]:
    """Return overrides for `scale` times the epochs, at least one, and for a curve of about CURVE_POINTS reports."""
    epochs = max(1, round(scale * recipe.train.epochs))
    words = () if epochs == recipe.train.epochs else (f"train.epochs={epochs}",)
    every = max(1, epochs // CURVE_POINTS)
    if recipe.learns_labels:
        return (*words, f"evaluate.top1_every={every}")
    return (*words, "evaluate.pictures_every=0", f"evaluate.knn_every={every}")


def tiny_words(setting: Setting) -> tuple[str, ...]:
    """Return overrides that shrink the runs of a setting to seconds."""
    labels = read_recipe(setting.recipe, try_model=False).learns_labels
    return (*TINY, "augment.size=32") if labels else (*TINY, *TINY_CROPS)


def backbone_words(name: str) -> tuple[str, ...]:
    """Return overrides that give a recipe the network of another: the keys of `backbone` that the other states."""
    recipe = read_recipe(name, try_model=False)
    stated = {key: value for key, value in recipe.values.items() if recipe.origin(key) != "default"}
    return tuple(f"{key}={write(value)}" for key, value in stated.items() if key.startswith("backbone."))


def unequal(recipes: Mapping[str, Recipe]) -> dict[str, dict[str, object]]:
    """Return the keys of length, images, crops, network and optimizer in which rows differ: {key: {row: value}}.

    A key that a row's method does not have, such as those of the patch head for DINO, is not compared.
    """
    keys = dict.fromkeys(key for recipe in recipes.values() for key in recipe.values if key.startswith(HELD_EQUAL))
    found = {}
    for key in keys:
        values = {row: recipe.values[key] for row, recipe in recipes.items() if key in recipe.values}
        if len({write(value) for value in values.values()}) > 1:
            found[key] = values
    return found


def pairs(contrasts: Iterable[Contrast]) -> list[str]:
    """Return the contrasts as text, `row - reference`."""
    return [f"{pair.row} - {pair.reference}" for pair in contrasts]
