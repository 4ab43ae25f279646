"""Run every evaluation on the image packs, for a trained and an untrained encoder and raw pixels, as one table.

    python -m launch.reproduce.evaluate_packs --packs FOLDER --run64 runs/tiny --run224 runs/imagenette \\
        --out docs/results/evaluate_packs.md

Packs are unpacked into --work, and missing benchmark sets are derived from them in the layouts that the evaluations
read: IN-9 variants cut by the boxes of tinyimagenet100, copies of retrieval-mini's photographs, drawings of
tinyimagenet100's test images. Numbers compare only within the table. --scale 0.2 for a quick look. With one of the two
runs only, the rows of the other stay as they are in the file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import maskwise
from launch.reproduce.derived_sets import copies, drawings, in9_from_boxes, numbered_only
from launch.reproduce.packs import unpack
from maskwise import build
from maskwise.bench import record
from maskwise.data.benchmark_sets import imagenet, in9, revisited
from maskwise.data.datasets.folder import Folder
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.features import extract
from maskwise.evaluation.features.views import RawPixels
from maskwise.evaluation.suite.class_charts import class_pictures
from maskwise.imaging.drawing import write_png
from maskwise.recipe.reading import read_recipe

PACKS = ("cifar10-jpeg", "tinyimagenet100", "imagenette224-core", "retrieval-mini")


def main() -> None:
    """Measure both runs, write the table and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", required=True, type=Path, help="the folder of the .tar.xz packs")
    parser.add_argument("--run64", type=Path, help="a run for 64 px, such as pretrain/tinyimagenet100_attmask")
    parser.add_argument("--run224", type=Path, help="a run for 224 px, such as pretrain/imagenette_dino")
    parser.add_argument("--out", required=True, type=Path, help="the Markdown table; .json is written next to it")
    parser.add_argument(
        "--work", type=Path, default=Path("evaluate_packs"), help="where packs are unpacked and layouts are made"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images to use")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    stored = (
        record.read(given.out.with_suffix(".json"))
        if given.out.with_suffix(".json").is_file()
        else {"record": None, "sides": {}, "rows": []}
    )
    about = record.describe(seed=0, command="python -m launch.reproduce.evaluate_packs")
    stored["record"] = record.continued(stored["record"], about) if stored["record"] else about
    runs = {side: run for side, run in (("64", given.run64), ("224", given.run224)) if run is not None}
    packs = {name: unpack(given.packs / f"{name}.tar.xz", given.work) for name in PACKS}
    for side, run in runs.items():
        begin = time.perf_counter()
        stored["rows"] = [row for row in stored["rows"] if row["side"] != side]
        for title, data, name, options, size in {"64": small, "224": large}[side](packs, given.work, given.scale):
            networks = encoders(run, size)
            trained = networks["trained"]
            if name == "masked" and not trained.pooling.gives_attention:
                continue
            for who, encoder in networks.items():
                row = measure(who, encoder, title, data, name, dict(options), given.work, trained)
                stored["rows"].append({"side": side, **row})
                print(
                    f"{time.perf_counter() - begin:6.0f} s  {title}, {name}, {who}: {shortly(row['numbers'])}",
                    flush=True,
                )
                stored["sides"][side] = {
                    "run": describe(run),
                    "scale": given.scale,
                    "seconds": round(time.perf_counter() - begin),
                    "record": about,
                }
                save(given.out, stored)
    draw(packs, given, runs)


