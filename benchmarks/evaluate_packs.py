"""Every evaluation on the image packs, with a trained encoder, the untrained one and raw pixels, as one table.

    python benchmarks/evaluate_packs.py --packs ../shared/data --run32 runs/cifar10 --run224 runs/imagenette --out docs/results/evaluate_packs.md

Packs are unpacked into --work, and what they do not hold is made there from what they do, in the layouts that the evaluations read: IN-9
variants cut by the boxes of tinyimagenet100, copies of retrieval-mini's photographs, drawings of tinyimagenet100's test images. These
are no benchmarks, and their numbers compare only within the table. --scale 0.2 for a look. With one of the two runs only, the rows of
the other side stay as they are in the file.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

import maskwise
from maskwise import build, run_record
from maskwise.data.datasets import Folder
from maskwise.data.layouts import imagenet, in9, revisited
from maskwise.data.subset import evenly
from maskwise.evaluation import EVALUATIONS, features
from maskwise.evaluation.class_pictures import class_pictures
from maskwise.evaluation.views import RawPixels
from maskwise.functional.draw import write_png
from maskwise.recipe import read_recipe

PACKS = ("cifar10-jpeg", "tinyimagenet100", "imagenette224-core", "retrieval-mini")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packs", required=True, type=Path, help="the folder of the .tar.xz packs")
    parser.add_argument("--run32", type=Path, help="a run at 32 px, such as pretrain/cifar10_small")
    parser.add_argument("--run224", type=Path, help="a run at 224 px, such as pretrain/imagenette224_core")
    parser.add_argument("--out", required=True, type=Path, help="the Markdown table; .json is written beside it")
    parser.add_argument("--work", type=Path, default=Path("evaluate_packs"), help="where packs are unpacked and layouts are made")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images to use")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kept = json.loads(given.out.with_suffix(".json").read_text()) if given.out.with_suffix(".json").is_file() else {"sides": {}, "rows": []}
    runs = {side: run for side, run in (("32", given.run32), ("224", given.run224)) if run is not None}
    packs = {name: unpack(given.packs / f"{name}.tar.xz", given.work) for name in PACKS}
    for side, run in runs.items():
        begin = time.perf_counter()
        kept["rows"] = [row for row in kept["rows"] if row["side"] != side]
        for title, data, name, options, size in {"32": small, "224": large}[side](packs, given.work, given.scale):
            for who, encoder in encoders(run, size).items():
                row = measure(who, encoder, title, data, name, dict(options), given.work, trained=encoders(run, size)["trained"])
                kept["rows"].append({"side": side, **row})
                print(f"{time.perf_counter() - begin:6.0f} s  {title}, {name}, {who}: {shortly(row['numbers'])}", flush=True)
                kept["sides"][side] = about(given, run, time.perf_counter() - begin)
                save(given.out, kept)
    draw(packs, given, runs)


def small(packs: dict, work: Path, scale: float) -> list[tuple]:
    """What the 32 px encoder is measured on: (title, data, evaluation, options, image size)."""
    cifar = limited(imagenet.read(packs["cifar10-jpeg"]), 5000 * scale, 1000 * scale)
    tiny = limited(imagenet.read(packs["tinyimagenet100"]), 4000 * scale, 1000 * scale)
    variants = in9.read(in9_from_boxes(packs["tinyimagenet100"], work / "bg_challenge", per_class=max(2, round(30 * scale))))
    drawn = drawings(packs["tinyimagenet100"], work / "drawings", classes=20, per_class=max(2, round(20 * scale)))
    return [
        ("CIFAR-10 (JPEG)", cifar, "knn", {"k": (10, 20), "feature": "pooled", "few_shot": (1, 5, 10, 20)}, 32),
        ("CIFAR-10 (JPEG)", cifar, "clustering", {}, 32),
        ("CIFAR-10 (JPEG)", cifar, "logistic", {}, 32),
        ("CIFAR-10 (JPEG)", cifar, "masked", {"ratios": (0.3, 0.7)}, 32),
        ("tinyimagenet100", tiny, "knn", {"k": (10, 20), "feature": "pooled"}, 64),
        ("tinyimagenet100", tiny, "clustering", {}, 64),
        ("tinyimagenet100", tiny, "recall", {"ks": (1, 2, 4)}, 64),
        ("IN-9 cut by the boxes of tinyimagenet100", {"train": tiny["train"], **variants}, "backgrounds", {}, 64),
        ("drawings of 20 classes of tinyimagenet100", {**tiny, "drawings": Folder(drawn)}, "robustness", {}, 64),
    ]


def large(packs: dict, work: Path, scale: float) -> list[tuple]:
    """What the 224 px encoder is measured on."""
    nette = limited(imagenet.read(packs["imagenette224-core"]), 600 * scale, 200 * scale)
    numbered = numbered_only(packs["imagenette224-core"], work / "imagenette-numbered")
    real = {"train": nette["train"], "test": evenly(imagenet.read(numbered)["test"], max(10, round(134 * scale)))}
    marks = revisited.read(packs["retrieval-mini"])
    days = EVALUATIONS["copy_detection"].readers["test"](copies(packs["retrieval-mini"], work / "copydays", max(6, round(40 * scale))))
    return [
        ("imagenette224", nette, "knn", {"k": (10, 20), "feature": "pooled"}, 224),
        ("imagenette224", nette, "clustering", {}, 224),
        ("imagenette224", nette, "masked", {"ratios": (0.5,)}, 224),
        ("imagenette224, numbered test images with ReaL labels", real, "robustness", {"real": numbered / "real.json"}, 224),
        ("retrieval-mini", marks, "retrieval", {"variants": "papers"}, 224),
        ("retrieval-mini, queries cut to their box, 448 px", marks, "retrieval", {"variants": "official", "long_side": 448}, 224),
        ("copies of retrieval-mini", days, "copy_detection", {}, 224),
    ]


def encoders(run: Path, size: int) -> dict:
    """The run's teacher, the network it began as, and raw pixels, all for images of one size."""
    trained, untrained = maskwise.load(run, image_size=size), build.encoder(read_recipe(run)).eval()
    untrained.image_size, untrained.crop_pct = trained.image_size, trained.crop_pct
    return {"trained": trained, "untrained": untrained, "raw pixels": RawPixels(32, trained.mean, trained.std)}


