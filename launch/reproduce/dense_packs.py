"""Run the evaluations of attention and patches on the image packs, for several encoders beside untrained ones.

    python -m launch.reproduce.dense_packs --packs PACKS --model "AttMask-High=runs/high" \\
        --model "block-wise=runs/block" --out docs/results/dense_packs.md [--scale 0.2] [--only localization video]

Localization on the lists of tinyimagenet100 and imagenette224, discovery and mask overlap on imagenette224 and coco200,
segmentation on the semantic maps of coco200 and, things against stuff, on its panoptic ones, video on davis-mini. Packs
are unpacked into --work. Every row is written as it is measured, --processes of them side by side; the same command
goes on after an interruption, and repeats rows of another checkpoint, scale or option.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

import maskwise
from launch.reproduce.derived_sets import coco_boxes, coco_label_maps, coco_things
from launch.reproduce.evaluate_packs import describe, untrained_like
from launch.reproduce.packs import unpack
from launch.reproduce.tables.runs import follow_parent
from maskwise.bench import record
from maskwise.data.benchmark_sets import boxed, davis, label_maps
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.evaluation import EVALUATIONS
from maskwise.recipe.reading import read_recipe

PACKS = ("tinyimagenet100", "imagenette224-core", "coco200", "davis-mini")
# evaluation -> the numbers of its reports that the table shows
SHOWN = {
    "localization": ("max_box_acc_v2", "max_box_acc", "center_max_box_acc_v2"),
    "discovery": ("lost", "dino_seg", "token_cut", "whole_image"),
    "mask_overlap": ("attmask_high", "attmask_hint", "block", "random", "chance", "best"),
    "knn_segmentation": ("miou", "macc", "aacc"),
    "linear_segmentation": ("miou", "macc", "aacc"),
    "unsupervised_segmentation": ("miou", "macc", "aacc"),
    "video": ("j_mean", "f_mean", "jf_mean"),
}
# far shorter than the paper's: an iteration computes the logits of whole crops for every class
LINEAR = {"size": 224, "stride": 149, "augment": False, "iterations": 200, "batch_size": 8, "lr": 3e-3}
SINGLE = {  # numbers that do not depend on the encoder, those of masks only on its grid
    "localization": ("center_max_box_acc_v2",),
    "discovery": ("whole_image",),
    "mask_overlap": ("block", "random", "chance", "best"),
}


@dataclass(frozen=True)
class Measurement:
    """One evaluation of one set: title of the images, evaluation, data by role, options."""

    title: str
    evaluation: str
    data: dict
    options: dict


def measurements(packs: dict[str, Path], work: Path, scale: float, only: list[str]) -> list[Measurement]:
    """Return what is measured. scale: share of the images, at least 10 of each role."""
    tiny, nette = boxed.read(packs["tinyimagenet100"]), boxed.read(packs["imagenette224-core"])
    coco = boxed.read(coco_boxes(packs["coco200"], work / "coco_boxes"))
    maps = label_maps.read(coco_label_maps(packs["coco200"], work / "coco_maps"))
    things = label_maps.read(coco_things(packs["coco200"], work / "coco_things"))
    one = {"test": nette["test"]}
    every = [
        Measurement("tinyimagenet100", "localization", tiny, {"size": 96}),
        Measurement("imagenette224", "localization", nette, {}),
        Measurement("imagenette224", "discovery", one, {}),
        Measurement("imagenette224", "mask_overlap", one, {"ratio": 0.3}),
        Measurement("coco200", "discovery", coco, {"long_side": 320}),
        Measurement("coco200", "mask_overlap", coco, {"ratio": 0.3}),
        Measurement("coco200", "knn_segmentation", maps, {"ignored": 0, "size": 224}),
        Measurement("coco200", "unsupervised_segmentation", maps, {"ignored": 0, "size": 224}),
        Measurement("coco200", "linear_segmentation", maps, {"ignored": 0, **LINEAR}),
        Measurement("coco200, things", "knn_segmentation", things, {"size": 224}),
        Measurement("coco200, things", "linear_segmentation", things, LINEAR),
        Measurement("davis-mini", "video", davis.read(packs["davis-mini"]), {"short_side": 240}),
    ]
    return [
        Measurement(m.title, m.evaluation, scaled(m.data, scale if m.evaluation != "video" else 1.0), m.options)
        for m in every
        if not only or m.evaluation in only
    ]


def scaled(data: dict, scale: float) -> dict:
    """Return evenly spread images of each role."""
    if scale >= 1:
        return data
    return {role: subsample_evenly(images, max(10, round(scale * len(images)))) for role, images in data.items()}


def encoders(models: dict[str, Path]) -> dict[str, tuple]:
    """Return name -> (encoder, description, hash of the recipe, step), with an untrained network of each kind.

    A kind is a backbone's name with a pooling.
    """
    found: dict[str, tuple] = {}
    untrained: dict[str, tuple] = {}
    kinds: dict[str, str] = {}
    for name, run in models.items():
        recipe, trained = read_recipe(run), maskwise.load(run).eval()
        backbone, pooling = recipe.backbone.name, recipe.pooling.name
        about = f"{describe(run)}, {backbone}, seed {recipe.seed}"
        found[name] = (trained, about, recipe.hash(), last_step(run))
        of = f"untrained, {pooling}"
        if kinds.setdefault(of, backbone) != backbone:
            of = f"untrained {backbone}, {pooling}"
        if of not in untrained:
            untrained[of] = (untrained_like(trained, run), f"untrained {backbone}, {pooling}", of, "")
    return found | untrained


def last_step(run: Path) -> str:
    """Return the name of a run's last checkpoint."""
    return (run / "checkpoints" / "last").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Plan:
    """A command's models, (name, run folder) each, the folder of the packs, and its options."""

    models: tuple[tuple[str, Path], ...]
    packs: Path
    work: Path
    scale: float
    only: tuple[str, ...]
    threads: int


