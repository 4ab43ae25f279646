"""Tables of `maskwise list`, read from the tables in the code."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from maskwise.errors import UserError
from maskwise.recipe.evaluation_schedule import NOT_FOR_USERS
from maskwise.recipe.schema import nearest
from maskwise.recipe.sections import SECTIONS
from maskwise.recipe.signatures import parameters_of

GAP = 2  # spaces between columns


@dataclass(frozen=True)
class Listing:
    """A printed table: column titles, rows of texts, and a closing line."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def text(self, width: int | None = None) -> str:
        """Format with aligned columns; wrap the widest ones so that lines have at most `width`."""
        table = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.columns))]
        if width is not None:
            words = [[word for row in table for word in row[i].split()] for i in range(len(self.columns))]
            floors = [widths[0], *(max(map(len, column), default=0) for column in words[1:])]
            widths = narrowed(widths, floors, width - GAP * (len(widths) - 1))
        lines = []
        for row in table:
            cells = [textwrap.wrap(text, max(1, c), break_on_hyphens=False) for text, c in zip(row, widths)]
            for parts in zip_longest(*cells, fillvalue=""):
                line = (" " * GAP).join(f"{part:<{column}}" for part, column in zip(parts, widths))
                lines.append(line.rstrip())
        note = self.note if width is None else textwrap.fill(self.note, width)
        return "\n".join([*lines, *(["", note] if note else [])])


def narrowed(widths: list[int], floors: list[int], total: int) -> list[int]:
    """Narrow the widest columns until all take at most `total` characters; none below its floor."""
    widths = list(widths)
    while sum(widths) > total:
        wide = [i for i, width in enumerate(widths) if width > floors[i]]
        if not wide:
            break
        widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def listing(name: str) -> Listing:
    """Return the table `name`; raises UserError if there is none."""
    if name not in LISTINGS:
        raise UserError(f"no table `{name}`{nearest(name, LISTINGS)}; tables are {', '.join(LISTINGS)}")
    return LISTINGS[name]()


def poolings() -> Listing:
    """pooling.name: how tokens become one vector"""
    from maskwise.nn import POOLINGS

    rows = [
        (name, "yes" if pooling.gives_attention else "no", keys_of("pooling", pooling), summary(name, pooling))
        for name, pooling in POOLINGS.items()
    ]
    return Listing(
        ("pooling", "attention", "keys", "description"),
        rows,
        "AttMask follows the attention of any pooling that has one; your own: pooling.name=module:Class.",
    )


def maskings() -> Listing:
    """masking.name: which patches are masked for the student"""
    from maskwise.methods import MASKINGS

    rows = [
        (name, "yes" if masking.needs_attention else "no", keys_of("masking", masking), summary(name, masking))
        for name, masking in MASKINGS.items()
    ]
    columns = ("masking", "follows attention", "keys", "description")
    return Listing(columns, rows, "Your own: masking.name=module:Class.")


def methods() -> Listing:
    """method.name: the training objective"""
    from maskwise.methods import METHODS

    rows = [(name, keys_of("method", method), summary(name, method)) for name, method in METHODS.items()]
    return Listing(
        ("method", "keys", "description"),
        rows,
        "Momentum and temperatures of the teacher are in section teacher; your own: method.name=module:Class.",
    )


def datasets() -> Listing:
    """data.name: where the images come from"""
    from maskwise.data.datasets import DATASETS

    rows = [(name, keys_of("data", dataset), summary(name, dataset)) for name, dataset in DATASETS.items()]
    return Listing(("dataset", "keys", "description"), rows, "Your own: data.name=module:Class.")


def evaluations() -> Listing:
    """maskwise evaluate NAME: how good the features are"""
    from maskwise.evaluation import EVALUATIONS

    rows = [(name, ", ".join(options_of(row.options)), summary(name, row.run)) for name, row in EVALUATIONS.items()]
    columns = ("evaluation", "options", "description")
    return Listing(columns, rows, "`maskwise evaluate NAME MODEL train=DIR test=DIR key=value`.")


def recipes() -> Listing:
    """maskwise train NAME: the recipes in the package"""
    from maskwise.recipe.reading import SHIPPED, shipped
    from maskwise.recipe.yaml_text import header

    rows = []
    for name in shipped():
        head = header((SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
        numbers = ", ".join(re.findall(r"(?:k-NN|linear|top-1) \d+\.\d", head.published))
        rows.append((name, numbers or "-", "not yet" if head.not_yet else "", head.title))
    return Listing(
        ("recipe", "published", "", "description"),
        rows,
        "Published numbers are those of the papers; `maskwise show NAME` prints a recipe with its origins.",
    )


def keys() -> Listing:
    """section.key: every key of a recipe, as in docs/keys.md"""
    from maskwise.recipe.key_rows import key_rows

    rows = [
        (row.key, row.readers, f"{row.type}, {row.bounds}" if row.bounds else row.type, row.default, row.meaning)
        for row in key_rows()
    ]
    note = "Section backbone takes further arguments of the timm class; your own classes bring theirs."
    return Listing(("key", "read by", "type", "default", "description"), rows, note)


def backbones() -> Listing:
    """backbone.name: timm's models, grouped by the timm file that defines them"""
    from maskwise.nn.backbones import timm_registry

    models = timm_registry.supported_models()
    counts = Counter(map(timm_registry.timm_file, timm_registry.timm.list_models()))
    rows = [
        (file, runs, f"{len(names)} of {counts[file]}", examples(names))
        for (file, runs), names in sorted(models.items(), key=lambda item: (item[0][1], -len(item[1])))
    ]
    refused: dict[str, list[str]] = {}
    for place, reason in timm_registry.REFUSED.items():
        refused.setdefault(reason, []).append(f"{place} ({counts[place]} models)" if place in counts else place)
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in refused.items())
    note = (
        f"{sum(map(len, models.values()))} of timm's {sum(counts.values())} models. Those that run `whole` have no "
        f"masks and no drop path. Your own network: module:Class. Not supported: {reasons}."
    )
    return Listing(("family", "runs", "models", "such as"), rows, note)


LISTINGS: Mapping[str, Callable[[], Listing]] = {
    "poolings": poolings,
    "maskings": maskings,
    "methods": methods,
    "backbones": backbones,
    "datasets": datasets,
    "evaluations": evaluations,
    "recipes": recipes,
    "keys": keys,
}


def summary(name: str, entry) -> str:
    """First sentence of an entry's docstring, or of its module's where the module has the entry's name."""
    home = inspect.getmodule(entry)
    text = inspect.getdoc(home if home.__name__.rpartition(".")[2] == name else entry) or ""
    return re.split(r"(?<=[.])(?<!eq\.)(?<!sec\.)\s(?=[A-Z`])", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]


def keys_of(section: str, entry) -> str:
    """Recipe keys of a table entry."""
    return ", ".join(name for name in parameters_of(entry)[0] if name not in SECTIONS[section].set_by_build) or "-"


def options_of(function) -> list[str]:
    """Options of an evaluation on the command line."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is not parameter.empty and parameter.name not in NOT_FOR_USERS
    ]


def examples(names: list[str], count: int = 4) -> str:
    """Up to `count` names, spread evenly over the list."""
    count = min(count, len(names))
    chosen = [names[i * len(names) // count] for i in range(count)]
    return ", ".join(chosen) + (", ..." if len(names) > count else "")
