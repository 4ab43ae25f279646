"""Results of a table: its finished runs with their evaluations, means over seeds, contrasts with intervals, power."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from launch.reproduce.tables import statistics
from launch.reproduce.tables.measures import NUMBERS, measured, unpacked
from launch.reproduce.tables.pace import read_pace
from launch.reproduce.tables.plan import Contrast, Job, Setting, pairs, unequal
from launch.reproduce.tables.runs import finished, learned

POWER_SEEDS = 2
NOT_SIGNIFICANT, TOO_SMALL, UNPREDICTED = "not significant", "below half a point", "differs, none predicted"
AS_PREDICTED, CONTRADICTS, ONE_SEED = "as predicted", "contradicts the paper", "one seed"

Runs = Mapping[str, dict]


def collected(planned: Mapping[str, Sequence[Job]], settings: Mapping[str, Setting], out: Path) -> dict[str, dict]:
    """Return the complete runs by key: record, curve, pace of their row, and evaluations."""
    runs = {}
    for name, jobs in planned.items():
        for job in jobs:
            record = finished(job, out)
            if record is not None:
                evaluations = measured(job, out, settings[name].measures)
                runs[job.key] = {**record, "pace": read_pace(job, out), "measures": evaluations}
    return runs


def value(run: dict, number: str) -> float | None:
    """Return a number of a run, None where it was not measured."""
    about = NUMBERS[number]
    return run["measures"].get(about.measure, {}).get("numbers", {}).get(about.name)


def values(runs: Runs, name: str, row: str, seeds: Sequence[int], number: str) -> dict[int, float]:
    """Return a row's number by seed, for the seeds that have it."""
    found = {seed: value(runs[key], number) for seed in seeds if (key := f"{name}/{row}/{seed}") in runs}
    return {seed: number for seed, number in found.items() if number is not None}


def summary(runs: Runs, name: str, setting: Setting) -> dict[str, dict[str, dict]]:
    """Return {row: {number: {"values", "mean", "spread"}}} of a setting."""
    rows: dict[str, dict[str, dict]] = {row: {} for row in setting.rows}
    for row, found in rows.items():
        for number in NUMBERS:
            if by_seed := values(runs, name, row, setting.seeds, number):
                here = list(by_seed.values())
                found[number] = {"values": here, "mean": fmean(here), "spread": finite(statistics.spread(here))}
    return rows


def contrast(runs: Runs, name: str, setting: Setting, pair: Contrast) -> dict | None:
    """Return a contrast's differences by seed with intervals over seeds and images, None without a common seed."""
    one, other = (values(runs, name, row, setting.seeds, setting.metric) for row in (pair.row, pair.reference))
    seeds = [seed for seed in setting.seeds if seed in one and seed in other]
    if not seeds:
        return None
    differences = [one[seed] - other[seed] for seed in seeds]
    found = {
        "row": pair.row,
        "reference": pair.reference,
        "metric": setting.metric,
        "seeds": seeds,
        "differences": differences,
        "mean": fmean(differences),
        "over_seeds_bootstrap": list(statistics.seed_bootstrap(differences)),
        "over_seeds_t": [finite(bound) for bound in statistics.t_interval(differences)],
        "p": finite(statistics.paired_p(differences)),
        "published": pair.published,
        "source": pair.source,
        "predicted_sign": pair.sign,
    }
    right = [[right_of(runs, name, row, seed) for seed in seeds] for row in (pair.row, pair.reference)]
    if setting.metric == "knn" and all(part is not None for part in (*right[0], *right[1])):
        found["over_images_bootstrap"] = list(statistics.image_bootstrap(*right, same_images=setting.same_images))
    return found


def right_of(runs: Runs, name: str, row: str, seed: int):
    """Return whether each test image was right by k-NN, bool [n]; None where it was not measured."""
    stored = runs[f"{name}/{row}/{seed}"]["measures"].get("knn", {}).get("right")
    return None if stored is None else unpacked(stored)