def measure(who: str, encoder, title: str, data: dict, name: str, options: dict, work: Path, trained) -> dict:
    """One evaluation of one encoder; where pixels have no attention, the trained encoder's says what is salient."""
    if name == "masked":
        options |= {"guide": trained}  # the same patches go black for all three
    function = EVALUATIONS[name]
    if name in ("knn", "clustering", "logistic", "masked", "recall", "backgrounds", "robustness"):
        options["cache"] = work / "features"
    begin = time.perf_counter()
    report = function(encoder, data, None, **options)
    return {
        "data": title, "evaluation": name, "who": who, "numbers": report.numbers, "protocol": report.protocol, "data_hash": report.data_hash,
        "images": report.cost.get("images"), "seconds": round(time.perf_counter() - begin, 2), "seeds": report.seeds,
    }  # fmt: skip


def save(out: Path, kept: dict) -> None:
    """The table, and everything behind it as JSON."""
    kept["rows"].sort(key=lambda row: row["side"] != "32")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(kept, indent=1, default=str) + "\n")
    out.write_text(table(kept))


def about(given, run: Path, seconds: float) -> dict:
    """When, where and on what the rows of one side were measured."""
    return {
        "run": describe(run), "scale": given.scale, "seconds": round(seconds), "date": time.strftime("%Y-%m-%d"), "commit": run_record.commit(),
        "machine": run_record.device_name(torch.device("cpu")), "threads": given.threads, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def describe(run: Path) -> str:
    """What a run was, in one line."""
    recipe = read_recipe(run)
    masking = f"{recipe.masking.name}, pooling {recipe.pooling.name}"
    step = int((run / "checkpoints" / "last").read_text().strip().removeprefix("step_"))
    return f"{recipe.method.name} with {masking}, {step} steps of {recipe.train.batch_size} images"


def table(kept: dict) -> str:
    """One line a number, one column an encoder."""
    rows = kept["rows"]
    lines = [
        "# Every evaluation on the packs", "",
        "By `python benchmarks/evaluate_packs.py`. One run, one seed: differences of a point or two mean nothing.", "",
        *(
            f"- {side} px: {side_of['run']}; scale {side_of['scale']:g}, {side_of['date']}, commit {side_of['commit']}, {side_of['machine']}, {side_of['threads']} thread(s), "
            f"torch {side_of['torch']}, {side_of['seconds']} s for the three columns" for side, side_of in kept["sides"].items()
        ), "",
        "IN-9 variants (from boxes, not from masks), drawings and copies are made from the packs by the script: they compare within a row only. Raw pixels are 32 x 32, normalised. "
        "In `masked`, the trained encoder's attention chooses the patches for all three. Features are shared by evaluations of the same images, so that the first to ask pays.", "",
        "| data | evaluation | number | trained | untrained | raw pixels | seconds of each |", "|---|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    order = list(dict.fromkeys((row["data"], row["evaluation"]) for row in rows))
    for data, evaluation in order:
        found = {row["who"]: row for row in rows if (row["data"], row["evaluation"]) == (data, evaluation)}
        seconds = " / ".join(f"{row['seconds']:.0f}" for row in found.values())
        for number, name in enumerate(next(iter(found.values()))["numbers"]):
            values = [_shown(found[who]["numbers"].get(name)) if who in found else "" for who in ("trained", "untrained", "raw pixels")]
            lines.append(f"| {data} | {evaluation} | {name} | {' | '.join(values)} | {seconds if number == 0 else ''} |")
    return "\n".join(lines) + "\n"


def _shown(value) -> str:
    return "" if value is None else "not defined" if value != value else f"{value:.1f}"


def shortly(numbers: dict) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in list(numbers.items())[:4])


def draw(packs: dict, given, runs: dict) -> None:
    """The pictures of a classification, for CIFAR-10 and imagenette, in --work/pictures."""
    for side, pack, size, counts in (("32", "cifar10-jpeg", 32, (5000, 1000)), ("224", "imagenette224-core", 224, (600, 200))):
        if side in runs:
            data = limited(imagenet.read(packs[pack]), *(count * given.scale for count in counts))
            trained = encoders(runs[side], size)["trained"]
            banks = [features.extract(trained, data[role], "pooled", cache=given.work / "features") for role in ("train", "test")]
            for name, picture in class_pictures(*banks, data, trained.uncoloured).items():
                write_png(given.work / "pictures" / f"{pack}_{name}.png", picture)


def unpack(pack: Path, work: Path) -> Path:
    """The folder that a pack holds, unpacked once."""
    place = work / "packs" / pack.name.removesuffix(".tar.xz")
    if not place.is_dir():
        aside = place.with_name(f".{place.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        with tarfile.open(pack) as archive:
            archive.extractall(aside, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        aside.rename(place)
    return next(folder for folder in sorted(place.iterdir()) if folder.is_dir())


def limited(data: dict, bank: float, queries: float) -> dict:
    """Evenly spread images of both halves."""
    return {"train": evenly(data["train"], max(40, round(bank))), "test": evenly(data["test"], max(20, round(queries)))}


def in9_from_boxes(pack: Path, place: Path, per_class: int) -> Path:
    """IN-9's variants from boxes: the box blacked, tiled over with background, kept alone, or pasted onto another image's background.

    The background of an image is what is left of it when its box is filled with tiles of the larger strip beside it.
    """
    if place.is_dir():
        return place
    with open(pack / "classes.csv", newline="") as file:
        label_of = {row["wnid"]: int(row["in9_index"]) for row in csv.DictReader(file)}
    chosen: dict[int, list] = {label: [] for label in range(9)}
    with open(pack / "boxes.csv", newline="") as file:
        for row in csv.DictReader(file):
            label, box = label_of[row["wnid"]], [int(row[key]) for key in ("x0", "y0", "x1", "y1")]
            area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
            # Test images only, with a box that leaves some background and is more than a dot.
            if row["path"].startswith("val/") and label >= 0 and 200 < area < 0.7 * 64 * 64:
                chosen[label].append((row["path"], box))
    every = {label: some[:: max(1, len(some) // per_class)][:per_class] for label, some in chosen.items()}
    aside = place.with_name(f".{place.name}")
    shutil.rmtree(aside, ignore_errors=True)
    for label, some in every.items():
        for number, (path, box) in enumerate(some):
            image = pixels(pack / path)
            others = {"mixed_same": (label, number + 1), "mixed_rand": ((label + 1 + number * 5 % 8) % 9, number), "mixed_next": ((label + 1) % 9, number)}
            made = {"original": image, "only_fg": pasted(np.zeros_like(image), image, box), "only_bg_b": filled(image, box, black=True), "only_bg_t": filled(image, box)}
            for name, (other, which) in others.items():
                source, theirs = every[other][which % len(every[other])]
                made[name] = pasted(filled(pixels(pack / source), theirs), image, box)
            for name, picture in made.items():
                folder = aside / name / "val" / f"{label:02d}_{in9.CLASSES[label]}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(folder / f"{number:04d}.png")
    aside.rename(place)
    return place


def pixels(path: Path) -> np.ndarray:
    """uint8 [64, 64, 3]."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def pasted(ground: np.ndarray, image: np.ndarray, box: list[int]) -> np.ndarray:
    """The box of an image on another ground."""
    x0, y0, x1, y1 = box
    made = ground.copy()
    made[y0 : y1 + 1, x0 : x1 + 1] = image[y0 : y1 + 1, x0 : x1 + 1]
    return made


def filled(image: np.ndarray, box: list[int], black: bool = False) -> np.ndarray:
    """An image whose box is black, or tiled with the larger of the four strips around it."""
    x0, y0, x1, y1 = box
    made, size = image.copy(), image.shape[0]
    strips = [image[:y0], image[y1 + 1 :], image[:, :x0], image[:, x1 + 1 :]]
    strip = max(strips, key=lambda part: min(part.shape[:2]) * max(part.shape[:2]) if part.size else 0)
    tiles = np.zeros_like(image) if black else np.tile(strip, (-(-size // strip.shape[0]), -(-size // strip.shape[1]), 1))[:size, :size]
    made[y0 : y1 + 1, x0 : x1 + 1] = tiles[y0 : y1 + 1, x0 : x1 + 1]
    return made


def drawings(pack: Path, place: Path, classes: int, per_class: int) -> Path:
    """ImageNet-R's layout from test images of some classes, drawn as dark lines on white."""
    if not place.is_dir():
        aside = place.with_name(f".{place.name}")
        shutil.rmtree(aside, ignore_errors=True)
        for folder in sorted((pack / "val").iterdir())[:: max(1, 100 // classes)][:classes]:
            (aside / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:per_class]:
                with Image.open(path) as image:
                    lines = ImageOps.autocontrast(ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)))
                    lines.convert("RGB").save(aside / folder.name / f"{path.stem}.png")
        aside.rename(place)
    return place


def numbered_only(pack: Path, place: Path) -> Path:
    """The test images that keep their ImageNet number, as train/ and val/, with ReaL labels (from the copy that timm carries)."""
    if not place.is_dir():
        aside = place.with_name(f".{place.name}")
        shutil.rmtree(aside, ignore_errors=True)
        for path in sorted((pack / "val").rglob("ILSVRC2012_val_*.JPEG")):
            (aside / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, aside / "val" / path.parent.name)
        shutil.copytree(pack / "train", aside / "train")
        import importlib.util

        shutil.copy(Path(importlib.util.find_spec("timm").origin).parent / "data" / "_info" / "imagenet_real_labels.json", aside / "real.json")
        aside.rename(place)
    return place


def copies(pack: Path, place: Path, count: int) -> Path:
    """Copydays' layout from photographs: originals, strong copies (cut, turned, grey or dark, quality 15), JPEG of quality 10, crops of a half."""
    if not place.is_dir():
        aside = place.with_name(f".{place.name}")
        shutil.rmtree(aside, ignore_errors=True)
        for group in ("original", "strong", "jpegqual/10", "crops/50"):
            (aside / group).mkdir(parents=True)
        for number, path in enumerate(sorted((pack / "db").glob("*.jpg"))[:count]):
            with Image.open(path) as image:
                whole = image.convert("RGB")
            w, h = whole.size
            whole.save(aside / "original" / f"{number:04d}00.jpg", quality=95)
            strong = whole.crop((w // 6, h // 6, w * 5 // 6, h * 5 // 6)).rotate(-12 if number % 2 else 12, fillcolor=(128, 128, 128))
            strong = ImageOps.grayscale(strong).convert("RGB") if number % 3 == 0 else strong.point(lambda v: v // 2) if number % 3 == 1 else ImageOps.mirror(strong)
            strong.save(aside / "strong" / f"{number:04d}01.jpg", quality=15)
            whole.save(aside / "jpegqual/10" / f"{number:04d}00.jpg", quality=10)
            cut = 0.5 * (1 - 0.5**0.5)
            whole.crop((int(w * cut), int(h * cut), int(w * (1 - cut)), int(h * (1 - cut)))).save(aside / "crops/50" / f"{number:04d}00.jpg", quality=90)
        aside.rename(place)
    return place


if __name__ == "__main__":
    main()