def small(packs: dict, work: Path, scale: float) -> list[tuple]:
    """Return the measurements of the 64 px encoder: (title, data, evaluation, options, image size)."""
    cifar = limited(imagenet.read(packs["cifar10-jpeg"]), 5000 * scale, 1000 * scale)
    tiny = limited(imagenet.read(packs["tinyimagenet100"]), 4000 * scale, 1000 * scale)
    variants = in9.read(
        in9_from_boxes(packs["tinyimagenet100"], work / "bg_challenge", per_class=max(2, round(30 * scale)))
    )
    drawn = drawings(packs["tinyimagenet100"], work / "drawings", classes=20, per_class=max(2, round(20 * scale)))
    return [
        ("CIFAR-10 (JPEG)", cifar, "knn", {"k": (10, 20), "feature": "pooled", "few_shot": (1, 5, 10, 20)}, 64),
        ("CIFAR-10 (JPEG)", cifar, "clustering", {}, 64),
        ("CIFAR-10 (JPEG)", cifar, "logistic", {}, 64),
        ("CIFAR-10 (JPEG)", cifar, "masked", {"ratios": (0.3, 0.7)}, 64),
        ("tinyimagenet100", tiny, "knn", {"k": (10, 20), "feature": "pooled"}, 64),
        ("tinyimagenet100", tiny, "clustering", {}, 64),
        ("tinyimagenet100", tiny, "recall", {"ks": (1, 2, 4)}, 64),
        ("IN-9 cut by the boxes of tinyimagenet100", {"train": tiny["train"], **variants}, "backgrounds", {}, 64),
        ("drawings of 20 classes of tinyimagenet100", {**tiny, "drawings": Folder(drawn)}, "robustness", {}, 64),
    ]


def large(packs: dict, work: Path, scale: float) -> list[tuple]:
    """Return the measurements of the 224 px encoder, as `small` does."""
    nette = limited(imagenet.read(packs["imagenette224-core"]), 600 * scale, 200 * scale)
    numbered = numbered_only(packs["imagenette224-core"], work / "imagenette-numbered")
    real = {
        "train": nette["train"],
        "test": subsample_evenly(imagenet.read(numbered)["test"], max(10, round(134 * scale))),
    }
    marks = revisited.read(packs["retrieval-mini"])
    days = EVALUATIONS["copy_detection"].readers["test"](
        copies(packs["retrieval-mini"], work / "copydays", max(6, round(40 * scale)))
    )
    return [
        ("imagenette224", nette, "knn", {"k": (10, 20), "feature": "pooled"}, 224),
        ("imagenette224", nette, "clustering", {}, 224),
        ("imagenette224", nette, "masked", {"ratios": (0.5,)}, 224),
        (
            "imagenette224, numbered test images with ReaL labels",
            real,
            "robustness",
            {"real": numbered / "real.json"},
            224,
        ),
        ("retrieval-mini", marks, "retrieval", {"variants": "papers"}, 224),
        (
            "retrieval-mini, queries cut to their box, 448 px",
            marks,
            "retrieval",
            {"variants": "official", "long_side": 448},
            224,
        ),
        ("copies of retrieval-mini", days, "copy_detection", {}, 224),
    ]


def encoders(run: Path, size: int) -> dict:
    """Return the run's teacher, its untrained network, and raw pixels, all for images of one size."""
    trained = maskwise.load(run, image_size=size)
    return {
        "trained": trained,
        "untrained": untrained_like(trained, run),
        "raw pixels": RawPixels(32, trained.mean, trained.std),
    }


def untrained_like(trained, run: Path):
    """Return a run's network before training, for images as the trained one takes them."""
    untrained = build.encoder(read_recipe(run)).eval()
    untrained.image_size, untrained.crop_pct = trained.image_size, trained.crop_pct
    return untrained


def measure(who: str, encoder, title: str, data: dict, name: str, options: dict, work: Path, trained) -> dict:
    """Run one evaluation of one encoder; salient patches are those of the trained encoder's attention."""
    if name == "masked":
        options |= {"guide": trained}  # the same patches are blackened for all three
    function = EVALUATIONS[name]
    if name in ("knn", "clustering", "logistic", "masked", "recall", "backgrounds", "robustness"):
        options["cache"] = work / "features"
    begin = time.perf_counter()
    report = function(encoder, data, None, **options)
    return {
        "data": title,
        "evaluation": name,
        "who": who,
        "numbers": report.numbers,
        "protocol": report.protocol,
        "data_hash": report.data_hash,
        "images": report.cost.get("images"),
        "seconds": round(time.perf_counter() - begin, 2),
        "seeds": report.seeds,
    }


