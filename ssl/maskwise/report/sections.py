"""Sections of the page of one run: summary, alarms, curves, pictures, cost, recipe."""

from __future__ import annotations

from statistics import median

from maskwise.doctor.diagnose import network_text
from maskwise.engine.run_curves import LOSSES, is_number, report_curve
from maskwise.evaluation.suite.run_report import tables
from maskwise.process.progress import clock
from maskwise.report import charts, elements
from maskwise.report.contents import Contents
from maskwise.report.elements import Charts

KINDS = {  # of pictures
    "attention_and_masks": "Attention of the teacher and masks",
    "sheet": "Attention before and after training, and masks",
}


def summary(run: Contents) -> str:
    """Return the tiles: progress, k-NN, loss, speed, alarms."""
    found, tiles = run.run, []
    share = found.step / found.steps if found.steps else None
    epochs = (
        f"epoch {found.epoch:g}" + (f" of {found.epochs}" if found.epochs else "") if found.epoch is not None else ""
    )
    tiles.append(
        elements.tile("step", f"{found.step:,}" + (f" / {found.steps:,}" if found.steps else ""), epochs, share)
    )
    accuracy = report_curve(found.records, "knn", "top1")
    if accuracy:
        step, value = accuracy[-1]
        tiles.append(elements.tile("k-NN top-1", f"{value:.1f} %", f"{against(value, run.baselines)}, step {step:,}"))
    losses = [(record["step"], record["loss"]) for record in run.trained if is_number(record["loss"])]
    if losses:
        more = f"{losses[0][1]:.4g} at step {losses[0][0]:,}"
        tiles.append(elements.tile("loss", f"{losses[-1][1]:.4g}", more))
    if found.img_s:
        tiles.append(elements.tile("images per second", f"{found.img_s:.4g}", waiting(run)))
    seconds = training_seconds(run)
    if seconds is not None:
        tiles.append(elements.tile("training time", clock(seconds), remaining(run, seconds)))
    count = len(run.raised) + len(
        [alarm for alarm in run.lasting if alarm.kind not in {kind for _, kind, _ in run.raised}]
    )
    kind = "alarm" if count else ""
    more = f"{len(run.lasting)} at the last step" if count else "raised during training"
    tiles.append(elements.tile("alarms", str(count or "none"), more, kind=kind))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def against(value: float, baselines: dict[str, float]) -> str:
    """Return by how much an accuracy is above or below the best baseline."""
    known = {name: other for name, other in baselines.items() if name != "chance"}
    if not known:
        return "no baselines measured"
    name = max(known, key=lambda each: known[each])
    return f"{value - known[name]:+.1f} against {name}".replace("-", "\N{MINUS SIGN}", 1)


def waiting(run: Contents) -> str:
    """Return the share of the time that the last steps waited for data."""
    shares = [record["data_wait"] for record in run.trained[-10:] if is_number(record.get("data_wait"))]
    return f"{100 * median(shares):.0f} % of the time waiting for data" if shares else ""


def training_seconds(run: Contents) -> float | None:
    """Return the training time of all starts, without evaluations; None where it is not logged."""
    logged = [record["seconds"] for record in run.trained if is_number(record.get("seconds"))]
    return logged[-1] if logged else None


def remaining(run: Contents, seconds: float) -> str:
    """Return the expected time to the last step of a run in progress."""
    found = run.run
    if found.state != "running" or not found.steps or not found.step:
        return ""
    return f"about {clock(seconds / found.step * (found.steps - found.step))} left"


def alarms(run: Contents) -> str:
    """Return the alarms with their steps, those that hold at the last step marked; "" for none."""
    lasting = {alarm.kind: alarm.text for alarm in run.lasting}
    rows = [
        (f"{step:,}", kind, lasting.get(kind, text), "yes" if kind in lasting else "no")
        for step, kind, text in run.raised
    ]
    known = {kind for _, kind, _ in run.raised}
    rows += [("", kind, text, "yes") for kind, text in lasting.items() if kind not in known]
    table = elements.table(("step", "alarm", "observation and remedy", "at the last step"), rows, (0,))
    return elements.section("alarms", "Alarms", table if rows else "")


def accuracy(run: Contents, drawing: Charts) -> str:
    """Return k-NN over time with its baselines, as a chart and a table, and what `--measure` has found."""
    drawn = charts.knn_chart([run], [run.run.path])
    points = report_curve(run.run.records, "knn", "top1")
    values = {"teacher, last": points[-1][1]} if points else {}
    if len(points) > 1:
        values = {**values, "teacher, best": max(value for _, value in points)}
        if points[0][0] == 0:
            values["teacher, before the first step"] = points[0][1]
    values |= run.baselines
    rows = [(name, f"{value:.1f}") for name, value in sorted(values.items(), key=lambda row: -row[1])]
    table = elements.table(("features", "top-1 (%)"), rows, (1,)) if rows else ""
    figure = drawing.figure(drawn) if drawn else ""
    both = f'<div class="charts wide">{figure}<div>{table}</div></div>' if figure and table else figure or table
    measured = "".join(elements.code(text) for text in tables(run.measured)) if run.measured else ""
    others = drawing.grid(charts.evaluation_charts([run], [run.run.path]))
    return elements.section("evaluations", "k-NN and other evaluations", both, others, measured)