def contrasts(runs: Runs, name: str, setting: Setting) -> list[dict]:
    """Return the contrasts of a setting, with p-values adjusted over all of them and a verdict each."""
    made = [contrast(runs, name, setting, pair) for pair in setting.contrasts]
    found = [one for one in made if one is not None]
    adjusted = statistics.holm([math.nan if one["p"] is None else one["p"] for one in found])
    for one, p in zip(found, adjusted):
        one["p_holm"] = finite(p)
        one["verdict"] = verdict(one)
    return found


def verdict(one: dict) -> str:
    """Return what a contrast says: it counts if both intervals over seeds exclude 0, p (Holm) < .05, and |d| >= .5."""
    if len(one["seeds"]) < 2:
        return ONE_SEED
    intervals = (one["over_seeds_bootstrap"], one["over_seeds_t"])
    if any(low <= 0 <= high for low, high in intervals) or one["p_holm"] >= statistics.ALPHA:
        return NOT_SIGNIFICANT
    if abs(one["mean"]) < statistics.EFFECT:
        return TOO_SMALL
    if one["predicted_sign"] == 0:
        return UNPREDICTED
    return AS_PREDICTED if one["mean"] * one["predicted_sign"] > 0 else CONTRADICTS


def power(runs: Runs, name: str, setting: Setting) -> dict | None:
    """Return how many seeds half a point needs, from the first two seeds of all contrasts; None before these."""
    two = setting.seeds[:POWER_SEEDS]
    differences = {}
    for pair, text in zip(setting.contrasts, pairs(setting.contrasts)):
        one, other = (values(runs, name, row, two, setting.metric) for row in (pair.row, pair.reference))
        if len(two) == POWER_SEEDS and all(seed in one and seed in other for seed in two):
            differences[text] = [one[seed] - other[seed] for seed in two]
    if not differences:
        return None
    deviation, planned = statistics.pooled_deviation(list(differences.values())), len(setting.seeds)
    return {
        "seeds": list(two),
        "differences": differences,
        "deviation": deviation,
        "effect": statistics.EFFECT,
        "seeds_needed": statistics.seeds_needed(deviation),
        "seeds_planned": planned,
        "smallest_effect": statistics.smallest_effect(deviation, planned),
    }


def power_text(title: str, found: dict) -> str:
    """Return the power of a setting in a sentence."""
    return (
        f"{title}: paired differences have a standard deviation of {found['deviation']:.2f} points over two seeds, "
        f"pooled over {len(found['differences'])} contrasts; half a point needs {found['seeds_needed']} seeds, and "
        f"{found['seeds_planned']} are planned, which see {found['smallest_effect']:.2f} points "
        f"(alpha {statistics.ALPHA}, power {statistics.POWER})"
    )


def ended_at_gate(runs: Runs, name: str, setting: Setting) -> bool:
    """Return whether a setting's first run did not pass its untrained network, so that its other runs are left out."""
    first = runs.get(f"{name}/{setting.gate}/{setting.seeds[0]}")
    return setting.gate is not None and first is not None and not learned(first)


def table(planned: Mapping[str, Sequence[Job]], settings: Mapping[str, Setting], out: Path, about: dict) -> dict:
    """Return the whole result: about (record, story, budget), runs, and of each setting rows, contrasts and power."""
    runs = collected(planned, settings, out)
    parts = {}
    for name, setting in settings.items():
        recipes = {job.row: job.read() for job in planned[name] if job.seed == setting.seeds[0]}
        parts[name] = {
            "title": setting.title,
            "metric": setting.metric,
            "ended_at_gate": ended_at_gate(runs, name, setting),
            "unequal": {key: {row: str(v) for row, v in rows.items()} for key, rows in unequal(recipes).items()},
            "rows": summary(runs, name, setting),
            "contrasts": contrasts(runs, name, setting),
            "power": power(runs, name, setting),
        }
    return {**about, "settings": parts, "runs": runs}


def finite(number: float) -> float | None:
    """Return a number, None for one that JSON does not have."""
    return number if math.isfinite(number) else None
