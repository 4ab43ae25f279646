"""Charts of a table: differences with intervals, and k-NN over the steps of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from launch.reproduce.tables.measures import NUMBERS
from launch.reproduce.tables.plan import Setting

WIDTH, HEIGHT, DPI = 9.0, 3.9, 130  # inches; the height is a row's


def mean_curve(runs: Mapping[str, dict], prefix: str) -> list[tuple[int, float, float, float]]:
    """Return (step, mean, lowest, highest) over the seeds of a row, at the steps that all of its runs report."""
    curves = [dict(map(tuple, run["curve"])) for key, run in runs.items() if key.startswith(prefix)]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    found = [(step, [curve[step] for curve in curves]) for step in steps]
    return [(step, fmean(values), min(values), max(values)) for step, values in found]


def write_charts(result: dict, settings: Mapping[str, Setting], file: Path) -> None:
    """Write one picture: a row of two charts for each setting that has runs; nothing before any."""
    from matplotlib.figure import Figure

    shown = {name: setting for name, setting in settings.items() if any(result["settings"][name]["rows"].values())}
    if not shown:
        return
    figure = Figure(figsize=(WIDTH, HEIGHT * len(shown)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False)
    rows = dict.fromkeys(row for setting in shown.values() for row in setting.rows)
    colors = {row: f"C{number}" for number, row in enumerate(rows)}  # of a row the same in all panels
    for (name, setting), (left, right) in zip(shown.items(), panels):
        draw_curves(left, result["runs"], name, setting, colors)
        draw_contrasts(right, result["settings"][name]["contrasts"], setting)
    temporary = file.with_name(f".{file.name}")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(file)


def draw_curves(axes, runs: Mapping[str, dict], name: str, setting: Setting, colors: Mapping[str, str]) -> None:
    """Draw the mean over seeds of each row's reports, shaded from the lowest to the highest seed."""
    for row, made in setting.rows.items():
        points = mean_curve(runs, f"{name}/{row}/")
        if points:
            steps, means, lowest, highest = zip(*points)
            axes.plot(steps, means, color=colors[row], label=made.label, marker="o", markersize=3)
            axes.fill_between(steps, lowest, highest, color=colors[row], alpha=0.15, linewidth=0)
    axes.set_title(setting.title.replace("`", ""), fontsize=9, loc="left", wrap=True)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{NUMBERS[setting.metric].title} during training, %")
    axes.grid(True, alpha=0.4)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False)


def draw_contrasts(axes, contrasts: list[dict], setting: Setting) -> None:
    """Draw each difference: seeds as dots, mean as a bar, the interval of t as a line, the published one as a cross."""
    names = []
    for place, one in enumerate(contrasts):
        names.append(" - ".join(setting.rows[one[side]].label for side in ("row", "reference")))
        if None not in one["over_seeds_t"]:
            axes.hlines(place, *one["over_seeds_t"], color="0.6", linewidth=3)
        axes.plot(one["differences"], [place] * len(one["differences"]), "o", color="C0", markersize=4)
        axes.vlines(one["mean"], place - 0.3, place + 0.3, color="C1", linewidth=2)
        if one["published"] is not None:
            axes.plot(
                one["published"], place, "x", color="C3", label="published" if "published" not in used(axes) else ""
            )
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(f"difference in {NUMBERS[setting.metric].title}, points")
    axes.grid(True, axis="x", alpha=0.4)
    if used(axes):
        axes.legend(fontsize=7)


def used(axes) -> list[str]:
    """Return the labels of a legend so far."""
    return axes.get_legend_handles_labels()[1]