def curves(run: Contents, drawing: Charts) -> list[str]:
    """Return the sections of curves: loss, collapse statistics, schedules, speed."""
    found = [run]
    groups = (
        ("loss", "Loss", [charts.loss_topic(found)], "wide"),
        ("collapse", "Entropy and collapse statistics", charts.COLLAPSE, ""),
        ("schedules", "Schedules", charts.SCHEDULES, ""),
        ("speed", "Speed", charts.SPEED, ""),
        ("others", "Other numbers", charts.other_topics(found), ""),
    )
    sections = []
    for name, title, topics, kind in groups:
        if name == "loss":
            topics = [*topics, *(charts.Topic(f"L{LOSSES[key][1:]}", {key: key}) for key in parts(run))]
        drawn = charts.topic_charts(topics, found, [run.run.path])
        sections.append(elements.section(name, title, drawing.grid(drawn, kind if len(drawn) <= 2 else "")))
    return sections


def parts(run: Contents) -> list[str]:
    """Return the parts of a loss that has several, for charts with a scale of their own."""
    keys = charts.loss_topic([run]).keys
    return [key for key in LOSSES if key != "loss" and key in keys]


def pictures(run: Contents) -> str:
    """Return the pictures of the run over time."""
    films = [elements.film(KINDS.get(kind, kind.replace("_", " ")), frames) for kind, frames in run.frames.items()]
    return elements.section("pictures", "Attention and masks", *films)


def cost(run: Contents) -> str:
    """Return what the run has cost: time, images, memory where it is recorded."""
    found, seconds = run.run, training_seconds(run)
    last = run.trained[-1] if run.trained else {}
    values = {
        "training time": "" if seconds is None else f"{clock(seconds)}, evaluations excluded",
        "times ranks": f"{found.hours:.2f} h on {found.ranks} ranks" if found.hours and (found.ranks or 1) > 1 else "",
        "CPU time": clock(last["cpu_seconds"]) if is_number(last.get("cpu_seconds")) else "",
        "memory": f"{last['memory_gib']:.2f} GiB at its peak" if is_number(last.get("memory_gib")) else "",
        "evaluations": clock(run.evaluation) if run.evaluation else "",
        "images seen": "" if run.images_seen is None else f"{run.images_seen:,}",
        "images of the data set": f"{run.about['images']:,}" if isinstance(run.about.get("images"), int) else "",
        "images per second": "" if found.img_s is None else f"{found.img_s:.4g}, median of the last ten records",
        "hardware": hardware(run),
        "precision": str(run.about.get("precision", "")),
    }
    return elements.section("cost", "Cost and hardware", elements.facts(values))


def hardware(run: Contents) -> str:
    """Return device, ranks and threads of the last start."""
    found, start = run.run, (run.about.get("starts") or [run.about])[-1]
    words = [found.device or "", f"{found.ranks} rank{'s' * (found.ranks != 1)}" if found.ranks else ""]
    words.append(f"{start['threads']} thread{'s' * (start['threads'] != 1)}" if "threads" in start else "")
    return ", ".join(filter(None, words))


def recipe(run: Contents) -> str:
    """Return the recipe: what differs from its parent, every value, and where the run comes from."""
    found, about = run.run, run.about
    changes = [(key, before, after) for key, (before, after) in found.changes.items()]
    title = f"changed from {found.parent}" if found.parent else "changed"
    differing = elements.table(("key", "parent", "here"), changes) if changes else ""
    whole = elements.details("every value", elements.code(found.recipe.resolved_yaml())) if found.recipe else ""
    versions = about.get("versions") if isinstance(about.get("versions"), dict) else {}
    origin = elements.facts(
        {
            "method": network_text(found.recipe) if found.recipe else "",
            "parent": found.parent or "",
            "commit": f"{found.commit} (with local changes)"
            if (found.commit or "").endswith("+")
            else found.commit or "",
            "started": found.started or "",
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "command": str(about.get("command", "")),
            "folder": found.path,
        }
    )
    starts = [start for start in about.get("starts", []) if isinstance(start, dict)]
    rows = [[str(start.get(key, "")) for key in ("step", "started", "device", "ranks", "commit")] for start in starts]
    again = elements.table(("from step", "started", "device", "ranks", "commit"), rows) if len(rows) > 1 else ""
    heading = f"<h3>{elements.escaped(title)}</h3>" if differing else ""
    return elements.section("recipe", "Recipe and origin", origin, heading, differing, again, whole)
