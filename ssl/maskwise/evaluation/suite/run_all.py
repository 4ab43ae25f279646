"""All evaluations that the datasets in a folder allow, with one table of the results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from maskwise.data.benchmark_sets import BENCHMARK_SETS, boxed, imagenet, voc
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.data.notes import notes
from maskwise.engine.atomic_file import write_atomic
from maskwise.engine.run_log import prepare_folder
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.baselines import NAME as BASELINES
from maskwise.evaluation.baselines import rows as baseline_rows
from maskwise.evaluation.features import extract
from maskwise.evaluation.protocol import labeled_sets
from maskwise.evaluation.report import Report
from maskwise.evaluation.suite.board import board
from maskwise.evaluation.suite.class_charts import class_pictures
from maskwise.evaluation.suite.published import published
from maskwise.imaging.drawing import write_png
from maskwise.process.progress import titled

# benchmark set -> ((evaluation, its options for this set), ...)
PROTOCOLS: dict[str, tuple[tuple[str, dict], ...]] = {
    "imagenet": (
        ("knn", {"feature": ("pooled",), "k": (10, 20)}),
        ("clustering", {}),
        ("masked", {}),
        ("robustness", {}),
        ("analysis", {}),
        ("logistic", {}),
        ("linear", {}),
        ("attentive", {}),
        ("finetune", {}),
    ),
    "cifar": (
        ("knn", {"feature": ("pooled",), "k": (10, 20)}),
        ("clustering", {}),
        ("masked", {}),
        ("analysis", {}),
        ("logistic", {}),
        ("linear", {}),
        ("attentive", {}),
        ("finetune", {}),
    ),
    "flowers": (
        ("knn", {"feature": ("pooled",), "k": (10, 20)}),
        ("logistic", {}),
        ("linear", {}),
        ("attentive", {}),
        ("finetune", {}),
    ),
    "in9": (("backgrounds", {}),),
    "revisited": (("retrieval", {}),),
    "copydays": (("copy_detection", {}),),
    "davis": (("video", {}),),
    **{name: (("recall", {"preset": name}),) for name in ("cars", "products", "inshop")},
    "cub": (("recall", {"preset": "cub"}), ("localization", {})),
    "imagenet_boxes": (("localization", {}),),
    "wsol": (("localization", {}),),
    "voc": (("discovery", {}), ("mask_overlap", {})),
    "coco": (("discovery", {}), ("mask_overlap", {}), ("detection", {})),
    **{
        name: (("knn_segmentation", {}), ("unsupervised_segmentation", {}), ("linear_segmentation", {}))
        for name in ("ade", "label_maps")
    },
}
BY_BOXES = ("localization", "discovery", "mask_overlap")
# Evaluations that train a model or record every layer run on request only.
LONG = ("linear", "logistic", "attentive", "finetune", "analysis", "linear_segmentation", "detection")
# option of robustness -> names of its folder or file, in the data set's folder or its parent
SHIFTED_SETS = {
    "imagenet_r": ("imagenet-r", "imagenet_r"),
    "imagenet_v2": ("imagenet-v2", "imagenetv2-matched-frequency", "imagenetv2-matched-frequency-format-val"),
    "real": ("real.json",),
}


@dataclasses.dataclass
class Task:
    """An evaluation on a dataset, which is read when the task runs, so that an incomplete one stops no other."""

    evaluation: str
    benchmark: str
    folder: Path
    read: Callable[[], dict]
    options: dict

    @property
    def name(self) -> str:
        """Name of the report."""
        return f"{self.evaluation}_{self.folder.name}"


def plan(folder, *, also: Mapping[str, Mapping] = MappingProxyType({}), probe=None, channels: int = 3) -> list[Task]:
    """List the evaluations that the datasets in a folder and its subfolders allow.

    also: evaluations of LONG -> their options. IN-9 is scored by a probe, or by the training images of the folder of
    ImageNet classes; without either its task fails. Raises UserError if nothing can be evaluated, or nothing by one of
    `also`.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder; give one that holds datasets")
    if unknown := [name for name in also if name not in LONG]:
        raise UserError(f"evaluate all: also={unknown[0]!r} is none of {', '.join(LONG)}")
    datasets = find_datasets(root)
    bank = imagenet_folder(path for name, path in datasets if name == "imagenet")
    tasks = []
    for benchmark, path in datasets:
        for evaluation, options in PROTOCOLS[benchmark]:
            if evaluation in LONG and evaluation not in also:
                continue
            if evaluation == "robustness":
                options = shifted_sets(path, root)
                if not options:
                    continue
            own = {"channels": channels} if benchmark == "imagenet" else {}  # published sets are RGB
            layout = boxed if evaluation in BY_BOXES else BENCHMARK_SETS[benchmark]
            read = partial(layout.read, path, **own)
            if evaluation == "backgrounds" and (bank is not None or probe is None):
                read = partial(with_bank, read, bank, channels)
            if evaluation == "detection":  # the training images, too
                read = partial(EVALUATIONS["detection"].readers["test"], path)
            tasks.append(Task(evaluation, benchmark, path, read, {**options, **also.get(evaluation, {})}))
    if not tasks:
        raise UserError(
            f"{root} holds nothing that an evaluation reads; put datasets in it, or train/ and val/ with one subfolder "
            "per class"
        )
    if idle := sorted(set(also) - {task.evaluation for task in tasks}):
        readers = [name for name, rows in PROTOCOLS.items() if idle[0] in dict(rows)]
        raise UserError(
            f"evaluate all: also={idle[0]}: {root} holds no dataset for it; it reads {', '.join(readers)} (any train/ "
            "and val/ with one subfolder per class count as imagenet)"
        )
    return tasks


