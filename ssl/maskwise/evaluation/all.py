"""Everything that a folder of datasets allows, with one table at the end."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from maskwise.data.layouts import LAYOUTS
from maskwise.data.subset import evenly
from maskwise.evaluation import EVALUATIONS, features
from maskwise.evaluation.class_pictures import class_pictures
from maskwise.evaluation.published import published
from maskwise.evaluation.report import Report
from maskwise.functional.draw import write_png
from maskwise.functional.errors import UserError

# layout -> (evaluation, options that have to do with the layout)
PROTOCOLS: dict[str, tuple[tuple[str, dict], ...]] = {
    "imagenet": (("knn", {"feature": ("pooled",), "k": (10, 20)}), ("clustering", {}), ("masked", {}), ("robustness", {}), ("analysis", {}), ("logistic", {}), ("linear", {})),
    "cifar": (("knn", {"feature": ("pooled",), "k": (10, 20)}), ("clustering", {}), ("masked", {}), ("analysis", {}), ("logistic", {}), ("linear", {})),
    "flowers": (("knn", {"feature": ("pooled",), "k": (10, 20)}), ("logistic", {}), ("linear", {})),
    "in9": (("backgrounds", {}),),
    "revisited": (("retrieval", {}),),
    "copydays": (("copy_detection", {}),),
    **{name: (("recall", {"preset": name}),) for name in ("cub", "cars", "products", "inshop")},
}
LONG = ("linear", "logistic", "attentive", "finetune", "analysis")  # what trains something or looks at every layer: on request
BESIDE = {"imagenet_r": ("imagenet-r", "imagenet_r"), "imagenet_v2": ("imagenet-v2", "imagenetv2-matched-frequency", "imagenetv2-matched-frequency-format-val"), "real": ("real.json",)}


@dataclasses.dataclass
class Task:
    """One evaluation on one dataset: data is read when it runs, so that one that is incomplete stops no other."""

    evaluation: str
    layout: str
    place: Path
    read: Callable[[], dict]
    options: dict

    @property
    def name(self) -> str:
        """What its report is called."""
        return f"{self.evaluation}_{self.place.name}"


def plan(folder, *, also: Sequence[str] = (), probe=None) -> list[Task]:
    """What a folder, and the folders in it, allow. Raises UserError where that is nothing.

    also: evaluations of LONG. IN-9 is judged by a probe, or by the training images of the first ImageNet-like
    folder; without either it is left out.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder; give one that holds datasets")
    if unknown := [name for name in also if name not in LONG]:
        raise UserError(f"evaluate all: also={unknown[0]!r} is none of {', '.join(LONG)}")
    places = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))]
    found = [(name, place) for place in places for name, layout in LAYOUTS.items() if name in PROTOCOLS and layout.holds(place)]
    inner = {place for _, place in found if place != root}
    # A parent that merely holds a dataset is not one of its own.
    found = [(name, place) for name, place in found if place != root or not any(name == other and deeper in inner for other, deeper in found if deeper != root)]
    bank = next((place for name, place in found if name == "imagenet"), None)
    tasks = []
    for layout, place in found:
        for evaluation, options in PROTOCOLS[layout]:
            if evaluation in LONG and evaluation not in also or evaluation == "backgrounds" and bank is None and probe is None:
                continue
            options = dict(options)
            if evaluation == "robustness":
                options |= {key: found for key, names in BESIDE.items() if (found := _beside(place, root, names)) is not None}
                if not options:
                    continue
            tasks.append(Task(evaluation, layout, place, _reader(layout, place, bank if evaluation == "backgrounds" else None), options))
    if not tasks:
        raise UserError(f"{root} holds nothing that an evaluation reads; put datasets in it, or train/ and val/ with one subfolder per class")
    return tasks


