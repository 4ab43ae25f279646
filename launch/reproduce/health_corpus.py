"""Measure whether alarms are raised exactly when they should: `python -m launch.reproduce.health_corpus --json FILE`.

Healthy: short training runs on `shapes` over methods, maskings, poolings and seeds; none may raise an alarm, and each
must learn (its loss ends well below ln K). Unhealthy: each fault at full and at half strength; its alarm must be
raised within the run, and `maskwise doctor` must name it. Thresholds: `ssl/maskwise/engine/collapse_alarms.py`; the
commit that last changed them is recorded. The committed result is docs/results/health.json.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from pathlib import Path

from maskwise import build
from maskwise.bench import record
from maskwise.doctor.diagnose import diagnose
from maskwise.engine import collapse_alarms
from maskwise.engine.run_log import read_metrics
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

EPOCHS, SHORT = 18, 13  # 180 steps of a healthy run, 130 of an unhealthy one
RECIPE = Path(__file__).with_name("health_corpus.yaml")
LONGER = "train.epochs=20"  # 200 steps: faults at half strength show later
LEARNED = 0.9  # share of ln K below which the loss of a healthy run must end
MASKINGS = ("random", "block", "attmask_high")
HEALTH_METRICS = (
    "cls",
    "teacher_entropy",
    "teacher_spread",
    "patch_entropy",
    "patch_spread",
    "feature_std",
    "feature_rank",
    "feature_duplicates",
    "mask_agreement",
    "teacher_gap",
)

HEALTHY = [
    (
        f"{method}, {masking}, {pooling}, seed {seed}",
        (f"method.name={method}", f"masking.name={masking}", f"pooling.name={pooling}", f"seed={seed}"),
    )
    for number, (method, masking, pooling) in enumerate(
        (m, k, p) for m in ("ibot", "dino") for k in MASKINGS for p in ("simpool", "cls")
    )
    for seed in [number % 2]
]


def temps(*keys: str):
    """Overrides that set temperatures to the fault's strength (healthy: .02)."""
    return lambda fault: tuple(f"teacher.{key}={fault:g}" for key in keys)


def part(section: str, name: str, *more: str):
    """Overrides that use a class of `launch.reproduce.faulty_runs` at the fault's strength."""
    return lambda fault: (f"{section}.name=launch.reproduce.faulty_runs:{name}", f"{section}.fault={fault}", *more)


# fault: (alarms, one of which must be raised and be the doctor's first finding; meaning of half strength; overrides)
UNHEALTHY = {
    "uniform targets": (
        ("uniform_targets", "loss_at_log_k"),
        "temperatures of .5 instead of 1 (healthy: .02)",
        temps("temp", "warmup_temp", "patch_temp", "warmup_patch_temp"),
    ),
    "uniform patch targets": (
        ("uniform_patch_targets",),
        "patch temperatures of .5 instead of 1 (healthy: .02)",
        temps("patch_temp", "warmup_patch_temp"),
    ),
    "one prototype for every image": (
        ("single_prototype",),
        "half of the center is subtracted",
        part("method", "LessCentered", "masking.name=none", LONGER),
    ),
    "one prototype for every patch": (
        ("single_patch_prototype",),
        "half of the patch center is subtracted",
        part("method", "PatchesLessCentered", "head.patch_prototypes=64", LONGER),
    ),
    "empty images": (
        ("constant_features", "duplicate_features"),
        "half of the images are one gray image",
        part("data", "Blank", "crops.jitter_prob=0", "crops.gray_prob=0"),
    ),
    # at half strength the targets collapse before the rank does
    "images of one gray level": (
        ("rank_collapse", "single_prototype"),
        "images half faded into their brightness",
        part("data", "Gray", "crops.jitter_prob=0", "crops.gray_prob=0", LONGER),
    ),
    "the same mask everywhere": (
        ("identical_masks",),
        "half of the masked patches are the same",
        part("masking", "SameMask", "masking.ratio=0.4", "masking.var=0", "masking.prob=1"),
    ),
    "a frozen teacher": (
        ("stale_teacher",),
        "an averaging window of 200 steps in a run of 130, instead of an infinite one",
        lambda fault: (f"teacher.momentum={1.0 if fault == 1 else 0.995}",),
    ),
    "a vanishing learning rate": (
        ("student_equals_teacher",),
        "a hundred-thousandth of the learning rate instead of 1e-10 of it",
        lambda fault: (f"optimizer.lr={2e-3 * (1e-10 if fault == 1 else 1e-5):g}", "optimizer.min_lr=0"),
    ),
    "NaN losses": (
        ("skipped",),
        "every other step",
        part("method", "Broken", "masking.name=none", "train.max_bad_steps=100000"),
    ),
    "an excessive learning rate": (
        ("rank_collapse", "knn"),
        "a tenth of it, still fifty times too high",
        lambda fault: (
            f"optimizer.lr={1.0 if fault == 1 else 0.1}",
            "evaluate.knn_every=13",
            "evaluate.knn_first=true",
            "evaluate.limit_bank=256",
        ),
    ),
}