def opened(plan: Plan) -> tuple[list[Measurement], dict[str, tuple]]:
    """Return the measurements and the encoders of a plan."""
    torch.set_num_threads(plan.threads)
    packs = {name: unpack(plan.packs / f"{name}.tar.xz", plan.work) for name in PACKS}
    return measurements(packs, plan.work, plan.scale, list(plan.only)), encoders(dict(plan.models))


opened_once = functools.cache(opened)  # in a process of the pool


def measure_one(plan: Plan, number: int, name: str) -> dict:
    """Return the row of a measurement, by its number, of an encoder, by its name, in a process of the pool."""
    every, networks = opened_once(plan)
    return measure(every[number], networks[name][0])


def side_by_side(plan: Plan, todo: list[tuple[dict, int, str]], processes: int) -> Iterator[dict]:
    """Yield the row of each (key, number of the measurement, encoder) as it is ready."""
    context, workers = multiprocessing.get_context("spawn"), min(processes, len(todo))
    with ProcessPoolExecutor(workers, context, initializer=follow_parent, initargs=(plan.threads,)) as pool:
        waiting = {pool.submit(measure_one, plan, number, name): key for key, number, name in todo}
        try:
            for done in as_completed(waiting):
                yield waiting[done] | done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def measure(measurement: Measurement, encoder) -> dict:
    """Return the row of one evaluation of one encoder."""
    begin = time.perf_counter()
    report = EVALUATIONS[measurement.evaluation](encoder, measurement.data, None, **measurement.options)
    return {
        "numbers": report.numbers,
        "images": {role: len(images) for role, images in measurement.data.items()},
        "data_hash": report.data_hash,
        "seconds": round(time.perf_counter() - begin, 2),
    }


