"""A recipe for a folder of one's own: chosen for the device and the data, every choice with its reason beside it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from maskwise.data.datasets import DATASETS
from maskwise.data.decode import CorruptImage
from maskwise.doctor.advice import suggested_momentum
from maskwise.functional.errors import UserError

TRAIN, TEST = ("train", "training"), ("val", "test", "valid", "validation")
PROBED = 16  # images whose sizes are asked
LARGE = 100_000  # images from which a published recipe serves as it is


@dataclass(frozen=True)
class Start:
    """A recipe as text, and what was picked and why, a line each."""

    text: str
    said: list[str]


@dataclass(frozen=True)
class Images:
    """What a folder holds: number, typical short side in pixels, and the keys that name it in a recipe."""

    count: int
    side: int
    keys: dict
    labelled: bool


def start(path: str | Path, device: torch.device) -> Start:
    """Pick a recipe for the images at `path` (a folder, with train/ and val/ or without, or a list file).

    Raises UserError where there are no images.
    """
    images = look_at(Path(path).expanduser())
    picked = for_gpu(images) if device.type == "cuda" else for_cpu(images)
    what = "labelled images" if images.labelled else "images"
    head = f"{images.count} {what} of about {images.side} px on {'a GPU' if device.type == 'cuda' else 'a CPU'}"
    said = [f"{head}: {picked['title']}", *(f"  {key}: {value} ({why})" for key, (value, why) in picked["told"].items())]
    return Start(written(images, picked, head), said)


def look_at(path: Path) -> Images:
    """Open the data and ask a few images for their size."""
    keys: dict = {"name": "list" if path.is_file() else "folder", "path": os.path.abspath(path)}
    if path.is_dir():
        held = {entry.name.lower(): entry.name for entry in path.iterdir() if entry.is_dir()}
        train, test = (next((held[name] for name in names if name in held), None) for names in (TRAIN, TEST))
        if train and test:  # either alone may be a class
            keys.update(split=train, test_split=test)
    data = DATASETS[keys["name"]](path=path, split=keys.get("split"))
    if len(data) < 2:
        raise UserError(f"{path} holds {len(data)} image; at least 2 are needed, and some thousands to learn from")
    sides = []
    for k in range(min(PROBED, len(data))):
        try:
            sides.append(min(data.image(k * len(data) // min(PROBED, len(data))).shape[1:]))
        except CorruptImage:
            continue
    if not sides:
        raise UserError(f"{path}: none of {min(PROBED, len(data))} images tried can be read; look at the files")
    if data.labels is None or "test_split" in keys and DATASETS["folder"](path=path, split=keys["test_split"]).classes != data.classes:
        keys.pop("test_split", None)
    return Images(len(data), sorted(sides)[len(sides) // 2], keys, data.labels is not None)


def for_cpu(images: Images) -> dict:
    """Small crops and a small ViT: minutes to hours."""
    small = images.side < 64
    size = 32 if small else 64 if images.side < 96 else 112
    patch = 8 if size < 112 else 16
    batch = batch_for(images.count, 64 if small else 32)
    epochs = length(images.count, seen=200_000 if small else 60_000, low=5, high=200)
    steps = epochs * (images.count // batch)
    return {
        "title": f"iBOT with AttMask-High on a small ViT, {size}-px crops",
        "size": size, "local": size // 2 if size < 112 else 48, "locals": 4, "patch": patch,
        "backbone": {"name": "vit_tiny_patch16_224", "patch_size": patch, **({"embed_dim": 128, "num_heads": 4, "depth": 4} if small else {"depth": 6}), "drop_path": 0.0},
        "pooling": "simpool", "prototypes": 256 if small else 1024, "hidden": 256 if small else 512, "bottleneck": 128,
        "batch": batch, "epochs": epochs, "lr": 4e-3 if small else 2e-3, "momentum": suggested_momentum(batch, steps), "warm": False,
        "told": {
            "backbone": ("a small ViT of " + ("4 blocks, width 128" if small else "6 blocks, width 192"), "what a CPU trains in reasonable time"),
            "crops": (f"2 x {size} + 4 x {size // 2 if size < 112 else 48} px", "no larger than the images, and few patches" if size < 112 else "cost grows with the area; 224 for final runs"),
            "pooling": ("simpool", "gives usable attention within minutes, where a class token needs long runs"),
            "train": (f"{epochs} epochs of {images.count // batch} steps of {batch}", f"{steps} steps"),
            "teacher": (f"momentum {suggested_momentum(batch, steps):g}, temperature .04", "a short run wants a quick, sharp teacher"),
        },
    }  # fmt: skip


def for_gpu(images: Images) -> dict:
    """ViT-S/16 with the published settings; sizes and length follow the data."""
    small = images.side < 64
    large = images.count >= LARGE
    size = 64 if small else 224
    batch = batch_for(images.count, 240 if large else 256)
    epochs = 100 if large else length(images.count, seen=10_000_000, low=100, high=800)
    steps = epochs * (images.count // batch)
    momentum = suggested_momentum(batch, steps)
    return {
        "title": "iBOT with AttMask-Hint on ViT-S" + (", the published settings for ImageNet" if large and not small else ""),
        "size": size, "local": 32 if small else 96, "locals": 6 if not large else 10, "patch": 8 if small else 16,
        "backbone": {"name": "vit_small_patch16_224", **({"patch_size": 8} if small else {}), "drop_path": 0.1},
        "pooling": "cls", "prototypes": 8192 if large else 4096 if images.count >= 20_000 else 1024, "hidden": 2048, "bottleneck": 256,
        "batch": batch, "epochs": epochs, "lr": 5e-4, "momentum": momentum, "warm": epochs >= 100,
        "told": {
            "backbone": ("ViT-S/16" if not small else "ViT-S/8", "21 million weights, which one GPU trains"),
            "crops": (f"2 x {size} + {6 if not large else 10} x {32 if small else 96} px", "as published; six local crops for smaller data (rows A4, A5)" if not small else "the images are small"),
            "pooling": ("cls", "long run; simpool is the choice for sharper attention"),
            "train": (f"{epochs} epochs of {images.count // batch} steps of {batch}", f"{steps} steps; as published" if large else f"{steps} steps, about {images.count * epochs / 1e6:.3g} million images seen"),
            "teacher": (f"momentum {momentum:g}, temperature .04" + (" to .07" if epochs >= 100 else ""), "by the length of the run"),
        },
    }  # fmt: skip


def batch_for(count: int, wanted: int) -> int:
    """A power-of-two-ish batch that leaves at least eight steps an epoch where the data allows."""
    return max(2, min(wanted, 1 << int(math.log2(max(2, count // 8))))) if count // 8 < wanted else wanted


def length(count: int, seen: int, low: int, high: int) -> int:
    """Epochs after which about `seen` images were shown."""
    return max(low, min(high, round(seen / count)))


def written(images: Images, picked: dict, head: str) -> str:
    """The recipe as a commented file."""
    from maskwise.recipe_text import write

    keys, small = images.keys, picked["size"] < 112
    test = "test_split" in keys
    knn = max(1, picked["epochs"] // 5)
    smallest = images.count // picked["batch"]
    lines = [
        f"# {picked['title']}: picked for {head}.",
        "# Edit what you like; `maskwise show FILE` prints every other key, `maskwise doctor FILE` measures what a run costs.",
        "", "seed: 0", "", "data:", *(f"  {key}: {write(value)}" for key, value in keys.items()), "",
        f"crops:{'':<24}# {picked['told']['crops'][1]}",
        f"  global_size: {picked['size']}", f"  local_size: {picked['local']}", f"  local_number: {picked['locals']}",
        f"  global_scale: {[0.4, 1.0] if small else [0.25, 1.0]}", f"  local_scale: {[0.15, 0.5] if small else [0.05, 0.25]}",
        *(["  blur_prob: [0.0, 0.0, 0.0]    # blurred, so few pixels would say nothing", "  solarize_prob: 0.0"] if picked["size"] < 64 else []), "",
        f"backbone:{'':<21}# {picked['told']['backbone'][1]}", *(f"  {key}: {write(value)}" for key, value in picked["backbone"].items()), "",
        f"pooling: {picked['pooling']:<21}# {picked['told']['pooling'][1]}", "",
        "head:", f"  prototypes: {picked['prototypes']:<16}# published: 8192 for 1.28 million images", f"  hidden: {picked['hidden']}", f"  bottleneck: {picked['bottleneck']}",
        f"  norm_last_layer: {'false' if images.count >= LARGE else 'true':<11}# {'as published' if images.count >= LARGE else 'steadier on small data'}", "",
        "method: ibot", "", "masking:", f"  name: {'attmask_hint' if picked['warm'] else 'attmask_high'}", "  ratio: 0.3", "  var: 0.2", "  prob: 0.5", "",
        f"teacher:{'':<22}# {picked['told']['teacher'][1]}", f"  momentum: {picked['momentum']:g}",
        *[f"  {key}: {value}" for key, value in ((("temp", 0.07), ("warmup_temp", 0.04), ("warmup_temp_epochs", 30), ("patch_temp", 0.07), ("warmup_patch_temp", 0.04)) if picked["warm"]
          else (("temp", 0.04), ("warmup_temp", 0.04), ("warmup_temp_epochs", 0), ("patch_temp", 0.04), ("warmup_patch_temp", 0.04)))], "",
        "optimizer:", f"  lr: {picked['lr']:<24g}# per 256 images: peak {picked['lr'] * picked['batch'] / 256:.3g}", f"  warmup_epochs: {10 if picked['epochs'] >= 100 else max(1, picked['epochs'] // 10)}",
        f"  freeze_last_layer: {1 if picked['epochs'] >= 100 else 0}", "",
        f"train:{'':<24}# {smallest} steps an epoch", f"  epochs: {picked['epochs']}", f"  batch_size: {picked['batch']}", "",
        "evaluate:", f"  knn_every: {knn if test else 0:<17}# " + ("k-NN on the test images, in epochs" if test else "no labelled test images; give data.test_path or data.test_split for a k-NN on the way"),
        *(["  k: [10, 20]"] if test else []), *(["  crop_pct: 1.0"] if small else []), "",
    ]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)
