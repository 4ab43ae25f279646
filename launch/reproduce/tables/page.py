"""Markdown page of a table."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from launch.reproduce.tables.measures import NUMBERS
from launch.reproduce.tables.plan import Setting
from launch.reproduce.tables.results import power_text
from launch.reproduce.tables.runs import baseline, total_seconds
from maskwise.bench.record import listed

ABOUT = (
    "Mean (standard deviation) over seeds. Differences are paired by seed: 95 % intervals of Student's t and of the "
    "bootstrap over seeds, and of the bootstrap over test images within these seeds, which says nothing of other "
    "seeds; p is adjusted by Holm over the differences of a setting. A difference counts if both intervals over seeds "
    "exclude 0, p < .05, and it is at least half a point."
)
BASELINES = {
    "untrained_pooled": "untrained network",
    "pixels": "raw pixels",
    "whitened_pixels": "whitened pixels",
    "chance": "chance",
}


def page(result: dict, settings: Mapping[str, Setting], title: str) -> str:
    """Return the page of a result."""
    about = result["record"]
    commits = ", ".join(str(commit)[:7] for commit in listed(about["commit"]))
    lines = [
        f"# {title} ({result['budget']})",
        "",
        f"`{about['command']}`, {about['date']}, commit {commits}, {about['hardware']}, torch {about['torch']}; "
        f"training of all runs: {total_seconds(result['runs']) / 3600:.1f} hours.",
        "",
        ABOUT,
    ]
    for name, setting in settings.items():
        part = result["settings"][name]
        lines += ["", f"## {part['title']}", "", *setting_lines(result, name, setting, part)]
    return "\n".join(lines) + "\n"


def setting_lines(result: dict, name: str, setting: Setting, part: dict) -> list[str]:
    """Return the lines of a setting: its rows, what is held equal, its power, its differences."""
    measured = {row: numbers for row, numbers in part["rows"].items() if numbers}
    runs = {key: run for key, run in result["runs"].items() if key.startswith(f"{name}/")}
    if not measured:
        return ["Not yet measured."]
    lines = rows_table(setting, measured, runs)
    first = next(iter(runs.values()))
    lines += ["", f"Every run: {first['steps']} steps of {first['batch_size']} images with equal crops."]
    if baselines := baselines_text(runs):
        lines += ["", f"k-NN without training, mean over runs: {baselines}."]
    if part["unequal"]:
        lines += ["", "Not equal in all rows: " + ", ".join(f"`{key}`" for key in part["unequal"]) + "."]
    if part["ended_at_gate"]:
        row = setting.rows[setting.gate].label if setting.gate else ""
        lines += ["", f"Ended after the first run: {row} did not pass its untrained network by two points of k-NN."]
    if part["power"]:
        lines += ["", power_text("Power", part["power"]) + "."]
    if part["contrasts"]:
        lines += ["", *contrasts_table(setting, part["contrasts"])]
    return lines


def baselines_text(runs: Mapping[str, dict]) -> str:
    """Return the mean k-NN of each baseline as text, empty where no run measured one."""
    parts = []
    for row, title in BASELINES.items():
        measured = [value for run in runs.values() if (value := baseline(run, row)) is not None]
        parts += [f"{title} {fmean(measured):.1f}"] if measured else []
    return ", ".join(parts)


def rows_table(setting: Setting, measured: Mapping[str, dict], runs: Mapping[str, dict]) -> list[str]:
    """Return the table of rows: numbers, the published metric, operations of an image's training step, minutes."""
    numbers = [number for number in NUMBERS if any(number in found for found in measured.values())]
    published = any(setting.metric in setting.rows[row].published for row in measured)
    head = ["", *(NUMBERS[number].title for number in numbers), *["published, ImageNet"] * published]
    head += ["GFLOP an image", "minutes", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row, found in measured.items():
        own = [run for key, run in runs.items() if key.split("/")[1] == row]
        cells = [setting.rows[row].label, *(cell(found.get(number)) for number in numbers)]
        cells += [str(setting.rows[row].published.get(setting.metric, ""))] * published
        pace = own[0]["pace"]
        cells.append(f"{pace['flops_per_step'] / own[0]['batch_size'] / 1e9:.2f}" if pace else "")
        cells += [f"{fmean(run['seconds_of_training'] for run in own) / 60:.1f}", str(len(own))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cell(found: dict | None) -> str:
    """Return mean and standard deviation as text."""
    if found is None:
        return ""
    return f"{found['mean']:.1f}" + ("" if found["spread"] is None else f" ({found['spread']:.1f})")


def contrasts_table(setting: Setting, contrasts: list[dict]) -> list[str]:
    """Return the table of differences."""
    title = NUMBERS[setting.metric].title
    lines = [
        f"| {title}, difference | points | over seeds, t | over seeds, bootstrap | over images | p | published | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for one in contrasts:
        names = " - ".join(setting.rows[one[side]].label for side in ("row", "reference"))
        published = "" if one["published"] is None else f"{one['published']:+.1f} ({one['source']})"
        p = p_text(one["p_holm"])
        intervals = [
            interval(one.get(key)) for key in ("over_seeds_t", "over_seeds_bootstrap", "over_images_bootstrap")
        ]
        lines.append("| " + " | ".join([names, f"{one['mean']:+.2f}", *intervals, p, published, one["verdict"]]) + " |")
    return lines


def interval(bounds: list | None) -> str:
    """Return an interval as text, nothing for one that is not defined."""
    return "" if bounds is None or None in bounds else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"


def p_text(p: float | None) -> str:
    """Return a p-value as text."""
    if p is None:
        return ""
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")
