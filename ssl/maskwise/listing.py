"""What there is to choose from, read from the tables of the code."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from maskwise.functional.errors import UserError
from maskwise.recipe_evaluations import NOT_FOR_USERS
from maskwise.recipe_schema import SUPPLIED, nearest, parameters_of


@dataclass(frozen=True)
class Listing:
    """A table for people: column titles, rows of as many texts, and a closing line."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def text(self, width: int | None = None) -> str:
        """The table with aligned columns; the last one is wrapped to `width` characters, if given."""
        table = [self.columns, *self.rows]
        before = [max(len(row[i]) for row in table) for i in range(len(self.columns) - 1)]
        indent = sum(before) + 2 * len(before)
        lines = []
        for row in table:
            front = "".join(f"{text:<{size}}  " for text, size in zip(row, before))
            parts = textwrap.wrap(row[-1], max(30, width - indent)) if width else [row[-1]]
            lines += [(front + part).rstrip() if i == 0 else " " * indent + part for i, part in enumerate(parts or [""])]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def listing(name: str) -> Listing:
    """The table of that name; raises UserError for another."""
    if name not in LISTINGS:
        raise UserError(f"no table `{name}`{nearest(name, LISTINGS)}; tables are {', '.join(LISTINGS)}")
    return LISTINGS[name]()


def poolings() -> Listing:
    """pooling.name: how tokens become one vector"""
    from maskwise.nn import POOLINGS

    rows = [(name, "yes" if getattr(row, "gives_attention", True) else "no", keys_of("pooling", row), told(name, row)) for name, row in POOLINGS.items()]
    return Listing(("pooling", "attention", "keys", "what"), rows, "AttMask follows the attention of any pooling that has one; your own: pooling.name=module:Class.")


def maskings() -> Listing:
    """masking.name: which patches the student may not see"""
    from maskwise.methods import MASKINGS

    rows = [(name, "yes" if row.needs_attention else "no", keys_of("masking", row), told(name, row)) for name, row in MASKINGS.items()]
    return Listing(("masking", "follows attention", "keys", "what"), rows, "Your own: masking.name=module:Class.")


def methods() -> Listing:
    """method.name: what the student learns from"""
    from maskwise.methods import METHODS

    rows = [(name, keys_of("method", row), told(name, row)) for name, row in METHODS.items()]
    return Listing(("method", "keys", "what"), rows, "The teacher's momentum and temperatures are in section teacher; your own: method.name=module:Class.")


def datasets() -> Listing:
    """data.name: where the images come from"""
    from maskwise.data.datasets import DATASETS

    rows = [(name, keys_of("data", row), told(name, row)) for name, row in DATASETS.items()]
    return Listing(("dataset", "keys", "what"), rows, "Your own: data.name=module:Class.")


def evaluations() -> Listing:
    """maskwise evaluate NAME: how good the features are"""
    from maskwise.evaluation import EVALUATIONS

    rows = [(name, ", ".join(options_of(row)), told(name, row)) for name, row in EVALUATIONS.items()]
    return Listing(("evaluation", "options", "what"), rows, "`maskwise evaluate NAME MODEL train=DIR test=DIR key=value`.")


def recipes() -> Listing:
    """maskwise train NAME: the recipes that come with the package"""
    from maskwise.recipe import SHIPPED, shipped
    from maskwise.recipe_text import header

    rows = []
    for name in shipped():
        head = header((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
        numbers = ", ".join(re.findall(r"(?:k-NN|linear|top-1) \d+\.\d", head.published))
        rows.append((name, numbers or "-", "not yet" if head.not_yet else "", head.title))
    return Listing(("recipe", "published", "", "what"), rows, "Published numbers are the papers', not ours; `maskwise show NAME` prints a recipe with the origin of each value.")


def backbones() -> Listing:
    """backbone.name: timm's models, by the file of timm that holds them"""
    from maskwise.nn import timm_models

    held = timm_models.candidates()
    supported: dict[str, list[str]] = {}
    for name in held:
        if timm_models.misfit(timm_models.shallow(name)) is None:
            supported.setdefault(timm_models.source(name), []).append(name)
    counts = Counter(map(timm_models.source, held))
    rows = [(family, f"{len(names)} of {counts[family]}", examples(names)) for family, names in sorted(supported.items(), key=lambda each: -len(each[1]))]
    others = len(timm_models.timm.list_models()) - len(held)
    return Listing(("family", "supported", "such as"), rows, f"timm's other families ({others} models) are refused in one line that names the nearest supported one.")


LISTINGS: Mapping[str, Callable[[], Listing]] = {
    "poolings": poolings, "maskings": maskings, "methods": methods, "backbones": backbones, "datasets": datasets,
    "evaluations": evaluations, "recipes": recipes,
}  # fmt: skip


def told(name: str, row) -> str:
    """One line on a row: of the file that bears its name, else of its own docstring."""
    home = inspect.getmodule(row)
    text = inspect.getdoc(home if home.__name__.rpartition(".")[2] == name else row) or ""
    return re.split(r"(?<=[.])\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]


def keys_of(section: str, row) -> str:
    """The keys that a recipe's section may give a row."""
    return ", ".join(name for name in parameters_of(row)[0] if name not in SUPPLIED[section]) or "-"


def options_of(function) -> list[str]:
    """The options of an evaluation, as the command line takes them."""
    return [each.name for each in inspect.signature(function).parameters.values() if each.default is not each.empty and each.name not in NOT_FOR_USERS]


def examples(names: list[str], count: int = 4) -> str:
    """A few names spread evenly over many."""
    return ", ".join(names[i * len(names) // min(count, len(names))] for i in range(min(count, len(names)))) + (", ..." if len(names) > count else "")
