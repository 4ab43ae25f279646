"""Benchmark sets derived from the image packs, in the layouts that the evaluations read."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from launch.reproduce.packs import new_folder
from maskwise.data.benchmark_sets import in9
from maskwise.data.benchmark_sets.label_maps import IGNORED


def in9_from_boxes(pack: Path, place: Path, per_class: int) -> Path:
    """Write IN-9 variants: box blacked out, tiled with background, cut out, or pasted onto another background.

    The background of an image is the image with its box filled with tiles of the larger strip next to it.
    """
    if place.is_dir():
        return place
    chosen = boxed_images(pack, per_class)
    with new_folder(place) as folder:
        for label, images in chosen.items():
            for number, (path, box) in enumerate(images):
                image = pixels(pack / path)
                variants = {
                    "original": image,
                    "only_fg": pasted(np.zeros_like(image), image, box),
                    "only_bg_b": filled(image, box, black=True),
                    "only_bg_t": filled(image, box),
                }
                others = {
                    "mixed_same": (label, number + 1),
                    "mixed_rand": ((label + 1 + number * 5 % 8) % 9, number),
                    "mixed_next": ((label + 1) % 9, number),
                }
                for name, (other, index) in others.items():
                    source, its_box = chosen[other][index % len(chosen[other])]
                    variants[name] = pasted(filled(pixels(pack / source), its_box), image, box)
                for name, picture in variants.items():
                    class_folder = folder / name / "val" / f"{label:02d}_{in9.CLASSES[label]}"
                    class_folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(class_folder / f"{number:04d}.png")
    return place


def boxed_images(pack: Path, per_class: int) -> dict[int, list]:
    """Return (path, box) of up to `per_class` test images of each IN-9 class.

    A box leaves some background and is more than a dot.
    """
    with open(pack / "classes.csv", newline="", encoding="utf-8") as file:
        label_of = {row["wnid"]: int(row["in9_index"]) for row in csv.DictReader(file)}
    images: dict[int, list] = {label: [] for label in range(9)}
    with open(pack / "boxes.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            label, box = label_of[row["wnid"]], [int(row[key]) for key in ("x0", "y0", "x1", "y1")]
            area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
            if row["path"].startswith("val/") and label >= 0 and 200 < area < 0.7 * 64 * 64:
                images[label].append((row["path"], box))
    return {label: some[:: max(1, len(some) // per_class)][:per_class] for label, some in images.items()}


def pixels(path: Path) -> np.ndarray:
    """Read an image as uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def pasted(ground: np.ndarray, image: np.ndarray, box: list[int]) -> np.ndarray:
    """Paste the box of an image onto another background."""
    x0, y0, x1, y1 = box
    mixed = ground.copy()
    mixed[y0 : y1 + 1, x0 : x1 + 1] = image[y0 : y1 + 1, x0 : x1 + 1]
    return mixed


