"""Sections of the page that compares runs: a table, recipe differences, curves in one chart each, last pictures."""

from __future__ import annotations

from collections.abc import Sequence

from maskwise.build.runs import differences
from maskwise.errors import UserError
from maskwise.process.progress import clock
from maskwise.report import charts, elements
from maskwise.report.contents import Contents
from maskwise.report.elements import Charts
from maskwise.report.sections import KINDS, training_seconds


def overview(runs: Sequence[Contents], names: Sequence[str]) -> str:
    """Return the runs as rows: state, progress, accuracy with baselines, cost."""
    rows, baselines = [], list(dict.fromkeys(name for run in runs for name in run.baselines))
    for run, name in zip(runs, names):
        found = run.run
        seconds = training_seconds(run)
        rows.append(
            (
                name,
                found.state,
                f"{found.step:,}" + (f" / {found.steps:,}" if found.steps else ""),
                "" if found.loss is None else f"{found.loss:.4g}",
                "" if found.knn is None else f"{found.knn:.1f}",
                *(f"{run.baselines[each]:.1f}" if each in run.baselines else "" for each in baselines),
                ", ".join(found.alarms),
                "" if run.images_seen is None else f"{run.images_seen:,}",
                "" if found.img_s is None else f"{found.img_s:.4g}",
                "" if seconds is None else clock(seconds),
                found.device or "",
                found.commit or "",
            )
        )
    titles = ("run", "state", "step", "loss", "k-NN", *baselines, "alarms", "images seen", "img/s", "time", "device")
    numbers = [i for i, title in enumerate(titles) if title not in ("run", "state", "alarms", "device")]
    table = elements.table((*titles, "commit"), rows, numbers, wide=True)
    return elements.section("runs", "Runs", table)


def recipes(runs: Sequence[Contents], names: Sequence[str]) -> str:
    """Return the values in which the recipes differ."""
    try:
        changes = differences(*(run.run for run in runs))
    except UserError as error:
        return elements.section("recipe", "Recipes", f"<p>{elements.escaped(error)}</p>")
    rows = [(key, *values) for key, values in changes.items()]
    if not rows:
        return elements.section("recipe", "Recipes", '<p class="soft">The recipes are equal.</p>')
    return elements.section("recipe", "Recipes", elements.table(("key", *names), rows, wide=len(names) > 2))


def curves(runs: Sequence[Contents], names: Sequence[str], drawing: Charts) -> list[str]:
    """Return the sections of curves, one per run in every chart."""
    first = charts.knn_chart(runs, names)
    loss = charts.topic_charts([charts.loss_topic(runs)], runs, names)
    groups = (
        (
            "evaluations",
            "k-NN and other evaluations",
            [*([first] if first else []), *charts.evaluation_charts(runs, names)],
        ),
        ("loss", "Loss", loss),
        ("collapse", "Entropy and collapse statistics", charts.topic_charts(charts.COLLAPSE, runs, names)),
        ("schedules", "Schedules", charts.topic_charts(charts.SCHEDULES, runs, names)),
        ("speed", "Speed", charts.topic_charts(charts.SPEED, runs, names)),
        ("others", "Other numbers", charts.topic_charts(charts.other_topics(runs), runs, names)),
    )
    return [
        elements.section(name, title, drawing.grid(drawn, "wide" if len(drawn) <= 2 else ""))
        for name, title, drawn in groups
    ]


def pictures(runs: Sequence[Contents], names: Sequence[str]) -> str:
    """Return the last picture of each kind of every run, side by side."""
    kinds = dict.fromkeys(kind for run in runs for kind in run.frames)
    parts = []
    for kind in kinds:
        found = [(name, run.frames[kind][-1]) for run, name in zip(runs, names) if kind in run.frames]
        figures = "".join(elements.picture(f"{name}, {elements.step_text(frame)}", frame) for name, frame in found)
        title = KINDS.get(kind, kind.replace("_", " "))
        parts.append(f'<div class="film"><h3>{elements.escaped(title)}</h3><div class="frames">{figures}</div></div>')
    return elements.section("pictures", "Attention and masks, last pictures", *parts)
