"""Run folders written by hand: nothing trains, and every number is known to the test."""

import json

import numpy as np

from maskwise.imaging.drawing import write_png
from maskwise.recipe.reading import read_recipe

STEPS = 40
SMALL = ["data.count=160", "train.epochs=2"]  # of debug/tiny: batches of 8, 20 steps an epoch
BASELINES = {"untrained_pooled_top1_k1": 30.5, "untrained_patch_mean_top1_k1": 21.0, "pixels_top1_k1": 17.25}
BASELINES |= {"whitened_pixels_top1_k1": 41.75, "chance": 12.5}


def logged(step):
    """The record of a step; cls and patch add up to the loss."""
    values = {"cls": 3.0 / step**0.5, "patch": 2.0 - step / 40, "teacher_entropy": 2 + 1 / step, "teacher_spread": 3.5}
    values |= {"feature_std": 0.4 + step / 100, "mask_share": 0.0, "lr": 1e-4 * step, "img_s": 50.0 + step}
    values |= {"loss": values["cls"] + values["patch"], "data_wait": 0.25, "seconds": 2.0 * step, "skipped": 0}
    return {"step": step, "epoch": (step - 1) // 20, **values}


def run_folder(folder, *words, steps=STEPS, alarm="", records=(), pictures=()):
    """A run of debug/tiny with further `words` that has logged every second of `steps`, with k-NN and baselines."""
    (folder / "reports").mkdir(parents=True)
    recipe = read_recipe("debug/tiny", *SMALL, *words)
    (folder / "recipe.yaml").write_text(recipe.resolved_yaml(), encoding="utf-8")
    start = {"ranks": 1, "device": "2 CPU cores", "commit": "abc123+", "threads": 1}
    about = {"images": 160, "started": "2026-01-02T03:04:05", "starts": [start], **start, "precision": "fp32"}
    about |= {"command": "maskwise train debug/tiny --out x", "recipe": "configs/debug/tiny.yaml"}
    (folder / "run.json").write_text(json.dumps(about), encoding="utf-8")
    lines = [logged(step) for step in range(2, steps + 1, 2)]
    lines += [
        {"step": step, "report": "knn", "numbers": {"top1": 20 + step / 2}} for step in (0, 20, 40) if step <= steps
    ]
    lines += [{"step": 10, "alarm": alarm, "kind": "rank_collapse"}] if alarm else []
    lines = sorted([*lines, *records], key=lambda line: line["step"])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    protocol = {"headline_k": 1, "bank": 64, "queries": 32}
    report = {"numbers": BASELINES, "protocol": protocol, "data_hash": "0", "cost": {"seconds": 4}}
    (folder / "reports" / "baselines.json").write_text(json.dumps(report), encoding="utf-8")
    (folder / "reports" / "knn_step_00000040.json").write_text(json.dumps(report), encoding="utf-8")
    for step in pictures:  # redder with every step
        picture = np.full((90, 60, 3), (step, 100, 50), np.uint8)
        write_png(folder / "pictures" / f"attention_and_masks_step_{step:08d}.png", picture)
    return folder


def records_of(folder):
    """The records of a run, read without the package."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
