"""Points of `maskwise bench learn` as a table, a chart and lines."""

from __future__ import annotations

import numpy as np

from maskwise.bench.table import table

OURS, THEIRS = "maskwise", "lightly"


def point_in_words(point: dict) -> str:
    """Describe the last evaluation in one line."""
    return (
        f"{point['side']} step {point['step']}: k-NN {point['teacher']:.1f} % (student {point['student']:.1f} %) after "
        f"{point['pflop']:.3g} PFLOP, {point['cpu_seconds']:.0f} CPU s"
    )


def chart(points: list[dict]) -> np.ndarray:
    """Draw the accuracies over operations and over CPU time, one above the other -> uint8 [H, W, 3]."""
    from maskwise.imaging.charts import line_chart

    axes = (("pflop", "PFLOP"), ("cpu_seconds", "CPU seconds"))
    return np.concatenate(
        [
            line_chart(
                {
                    f"{side} {network}": [(point[key], point[network]) for point in points if point["side"] == side]
                    for side in (OURS, THEIRS)
                    for network in ("teacher", "student")
                },
                x_name=name,
                y_name="k-NN top-1, %",
            )
            for key, name in axes
        ]
    )


def text(result: dict) -> str:
    """Format the points as a table, and state what each side reached."""
    heading = ["", "step", "images", "PFLOP", "CPU s", "teacher %", "student %"]
    rows = [
        [point[key] for key in ("side", "step", "images", "pflop", "cpu_seconds", "teacher", "student")]
        for point in result["points"]
    ]
    lines = [table([heading, *rows]), ""]
    for key, name in (("pflop", "PFLOP"), ("cpu_seconds", "CPU s")):
        reached = reach(result["points"], key)
        if reached is not None:
            lines.append(f"{name} to lightly's best k-NN: maskwise {reached[0]:.3g}, lightly {reached[1]:.3g}")
    return "\n".join(lines)


def reach(points: list[dict], key: str) -> tuple[float, float] | None:
    """Return what both sides spent until lightly's best accuracy of any network, None where ours did not reach it."""
    best = {
        side: [(max(point["teacher"], point["student"]), point[key]) for point in points if point["side"] == side]
        for side in (OURS, THEIRS)
    }
    highest = max(accuracy for accuracy, _ in best[THEIRS])
    ours = [spent for accuracy, spent in best[OURS] if accuracy >= highest]
    return (ours[0], next(spent for accuracy, spent in best[THEIRS] if accuracy == highest)) if ours else None