def imagenet_folder(folders: Iterable[Path]) -> Path | None:
    """Return the folder with the most ImageNet classes among those whose classes are all ImageNet's, or None.

    Its training folders are WordNet ids, or 1000 numbers: fewer numbers may be any classes.
    """
    best, most = None, 0
    for folder in folders:
        names = [entry.name for entry in (folder / "train").iterdir() if entry.is_dir() and entry.name[0] != "."]
        ids = set(names) <= set(imagenet.synsets())
        if len(names) > most and (ids or len(names) == 1000 and imagenet.indices(names) is not None):
            best, most = folder, len(names)
    return best


def with_bank(read: Callable[[], dict], bank: Path | None, channels: int) -> dict:
    """Return the images of a benchmark and the training images of `bank`. Raises UserError without one."""
    if bank is None:
        raise UserError(
            "IN-9 is scored by a classifier of ImageNet's classes; put a folder with train/ and val/ of ImageNet there "
            "(class folders named by WordNet ids), or give probe=FILE"
        )
    return {"train": imagenet.read(bank, channels=channels)["train"], **read()}


def find_datasets(root: Path) -> list[tuple[str, Path]]:
    """Return (benchmark set, folder) of each dataset in a folder and its subfolders."""
    folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))]
    datasets = [
        (name, path)
        for path in folders
        for name, layout in BENCHMARK_SETS.items()
        if name in PROTOCOLS and layout.matches(path)
    ]
    in_subfolders = {name for name, path in datasets if path != root}
    # A parent that merely holds a dataset is not one of its own.
    found = [(name, path) for name, path in datasets if path != root or name not in in_subfolders]
    return [
        (name, part) for name, path in found for part in (voc.years(path) if name == "voc" else [path])
    ]  # one of each year


def shifted_sets(path: Path, root: Path) -> dict[str, str]:
    """Return the options of robustness that name a set found in a dataset's folder or in the root."""
    options = {}
    for option, names in SHIFTED_SETS.items():
        candidates = [folder / name for folder in (path, root) for name in names]
        if existing := [candidate for candidate in candidates if candidate.exists()]:
            options[option] = str(existing[0])
    return options


def run_all(
    encoder,
    folder,
    out,
    world=None,
    *,
    recipe: str | None = None,
    also: Mapping[str, Mapping] = MappingProxyType({}),
    probe=None,
    baselines: Callable[..., Report] | None = None,
    limit: int | None = None,
    batch_size: int = 256,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Report]:
    """Run all evaluations that the datasets in a folder allow -> {task: Report}.

    Reports, pictures, TensorBoard files and table.md are written to `out`.

    recipe: its published numbers are added to the table; also: evaluations of LONG -> their options; baselines:
    of k-NN, a callable(data, world, k=, batch_size=) -> Report whose rows follow k-NN in the table; limit: images of
    each labeled set, evenly spread; features are cached in out/features for tasks that share them. An incomplete
    dataset fails its own tasks only. Raises UserError if no task succeeds, or `out` cannot be written.
    """
    if limit is not None and limit < 1:
        raise UserError(f"evaluate all: limit is {limit}; it must be at least 1")
    out, main = Path(out), world is None or world.is_main
    tasks = plan(folder, also=also, probe=probe, channels=len(encoder.mean))
    prepare_folder(out)
    shared = {"batch_size": batch_size, "cache": out / "features", "probe": probe}
    reports, failed, drawn, read = {}, {}, set(), set()
    for number, task in enumerate(tasks, start=1):
        say(f"[{number}/{len(tasks)}] {task.evaluation} on {task.folder}")
        try:
            sets = task.read()
            if task.folder not in read:
                read.add(task.folder)
                for note in notes(sets):
                    say(f"    {note}")
            data = {role: _limited(role, images, limit) for role, images in sets.items()}
            with titled(task.evaluation):
                options = {**_accepted(task, shared), **task.options}
                reports[task.name] = EVALUATIONS[task.evaluation](encoder, data, world, **options)
            if main:
                reports[task.name].save(out / "reports" / f"{task.name}.json")
            if task.evaluation == "knn" and task.folder not in drawn:
                drawn.add(task.folder)
                draw_classes(encoder, data, out, task.folder.name, world, batch_size)
                reports |= measured_beside(task, baselines, data, world, batch_size, out)
        except UserError as error:
            failed[task.name] = str(error)
            say(f"    left out: {error}")
    if not reports:
        raise UserError(f"evaluate all: none of {len(tasks)} evaluations could run; {next(iter(failed.values()))}")
    if main:
        write_atomic(out / "table.md", table(reports, tasks, failed, recipe))
        board(reports, out)
    return reports