def everything(
    encoder, folder, out, world=None, *, recipe: str | None = None, also: Sequence[str] = (), probe=None, limit: int | None = None,
    batch_size: int = 256, say: Callable[[str], None] = lambda line: None,
) -> dict[str, Report]:  # fmt: skip
    """Run what a folder of datasets allows -> {task: Report}; reports, pictures, TensorBoard and table.md go to `out`.

    recipe: whose published numbers stand beside ours; limit: images of each labelled set, evenly spread; features are kept in
    out/features for the tasks that share them. A dataset that is incomplete costs its own row. Raises UserError where nothing runs.
    """
    out, main = Path(out), world is None or world.is_main
    tasks = plan(folder, also=also, probe=probe)
    shared = {"batch_size": batch_size, "cache": out / "features", "probe": probe}
    reports, failed, drawn = {}, {}, set()
    for number, task in enumerate(tasks, start=1):
        say(f"[{number}/{len(tasks)}] {task.evaluation} on {task.place}")
        try:
            data = {role: _limited(role, found, limit) for role, found in task.read().items()}
            function = EVALUATIONS[task.evaluation]
            accepted = inspect.signature(function).parameters
            options = {key: value for key, value in shared.items() if key in accepted and value is not None and not (key == "batch_size" and task.evaluation in LONG)}
            reports[task.name] = function(encoder, data, world, **options, **task.options)
            if main:
                reports[task.name].save(out / "reports" / f"{task.name}.json")
            if task.evaluation == "knn" and task.place not in drawn:
                drawn.add(task.place)
                banks = [features.extract(encoder, data[role], "pooled", world=world, batch_size=batch_size, cache=out / "features") for role in ("train", "test")]
                for name, picture in class_pictures(*banks, data, encoder.uncoloured).items() if main else ():
                    write_png(out / "pictures" / f"{task.place.name}_{name}.png", picture)
        except UserError as error:
            failed[task.name] = str(error)
            say(f"    left out: {error}")
    if not reports:
        raise UserError(f"evaluate all: none of {len(tasks)} evaluations could run; {next(iter(failed.values()))}")
    if main:
        (out / "table.md").write_text(table(reports, tasks, failed, recipe), encoding="utf-8")
        board(reports, out)
    return reports


def table(reports: Mapping[str, Report], tasks: Sequence[Task], failed: Mapping[str, str], recipe: str | None = None) -> str:
    """One Markdown table of all numbers, with what is published for the recipe beside them."""
    lines = [
        f"# Evaluations{f' of {recipe}' if recipe else ''}", "",
        "| protocol | data | number | measured | published | images | seconds |", "|---|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for task in tasks:
        report = reports.get(task.name)
        if report is None:
            lines.append(f"| {task.evaluation} | {task.place.name} | left out: {failed.get(task.name, '')} | | | | |")
            continue
        cost = [str(report.cost.get(key, "")) for key in ("images", "seconds")]
        for row, (name, value) in enumerate(report.numbers.items()):
            known = published(recipe, task.evaluation, task.place.name if task.layout == "revisited" else task.layout, name)
            shown = "not defined" if isinstance(value, float) and math.isnan(value) else f"{value:.2f}" if isinstance(value, float) else str(value)
            beside = "" if known is None else f"{known:g}"
            lines.append(f"| {task.evaluation} | {task.place.name} | {name} | {shown} | {beside} | {' | '.join(cost if row == 0 else ['', ''])} |")
    lines += ["", "Accuracies, recalls, mAP and agreement in per cent. Protocols, as run:", ""]
    for name, report in reports.items():
        protocol = ", ".join(f"{key}: {value}" for key, value in report.protocol.items() if key not in ("evaluation", "differences", "bank_hash"))
        lines.append(f"- `{name}`: {protocol}; data {report.data_hash[:12]}")
        lines += [f"  - differs from {report.protocol.get('preset') or 'the papers'}: {line}" for line in report.protocol.get("differences", ())]
    return "\n".join(lines) + "\n"


def board(reports: Mapping[str, Report], out: Path) -> None:
    """The numbers and pictures for TensorBoard, in out/tensorboard."""
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as writer:
        for task, report in reports.items():
            for name, value in report.numbers.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    writer.add_scalar(f"{task}/{name}", value, 0, walltime=time.time())
        for path in sorted((out / "pictures").glob("*.png")):
            with Image.open(path) as picture:
                writer.add_image(path.stem, np.array(picture), 0, dataformats="HWC")


def _reader(layout: str, place: Path, bank: Path | None) -> Callable[[], dict]:
    def read() -> dict:
        data = dict(LAYOUTS[layout].read(place))
        return data if bank is None else {"train": LAYOUTS["imagenet"].read(bank)["train"], **data}

    return read


def _limited(role: str, found, limit: int | None):
    return evenly(found, limit) if limit and hasattr(found, "image") and role not in ("query", "database") else found


def _beside(place: Path, root: Path, names: Sequence[str]) -> str | None:
    return next((str(folder / name) for folder in (place, root) for name in names if (folder / name).exists()), None)