def save(out: Path, stored: dict) -> None:
    """Write the table, and everything behind it as JSON."""
    stored["rows"].sort(key=lambda row: row["side"] != "64")
    out.parent.mkdir(parents=True, exist_ok=True)
    record.write(out.with_suffix(".json"), stored)
    out.write_text(table(stored), encoding="utf-8")


def describe(run: Path) -> str:
    """Describe a run in one line."""
    recipe = read_recipe(run)
    masking = f"{recipe.masking.name}, pooling {recipe.pooling.name}"
    step = int((run / "checkpoints" / "last").read_text(encoding="utf-8").strip().removeprefix("step_"))
    return f"{recipe.method.name} with {masking}, {step} steps of {recipe.train.batch_size} images"


def table(stored: dict) -> str:
    """Return the Markdown table: a line per number, a column per encoder."""
    rows = stored["rows"]
    lines = [
        "# Every evaluation on the packs",
        "",
        "By `python -m launch.reproduce.evaluate_packs`. One run, one seed: differences of a point or two mean "
        "nothing.",
        "",
        *(
            f"- {side} px: {side_of['run']}; scale {side_of['scale']:g}, {about['date']}, commit {about['commit']}"
            f"{'' if about['clean'] else ' with uncommitted changes'}, {about['hardware']}, {about['threads']} "
            f"thread(s), torch {about['torch']}, {side_of['seconds']} s for the three columns"
            for side, side_of in stored["sides"].items()
            for about in (side_of["record"],)
        ),
        "",
        "IN-9 variants (from boxes, not from masks), drawings and copies are made from the packs by the script: they "
        "compare within a row only. Raw pixels are 32 x 32, normalized. "
        "In `masked`, the trained encoder's attention chooses the patches for all three; an encoder without attention "
        "has no such rows. Features are shared by "
        "evaluations of the same images, so that the first of them takes the time.",
        "",
        "| data | evaluation | number | trained | untrained | raw pixels | seconds of each |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    order = list(dict.fromkeys((row["data"], row["evaluation"]) for row in rows))
    for data, evaluation in order:
        by_encoder = {row["who"]: row for row in rows if (row["data"], row["evaluation"]) == (data, evaluation)}
        seconds = " / ".join(f"{row['seconds']:.0f}" for row in by_encoder.values())
        for number, name in enumerate(next(iter(by_encoder.values()))["numbers"]):
            values = [
                cell(by_encoder[who]["numbers"].get(name)) if who in by_encoder else ""
                for who in ("trained", "untrained", "raw pixels")
            ]
            lines.append(
                f"| {data} | {evaluation} | {name} | {' | '.join(values)} | {seconds if number == 0 else ''} |"
            )
    return "\n".join(lines) + "\n"


def cell(value) -> str:
    """Return a number with one decimal, or what stands in its place."""
    return "" if value is None else "not defined" if value != value else f"{value:.1f}"


def shortly(numbers: dict) -> str:
    """Return the first numbers of a report in one line."""
    return ", ".join(f"{name} {value:.1f}" for name, value in list(numbers.items())[:4])


def draw(packs: dict, given, runs: dict) -> None:
    """Draw the charts of a classification, for CIFAR-10 and imagenette, into --work/pictures."""
    for side, pack, size, counts in (
        ("64", "cifar10-jpeg", 64, (5000, 1000)),
        ("224", "imagenette224-core", 224, (600, 200)),
    ):
        if side in runs:
            data = limited(imagenet.read(packs[pack]), *(count * given.scale for count in counts))
            trained = encoders(runs[side], size)["trained"]
            banks = [
                extract.extract(trained, data[role], "pooled", cache=given.work / "features")
                for role in ("train", "test")
            ]
            for name, picture in class_pictures(*banks, data, trained.uint8_crop).items():
                write_png(given.work / "pictures" / f"{pack}_{name}.png", picture)


def limited(data: dict, bank: float, queries: float) -> dict:
    """Return evenly spread images of both parts."""
    return {
        "train": subsample_evenly(data["train"], max(40, round(bank))),
        "test": subsample_evenly(data["test"], max(20, round(queries))),
    }


if __name__ == "__main__":
    main()
