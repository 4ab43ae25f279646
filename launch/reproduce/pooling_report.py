"""Report of the pooling table: means and spreads over seeds as Markdown and as a chart."""

from __future__ import annotations

import statistics
from pathlib import Path

from launch.reproduce.pooling_experiments import PROFILES, Experiment


def table_text(results: dict, profile: str) -> str:
    """Return tables of means and spreads over seeds as Markdown."""
    parts = [
        f"# Poolings side by side ({profile})",
        "",
        f"`{results['record']['command']}`, {results['record']['date']}, commit {results['record']['commit']}, "
        f"{results.get('minutes', 0)} minutes in all, runs in parallel: {results.get('processes', 1)}. "
        "Mean and spread (half the range) over seeds; seconds of one run.",
    ]
    for name, experiment in PROFILES[profile].items():
        if rows := samples(results, name, experiment):
            parts += ["", f"## {experiment.title}", "", *experiment_table(results, name, experiment, rows)]
    return "\n".join(parts) + "\n"


def experiment_table(results: dict, name: str, experiment: Experiment, rows: dict[str, list[float]]) -> list[str]:
    """Return the lines of one experiment's table, the highest mean first."""
    paper, published = experiment.paper or ("", {})
    number = "k-NN (k = 20) of the teacher" if experiment.report == "knn" else "top-1"
    part = experiment.part
    titles = [part, f"{number}, %", "spread", "seeds", f"weights of the {part}", "seconds"]
    titles += [f"paper, {paper}"] if paper else []
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row, values in sorted(rows.items(), key=lambda item: -statistics.mean(item[1])):
        keys = [f"{name}/{row}/{seed}" for seed in experiment.seeds]
        runs = [results["runs"][key] for key in keys if key in results["runs"]]
        cells = [
            f"`{row}`",
            f"{statistics.mean(values):.2f}",
            f"{(max(values) - min(values)) / 2:.2f}",
            str(len(values)),
            f"{runs[0][f'{part}_parameters']:,}",
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        ]
        cells += [str(published.get(row, "-"))] if paper else []
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def samples(results: dict, name: str, experiment: Experiment) -> dict[str, list[float]]:
    """Return the numbers of every row of an experiment, one per seed."""
    runs = results["runs"]
    rows = {}
    for row in experiment.rows:
        keys = [key for seed in experiment.seeds if (key := f"{name}/{row}/{seed}") in runs]
        rows[row] = [runs[key]["numbers"][experiment.number] for key in keys]
    return {row: values for row, values in rows.items() if values}


def report(results: dict, out: Path, profile: str) -> None:
    """Write table (.md) and chart (.png) next to the JSON file `out`."""
    import numpy as np

    from maskwise.imaging.charts import interval_chart
    from maskwise.imaging.drawing import write_png

    out.with_suffix(".md").write_text(table_text(results, profile), encoding="utf-8")
    rows = {experiment.title: samples(results, name, experiment) for name, experiment in PROFILES[profile].items()}
    charts = [interval_chart(values, title) for title, values in rows.items() if values]
    if charts:
        width = max(chart.shape[1] for chart in charts)
        padded = [np.pad(chart, ((0, 0), (0, width - chart.shape[1]), (0, 0)), constant_values=255) for chart in charts]
        write_png(out.with_suffix(".png"), np.concatenate(padded))