def measured_beside(task: Task, baselines, data: dict, world, batch_size: int, out: Path) -> dict[str, Report]:
    """Measure and save the baselines of a k-NN task -> {name: report}; {} without `baselines`."""
    if baselines is None:
        return {}
    name = baselines_name(task)
    with titled("k-NN baselines"):
        report = baselines(data, world, k=task.options["k"], batch_size=batch_size)
    if world is None or world.is_main:
        report.save(out / "reports" / f"{name}.json")
    return {name: report}


def baselines_name(task: Task) -> str:
    """Return the name of the baselines' report of a k-NN task."""
    return f"{BASELINES}_{task.folder.name}"


def draw_classes(encoder, data: dict, out: Path, name: str, world, batch_size: int) -> None:
    """Write the class charts of a labeled dataset to out/pictures; ranks share the extraction."""
    options = {"world": world, "batch_size": batch_size, "cache": out / "features"}
    data = labeled_sets("pictures", data, "train", "test")
    banks = [extract.extract(encoder, data[role], "pooled", **options) for role in ("train", "test")]
    if world is None or world.is_main:
        for kind, picture in class_pictures(*banks, data, encoder.uint8_crop).items():
            write_png(out / "pictures" / f"{name}_{kind}.png", picture)


def table(
    reports: Mapping[str, Report], tasks: Sequence[Task], failed: Mapping[str, str], recipe: str | None = None
) -> str:
    """Return a Markdown table of all numbers and the published numbers of the recipe."""
    lines = [
        f"# Evaluations{f' of {recipe}' if recipe else ''}",
        "",
        "| protocol | data | number | measured | published | images | seconds |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for task in tasks:
        report = reports.get(task.name)
        if report is None:
            reason = failed.get(task.name, "")
            lines.append(f"| {task.evaluation} | {task.folder.name} | left out: {reason} | | | | |")
            continue
        cost = [str(report.cost.get(key, "")) for key in ("images", "seconds")]
        data = task.folder.name if task.benchmark in ("revisited", "voc") else task.benchmark
        for row, (name, value) in enumerate(report.numbers.items()):
            expected = published(recipe, task.evaluation, data, name)
            cells = [task.evaluation, task.folder.name, name, _number(value)]
            cells += ["" if expected is None else f"{expected:g}", *(cost if row == 0 else ["", ""])]
            lines.append(f"| {' | '.join(cells)} |")
        if task.evaluation == "knn" and (beside := reports.get(baselines_name(task))) is not None:
            for row, value in baseline_rows(beside).items():
                number = f"{row}, k = {beside.protocol['headline_k']}"
                lines.append(f"| knn | {data} | {number} | {_number(value)} | | | |")
    lines += ["", "Accuracies, recalls, mAP, CorLoc and agreement in per cent. Protocols, as run:", ""]
    for name, report in reports.items():
        hidden = ("evaluation", "differences", "bank_hash", "objects", "iou")
        protocol = ", ".join(f"{key}: {value}" for key, value in report.protocol.items() if key not in hidden)
        lines.append(f"- `{name}`: {protocol}; data {report.data_hash[:12]}")
        preset = report.protocol.get("preset") or "the papers"
        lines += [f"  - differs from {preset}: {line}" for line in report.protocol.get("differences", ())]
    return "\n".join(lines) + "\n"


def _accepted(task: Task, shared: dict) -> dict:
    """Return the shared options that an evaluation takes; the batch size of training is its preset's."""
    names = set(EVALUATIONS[task.evaluation].option_names)
    if task.evaluation in LONG:
        names.discard("batch_size")
    return {key: value for key, value in shared.items() if key in names and value is not None}


def _limited(role: str, images, limit: int | None):
    if limit and hasattr(images, "image") and role not in ("query", "database"):
        return subsample_evenly(images, limit)
    return images


def _number(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return "not defined" if math.isnan(value) else f"{value:.2f}"