def trained(folder: Path, *overrides: str, epochs: int) -> dict:
    """Train one run -> its end, alarms, the doctor's findings and the range of the health metrics."""
    recipe = read_recipe(RECIPE, f"train.epochs={epochs}", *overrides)
    start = time.process_time()
    try:
        ended = build.train(recipe, folder, quiet=True)["status"]
    except UserError as error:
        ended = str(error)
    lines = read_metrics(folder / "metrics.jsonl")
    steps, diagnosis = [line for line in lines if "loss" in line], diagnose(folder)
    late = [line for line in steps if line["step"] >= collapse_alarms.MIN_STEPS // 2]
    return {
        "ended": ended,
        "steps": steps[-1]["step"],
        "alarms": {line["kind"]: line["step"] for line in reversed(lines) if "alarm" in line},
        "doctor": diagnosis.kinds,
        "cls_of_ln_k": round(
            sum(line["cls"] or math.nan for line in steps[-8:]) / len(steps[-8:]) / math.log(recipe.head.prototypes), 3
        ),
        "range": {
            key: [round(min(values), 4), round(max(values), 4)]
            for key in HEALTH_METRICS
            if (values := [line[key] for line in late if line.get(key) is not None])
        },
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def last_change() -> str:
    """Return the commit that last changed the alarms."""
    here = Path(collapse_alarms.__file__)
    return subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", here.name],
        cwd=here.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
    ).stdout.strip()


def thresholds() -> str:
    """Return git's hash of the file of thresholds, which identifies the thresholds of a result."""
    return subprocess.run(
        ["git", "hash-object", collapse_alarms.__file__], capture_output=True, text=True, encoding="utf-8"
    ).stdout.strip()


def verdict(runs: dict) -> dict:
    """Counts over all runs."""
    unhealthy = runs["unhealthy"].values()
    return {
        "healthy_runs": len(runs["healthy"]),
        "healthy_without_alarm": sum(run["well"] for run in runs["healthy"].values()),
        "unhealthy_runs": len(unhealthy),
        "alarm_raised": sum(run["alarm_step"] is not None for run in unhealthy),
        "doctor_named_it": sum(run["named"] for run in unhealthy),
        "latest_alarm_at_step": max((run["alarm_step"] or 0 for run in unhealthy), default=None),
    }


def stored(path: Path) -> dict:
    """Read a result, its verdict computed again."""
    result = record.read(path)
    return {**result, "verdict": verdict(result)}


def information() -> dict:
    """Record and thresholds of a measurement."""
    constants = {name: value for name, value in vars(collapse_alarms).items() if name.isupper()}
    return {
        "record": record.describe(seed=[0, 1]),
        "thresholds_since": last_change(),
        "thresholds_file": thresholds(),
        "recipe": read_recipe(RECIPE).hash(),
        "thresholds": {name: value for name, value in constants.items() if isinstance(value, (int, float))},
    }


def measure(only: str = "", previous: dict | None = None, say=print) -> dict:
    """Run all trainings whose title contains `only`, except those in `previous` that have the same thresholds."""
    os.environ.setdefault("MASKWISE_MODULES", "launch.reproduce.faulty_runs")
    result = {**information(), "healthy": {}, "unhealthy": {}}
    if previous and previous["thresholds_file"] == thresholds():
        result["record"] = record.continued(previous["record"], result["record"])
        result |= {"healthy": dict(previous["healthy"]), "unhealthy": dict(previous["unhealthy"])}
    with tempfile.TemporaryDirectory() as folder:
        for number, (title, overrides) in enumerate(HEALTHY):
            if only in title and title not in result["healthy"]:
                run = trained(Path(folder) / f"healthy_{number}", *overrides, epochs=EPOCHS)
                run["well"] = not run["alarms"] and not run["doctor"] and run["cls_of_ln_k"] < LEARNED
                result["healthy"][title] = run
                say(json.dumps({title: run}))
        for number, title in enumerate(UNHEALTHY):
            for strength in (1.0, 0.5):
                name = title if strength == 1 else f"{title}, at half strength"
                if only in name and name not in result["unhealthy"]:
                    run = unhealthy_run(Path(folder) / f"unhealthy_{number}_{strength}", title, strength)
                    result["unhealthy"][name] = run
                    say(json.dumps({name: run}))
    result["verdict"] = verdict(result)
    return result


def unhealthy_run(folder: Path, title: str, strength: float) -> dict:
    """Train one run with a fault, and compare its alarms with the expected ones."""
    expected, half, overrides = UNHEALTHY[title]
    run = trained(folder, *overrides(strength), epochs=SHORT)
    raised = [run["alarms"][kind] for kind in expected if kind in run["alarms"]]
    run |= {
        "expected": expected,
        "alarm_step": min(raised) if raised else None,
        "named": bool(run["doctor"]) and run["doctor"][0] in expected,
    }
    return run if strength == 1 else {**run, "half_strength": half}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose title contains these words")
    parser.add_argument("--json", metavar="FILE", help="write there; its runs with the same thresholds are reused")
    given = parser.parse_args()
    file = Path(given.json) if given.json else None
    result = measure(given.only, stored(file) if file and file.exists() else None)
    if file:
        record.write(file, result)
    print(json.dumps(result["verdict"], indent=1))
