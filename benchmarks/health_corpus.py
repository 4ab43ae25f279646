"""Do the alarms speak when they should, and only then? `python -m benchmarks.health_corpus --json docs/results/health.json`

Healthy: short real trainings on `shapes` over methods, maskings, poolings and seeds; none may raise an alarm, and each must learn (its loss ends well below
ln K). Sick: each fault at full and at half strength; its alarm must speak within the run, and `maskwise doctor` must name it. The thresholds lie in
`ssl/maskwise/engine/health.py`; the commit that last changed them is noted, and the healthy runs are made after it.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from maskwise import build
from maskwise.doctor.diagnosis import diagnose
from maskwise.engine import health
from maskwise.engine.journal import read_metrics
from maskwise.functional.errors import UserError
from maskwise.recipe import read_recipe
from maskwise.run_record import commit

IMAGES, EPOCHS, SHORT = 240, 18, 13  # 180 steps of a healthy run, 130 of a sick one
TINY = (
    f"data.count={IMAGES}", "data.size=40", "crops.global_size=32", "crops.local_size=16", "crops.local_number=1", "crops.jitter=[0.4,0.4,0.2,0.0]", "crops.blur_prob=[0,0,0]",
    "backbone.patch_size=8", "backbone.embed_dim=48", "backbone.num_heads=3", "backbone.depth=2", "head.prototypes=64", "head.hidden=64", "head.bottleneck=32",
    "train.batch_size=24", "train.log_every=5", "train.keep=1", "train.save_every=1000", "evaluate.knn_every=0", "evaluate.pictures_every=0", "optimizer.warmup_epochs=1", "speed.checkpointing=none",
)  # fmt: skip
LONGER = "train.epochs=20"  # 200 steps: half a fault takes longer to show
LEARNT = 0.9  # share of ln K that the loss of a run which learns must come below
MASKINGS = ("random", "block", "attmask_high")
SIGNS = ("cls", "teacher_entropy", "teacher_spread", "patch_entropy", "patch_spread", "feature_std", "feature_rank", "feature_twins", "mask_agreement", "teacher_gap")

HEALTHY = [
    (f"{method}, {masking}, {pooling}, seed {seed}", (f"method.name={method}", f"masking.name={masking}", f"pooling.name={pooling}", f"seed={seed}"))
    for number, (method, masking, pooling) in enumerate((m, k, p) for m in ("ibot", "dino") for k in MASKINGS for p in ("simpool", "cls"))
    for seed in [number % 2]
]


def temps(*keys: str):
    """A temperature of 1 instead of .02, or of half that."""
    return lambda fault: tuple(f"teacher.{key}={fault:g}" for key in keys)


def part(section: str, name: str, *more: str):
    """A part of `benchmarks.sick` with the strength of its fault."""
    return lambda fault: (f"{section}.name=benchmarks.sick:{name}", f"{section}.fault={fault}", *more)


# fault: (the alarms of which one must speak and be the doctor's first, what half strength means, the overrides at a strength)
SICK = {
    "targets without a preference": (("uniform", "stuck"), "temperatures of .5 instead of 1 (healthy: .02)", temps("temp", "warmup_temp", "patch_temp", "warmup_patch_temp")),
    "patch targets without a preference": (("patch_uniform",), "patch temperatures of .5 instead of 1 (healthy: .02)", temps("patch_temp", "warmup_patch_temp")),
    "one prototype for every image": (("point",), "half of the center is taken off", part("method", "LessCentred", "masking.name=none", LONGER)),
    "one prototype for every patch": (("patch_point",), "half of the patch center is taken off", part("method", "PatchesLessCentred", "head.patch_prototypes=64", LONGER)),
    "empty images": (("flat", "twins"), "half of the images are one grey picture", part("data", "Blank", "crops.jitter_prob=0", "crops.grey_prob=0")),
    # half faded they fall onto a few prototypes before they fall onto a line
    "images of one number": (("line", "point"), "images half faded into their brightness", part("data", "Grey", "crops.jitter_prob=0", "crops.grey_prob=0", LONGER)),
    "the same mask everywhere": (("masks",), "half of the hidden patches are the same", part("masking", "SameMask", "masking.ratio=0.4", "masking.var=0", "masking.prob=1")),
    "a teacher that stands still": (("teacher",), "a memory of 200 steps in a run of 130, instead of an endless one", lambda fault: (f"teacher.momentum={1.0 if fault == 1 else 0.995}",)),
    "a learning rate of nothing": (("same",), "a hundred-thousandth of the learning rate instead of 1e-10 of it", lambda fault: (f"optimizer.lr={2e-3 * (1e-10 if fault == 1 else 1e-5):g}", "optimizer.min_lr=0")),
    "steps that are no numbers": (("skipped",), "every other step", part("method", "Broken", "masking.name=none", "train.max_bad_steps=100000")),
    "an absurd learning rate": (("line", "knn"), "a tenth of it, still fifty times too much", lambda fault: (f"optimizer.lr={1.0 if fault == 1 else 0.1}", "evaluate.knn_every=13", "evaluate.knn_first=true", "evaluate.limit_bank=256")),
}  # fmt: skip


def trained(folder: Path, *overrides: str, epochs: int) -> dict:
    """One run and what it told."""
    recipe = read_recipe("pretrain/quickstart_shapes", *TINY, f"train.epochs={epochs}", *overrides)
    start = time.process_time()
    try:
        ended = build.train(recipe, folder, quiet=True)["status"]
    except UserError as error:
        ended = str(error)
    lines = read_metrics(folder / "metrics.jsonl")
    steps, found = [line for line in lines if "loss" in line], diagnose(folder)
    late = [line for line in steps if line["step"] >= health.PATIENCE // 2]
    return {
        "ended": ended,
        "steps": steps[-1]["step"],
        "alarms": {line["kind"]: line["step"] for line in reversed(lines) if "alarm" in line},
        "doctor": found.kinds,
        "cls_of_ln_k": round(sum(line["cls"] or math.nan for line in steps[-8:]) / len(steps[-8:]) / math.log(recipe.head.prototypes), 3),
        "range": {key: [round(min(values), 4), round(max(values), 4)] for key in SIGNS if (values := [line[key] for line in late if line.get(key) is not None])},
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def last_change() -> str:
    """The commit that last changed the alarms."""
    here = Path(health.__file__)
    return subprocess.run(["git", "log", "-1", "--format=%h", "--", here.name], cwd=here.parent, capture_output=True, text=True).stdout.strip()


def thresholds() -> str:
    """The content of the file of thresholds, as git names it: what the runs were judged by."""
    return subprocess.run(["git", "hash-object", health.__file__], capture_output=True, text=True).stdout.strip()


def verdict(found: dict) -> dict:
    """Counts over all runs."""
    sick = found["sick"].values()
    return {
        "healthy_runs": len(found["healthy"]), "healthy_without_alarm": sum(each["well"] for each in found["healthy"].values()),
        "sick_runs": len(sick), "alarm_spoke": sum(each["spoke_at_step"] is not None for each in sick), "doctor_named_it": sum(each["named"] for each in sick),
        "latest_alarm_at_step": max((each["spoke_at_step"] or 0 for each in sick), default=None),
    }  # fmt: skip


def measure(only: str = "", kept: dict | None = None, say=print) -> dict:
    """All runs, healthy and sick, whose title holds `only`; those in `kept` are taken from there if they were judged by the same thresholds."""
    os.environ.setdefault("MASKWISE_MODULES", "benchmarks.sick")
    kept = kept if kept and kept["thresholds_file"] == thresholds() else {"healthy": {}, "sick": {}}
    about = {
        "date": str(date.today()), "commit": commit(), "thresholds_since": last_change(), "thresholds_file": thresholds(), "command": "python -m benchmarks.health_corpus", "torch": torch.__version__,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})", "recipe": ["pretrain/quickstart_shapes", *TINY],
        "thresholds": {key: getattr(health, key) for key in ("WINDOW", "PATIENCE", "LN_K", "UNIFORM", "ONE_KIND", "FLAT", "LINE", "TWINS", "EQUAL_MASKS", "UNMOVED", "SAME", "BELOW")},
    }  # fmt: skip
    found = {**about, "healthy": dict(kept["healthy"]), "sick": dict(kept["sick"])}
    with tempfile.TemporaryDirectory() as folder:
        for number, (title, overrides) in enumerate(HEALTHY):
            if only in title and title not in found["healthy"]:
                seen = trained(Path(folder) / f"healthy_{number}", *overrides, epochs=EPOCHS)
                seen["well"] = not seen["alarms"] and not seen["doctor"] and seen["cls_of_ln_k"] < LEARNT
                found["healthy"][title] = seen
                say(json.dumps({title: seen}))
        for number, (title, (expected, half, overrides)) in enumerate(SICK.items()):
            for strength in (1.0, 0.5):
                name = title if strength == 1 else f"{title}, at half strength"
                if only in name and name not in found["sick"]:
                    seen = trained(Path(folder) / f"sick_{number}_{strength}", *overrides(strength), epochs=SHORT)
                    spoke = [seen["alarms"][kind] for kind in expected if kind in seen["alarms"]]
                    seen |= {"expected": expected, "spoke_at_step": min(spoke) if spoke else None, "named": bool(seen["doctor"]) and seen["doctor"][0] in expected}
                    if strength < 1:
                        seen["half_strength"] = half
                    found["sick"][name] = seen
                    say(json.dumps({name: seen}))
    found["verdict"] = verdict(found)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose title holds these words")
    parser.add_argument("--json", metavar="FILE", help="write there; runs that are in it already, judged by the same thresholds, are kept")
    given = parser.parse_args()
    result = measure(given.only, json.loads(Path(given.json).read_text()) if given.json and Path(given.json).exists() else None)
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["verdict"], indent=1))