def filled(image: np.ndarray, box: list[int], black: bool = False) -> np.ndarray:
    """Fill the box of an image with black, or with tiles of the larger of the four strips around it."""
    x0, y0, x1, y1 = box
    background, size = image.copy(), image.shape[0]
    tiles = np.zeros_like(image)
    if not black:
        strips = [image[:y0], image[y1 + 1 :], image[:, :x0], image[:, x1 + 1 :]]
        strip = max(strips, key=lambda part: min(part.shape[:2]) * max(part.shape[:2]) if part.size else 0)
        tiles = np.tile(strip, (-(-size // strip.shape[0]), -(-size // strip.shape[1]), 1))[:size, :size]
    background[y0 : y1 + 1, x0 : x1 + 1] = tiles[y0 : y1 + 1, x0 : x1 + 1]
    return background


def drawings(pack: Path, place: Path, classes: int, per_class: int) -> Path:
    """Write test images of some classes in ImageNet-R's layout, drawn as dark lines on white."""
    if not place.is_dir():
        with new_folder(place) as target:
            for folder in sorted((pack / "val").iterdir())[:: max(1, 100 // classes)][:classes]:
                (target / folder.name).mkdir(parents=True)
                for path in sorted(folder.iterdir())[:per_class]:
                    with Image.open(path) as image:
                        edges = image.convert("L").filter(ImageFilter.FIND_EDGES)
                    lines = ImageOps.autocontrast(ImageOps.invert(edges))
                    lines.convert("RGB").save(target / folder.name / f"{path.stem}.png")
    return place


def numbered_only(pack: Path, place: Path) -> Path:
    """Write test images named by ImageNet number as train/ and val/, with the ReaL labels of timm."""
    if not place.is_dir():
        with new_folder(place) as target:
            for path in sorted((pack / "val").rglob("ILSVRC2012_val_*.JPEG")):
                (target / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / "val" / path.parent.name)
            shutil.copytree(pack / "train", target / "train")
            timm_folder = Path(importlib.util.find_spec("timm").origin).parent
            shutil.copy(timm_folder / "data" / "_info" / "imagenet_real_labels.json", target / "real.json")
    return place


def copies(pack: Path, place: Path, count: int) -> Path:
    """Write photographs in Copydays' layout: originals, strong copies, JPEG of quality 10, crops of a half."""
    if not place.is_dir():
        with new_folder(place) as target:
            for group in ("original", "strong", "jpegqual/10", "crops/50"):
                (target / group).mkdir(parents=True)
            for number, path in enumerate(sorted((pack / "db").glob("*.jpg"))[:count]):
                with Image.open(path) as image:
                    whole = image.convert("RGB")
                w, h = whole.size
                cut = 0.5 * (1 - 0.5**0.5)
                half = whole.crop((int(w * cut), int(h * cut), int(w * (1 - cut)), int(h * (1 - cut))))
                whole.save(target / "original" / f"{number:04d}00.jpg", quality=95)
                strong_copy(whole, number).save(target / "strong" / f"{number:04d}01.jpg", quality=15)
                whole.save(target / "jpegqual/10" / f"{number:04d}00.jpg", quality=10)
                half.save(target / "crops/50" / f"{number:04d}00.jpg", quality=90)
    return place


def strong_copy(image: Image.Image, number: int) -> Image.Image:
    """Crop and rotate an image, then make it gray, darken or mirror it, in turn."""
    w, h = image.size
    angle = -12 if number % 2 else 12
    cropped = image.crop((w // 6, h // 6, w * 5 // 6, h * 5 // 6)).rotate(angle, fillcolor=(128, 128, 128))
    if number % 3 == 0:
        return ImageOps.grayscale(cropped).convert("RGB")
    return cropped.point(lambda v: v // 2) if number % 3 == 1 else ImageOps.mirror(cropped)


def coco_boxes(pack: Path, place: Path, part: str = "val2017") -> Path:
    """Write COCO's annotations of the pack coco200 beside a link to its images: one object for each polygon."""
    if place.is_dir():
        return place
    images, annotations = [], []
    for number, file in enumerate(sorted((pack / "images" / part).glob("*.jpg"))):
        with Image.open(file) as image:
            width, height = image.size
        images.append({"id": number, "file_name": file.name, "width": width, "height": height})
        labels = pack / "instance_segmentation" / "labels" / part / f"{file.stem}.txt"
        for line in labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else ():
            x, y = np.array(line.split()[1:], dtype=float).reshape(-1, 2).T * [[width], [height]]
            box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
            outline = np.stack([x, y], axis=1).flatten().tolist()
            annotations.append({"image_id": number, "bbox": box, "segmentation": [outline]})
    with new_folder(place) as folder:
        (folder / "annotations").mkdir()
        (folder / "images").symlink_to((pack / "images").resolve())
        table = {"images": images, "annotations": annotations}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(table), encoding="utf-8")
    return place


def coco_label_maps(pack: Path, place: Path) -> Path:
    """Link images and semantic maps of the pack coco200 as `images/` and `labels/`."""
    if not place.is_dir():
        with new_folder(place) as folder:
            (folder / "images").symlink_to((pack / "images").resolve())
            (folder / "labels").symlink_to((pack / "semantic_segmentation" / "masks").resolve())
    return place


def coco_things(pack: Path, place: Path) -> Path:
    """Write the panoptic segments of the pack coco200 as label maps beside a link to its images.

    Classes: 0 stuff, 1 things (countable objects); pixels without a segment are unlabeled (255).
    """
    if not place.is_dir():
        with new_folder(place) as folder:
            (folder / "images").symlink_to((pack / "images").resolve())
            (folder / "classes.txt").write_text("stuff\nthing\n", encoding="utf-8")
            for part in ("train2017", "val2017"):
                (folder / "labels" / part).mkdir(parents=True)
                segments = pack / "panoptic_segmentation" / "annotations" / f"panoptic_{part}"
                table = json.loads(segments.with_suffix(".json").read_text(encoding="utf-8"))
                thing = {category["id"]: category["isthing"] for category in table["categories"]}
                for annotation in table["annotations"]:
                    labels = thing_map(pixels(segments / annotation["file_name"]), annotation["segments_info"], thing)
                    Image.fromarray(labels).save(folder / "labels" / part / annotation["file_name"])
    return place


def thing_map(colors: np.ndarray, segments: list[dict], thing: dict[int, int]) -> np.ndarray:
    """Return 1 for things, 0 for stuff and 255 without a segment, uint8 [H, W], of a panoptic picture [H, W, 3].

    A color holds the number of its segment, R + 256 G + 65536 B. thing: 1 or 0 by category.
    """
    numbers = colors @ np.array([1, 256, 65536])
    labels = np.full(numbers.shape, IGNORED, dtype=np.uint8)
    for segment in segments:
        labels[numbers == segment["id"]] = thing[segment["category_id"]]
    return labels