def table(stored: dict) -> str:
    """Return the Markdown page: a table for each evaluation and set, a line for each encoder."""
    about = stored["record"]
    clean = "" if about["clean"] else " with uncommitted changes"
    lines = [
        "# Attention and patches on the packs",
        "",
        f"By `python -m launch.reproduce.dense_packs`, {about['date']}, commit {about['commit']}{clean}, "
        f"{about['hardware']}, {about['threads']} thread(s), scale {stored['scale']:g}. One run and one seed of each.",
        "",
        *(f"- {name}: {what}" for name, what in stored["encoders"].items()),
    ]
    for data, evaluation in dict.fromkeys((row["data"], row["evaluation"]) for row in stored["rows"]):
        rows = [row for row in stored["rows"] if (row["data"], row["evaluation"]) == (data, evaluation)]
        single = [name for name in SINGLE.get(evaluation, ()) if len({row["numbers"].get(name) for row in rows}) == 1]
        names = [name for name in SHOWN[evaluation] if name not in single and name in rows[0]["numbers"]]
        images = ", ".join(f"{count} {role}" for role, count in rows[0]["images"].items())
        lines += ["", f"## {data}: {evaluation} ({images} images)", ""]
        lines += [f"| encoder | {' | '.join(names)} | seconds |", "|---|" + "---:|" * (len(names) + 1)]
        for row in rows:
            cells = " | ".join(f"{row['numbers'][name]:.1f}" for name in names)
            lines.append(f"| {row['encoder']} | {cells} | {row['seconds']:.0f} |")
        same = [f"{name} {rows[0]['numbers'][name]:.1f}" for name in single if name in rows[0]["numbers"]]
        if same:
            lines += ["", f"The same for all: {', '.join(same)}."]
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> int:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", required=True, type=Path, help="the folder of the .tar.xz packs")
    parser.add_argument("--model", action="append", required=True, metavar="NAME=RUN", help="an encoder; repeatable")
    parser.add_argument("--out", required=True, type=Path, help="the Markdown page; .json is written next to it")
    parser.add_argument("--work", type=Path, default=Path("dense_packs"), help="where packs are unpacked")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images to use")
    parser.add_argument("--only", nargs="*", default=[], choices=SHOWN, help="these evaluations")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="rows measured side by side")
    given = parser.parse_args(words)
    models = {name: Path(run) for name, _, run in (word.partition("=") for word in given.model)}
    absent = [str(run) for run in models.values() if not (run / "checkpoints" / "last").is_file()]
    if absent:
        parser.error(f"--model: no finished checkpoint in {', '.join(absent)}; give NAME=RUN with a run folder")

    path = given.out.with_suffix(".json")
    stored = record.read(path) if path.is_file() else {"record": None, "rows": []}
    plan = Plan(tuple(models.items()), given.packs, given.work, given.scale, tuple(given.only), given.threads)
    every, networks = opened(plan)
    about = record.describe(seed=0, command="python -m launch.reproduce.dense_packs")
    stored["record"] = record.continued(stored["record"], about) if stored["record"] else about
    stored |= {"scale": given.scale, "encoders": {name: what for name, (_, what, *_) in networks.items()}}
    todo = []
    for number, measurement in enumerate(every):
        for name, (_, _, recipe, step) in networks.items():
            key = {
                "encoder": name,
                "recipe_hash": recipe,
                "step": step,
                "scale": given.scale,
                "data": measurement.title,
                "evaluation": measurement.evaluation,
                "options": measurement.options,
            }
            if not any(key.items() <= row.items() for row in stored["rows"]):
                todo.append((key, number, name))
    order = [(m.title, m.evaluation, name) for m in every for name in networks]
    if given.processes > 1 and todo:
        rows = side_by_side(plan, todo, given.processes)
    else:
        rows = (key | measure(every[number], networks[name][0]) for key, number, name in todo)
    for row in rows:
        others = [other for other in stored["rows"] if place(other) != place(row)]
        stored["rows"] = in_order([*others, row], order)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        record.write(path, stored)
        given.out.write_text(table(stored), encoding="utf-8")
        shown = ", ".join(f"{key} {row['numbers'][key]:.1f}" for key in SHOWN[row["evaluation"]])
        print(f"{row['data']}, {row['evaluation']}, {row['encoder']}: {shown} ({row['seconds']:.0f} s)", flush=True)
    return 0


def place(row: dict) -> tuple[str, str, str]:
    """Return where a row stands in the tables: images, evaluation, encoder."""
    return row["data"], row["evaluation"], row["encoder"]


def in_order(rows: list[dict], order: list[tuple[str, str, str]]) -> list[dict]:
    """Return rows in the order of their places, those of other places last."""
    number = {where: i for i, where in enumerate(order)}
    return sorted(rows, key=lambda row: number.get(place(row), len(order)))


if __name__ == "__main__":
    sys.exit(main())
