"""Elements of the page as HTML: tables, tiles, charts and pictures; every text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from maskwise.imaging.svg_charts import COLORS, line_svg
from maskwise.imaging.web_page import data_address, escaped
from maskwise.report.charts import Drawn
from maskwise.report.pictures import Frame

DASH_NAMES = ("", " second", " third")  # classes of the legend, as DASHES of the chart


class Charts:
    """Draw charts, and collect what the script of the page needs of them in `data`.

    compared: whether curves are those of several runs, so that a single one is named, too.
    """

    def __init__(self, compared: bool = False) -> None:
        self.data: list[dict] = []
        self.compared = compared

    def figure(self, drawn: Drawn, unit: str = "step") -> str:
        """Return a chart with its title and legend; unit: of the horizontal axis."""
        svg, data = line_svg(drawn.chart)
        self.data.append({**data, "unit": unit})
        entries = [
            (f"{series['name']}", series["color"], DASH_NAMES[number // COLORS % len(DASH_NAMES)].strip())
            for number, series in enumerate(data["series"])
        ]
        entries += [(f"{level['name']} {level['value']:.3g}", level["color"], "level") for level in data["levels"]]
        if len(entries) == 1 and not self.compared:
            entries = []  # the title names it
        legend = "".join(
            f'<span class="{kind}" style="--c: var(--c{color})">{escaped(name)}</span>' for name, color, kind in entries
        )
        marks = '<span class="level alarm" style="--c: var(--alarm)">alarm</span>' if data["marks"] else ""
        remark = f'<div class="remark">{escaped(drawn.remark)}</div>' if drawn.remark else ""
        label = escaped(f"{drawn.title}. {spoken(data['series'])}")
        return (
            f'<figure data-chart="{len(self.data) - 1}" tabindex="0" role="img" aria-label="{label}">'
            f'<h3>{escaped(drawn.title)}</h3><div class="legend">{legend}{marks}</div>{svg}{remark}</figure>'
        )

    def grid(self, drawn: Iterable[Drawn], kind: str = "") -> str:
        """Return charts side by side; "" for none."""
        figures = "\n".join(self.figure(each) for each in drawn)
        return f'<div class="charts {kind}">{figures}</div>' if figures else ""


def spoken(series: Sequence[dict]) -> str:
    """Return the ends of curves in words."""
    texts = []
    for each in series:
        (first, start), (last, end) = each["points"][0], each["points"][-1]
        texts.append(f"{each['name']}: {start:.4g} at step {first:g}, {end:.4g} at step {last:g}")
    return "; ".join(texts)


def section(name: str, title: str, *parts: str) -> str:
    """Return a section with a title; "" where all parts are empty."""
    content = "\n".join(filter(None, parts))
    return f'<section id="{name}"><h2>{escaped(title)}</h2>\n{content}\n</section>' if content else ""


def tile(name: str, value: str, more: str = "", share: float | None = None, kind: str = "") -> str:
    """Return a number with its name, a line on it, and a bar where it is a share of something."""
    bar = "" if share is None else f'<div class="bar"><div style="width: {100 * min(1.0, share):.1f}%"></div></div>'
    return (
        f'<div class="tile"><div class="name">{escaped(name)}</div><div class="value {kind}">{escaped(value)}</div>'
        f'<div class="more">{escaped(more)}</div>{bar}</div>'
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), wide: bool = False) -> str:
    """Return a table; numbers: columns aligned to the right; wide: scrolls sideways instead of breaking words."""
    kind = lambda column: ' class="number"' if column in numbers else ""  # noqa: E731
    head = "".join(f"<th{kind(i)}>{escaped(title)}</th>" for i, title in enumerate(titles))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{escaped(cell)}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    outer = "scroll" if wide else "fit"
    kind_of_table = ' class="keys"' if titles[0] == "key" else ""
    return (
        f'<div class="{outer}"><table{kind_of_table}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def facts(values: Mapping[str, str]) -> str:
    """Return names and values as a table without a head; empty values are left out."""
    rows = "".join(
        f"<tr><th>{escaped(name)}</th><td>{escaped(text)}</td></tr>" for name, text in values.items() if text
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def code(text: str) -> str:
    """Return a text of several lines as it is."""
    lines = "\n".join(escaped(line) for line in text.split("\n"))
    return f"<pre>{lines}</pre>"


def details(summary: str, content: str) -> str:
    """Return a part that a click opens."""
    return f"<details><summary>{escaped(summary)}</summary>{content}</details>"


def listed(lines: Iterable[str], kind: str = "notes") -> str:
    """Return lines as a list; "" for none."""
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def film(title: str, frames: Sequence[Frame]) -> str:
    """Return pictures of one kind: the first, and beside it the one that a slider chooses; all without the script."""
    figures = "".join(picture(step_text(frame), frame) for frame in frames)
    slider = ""
    if len(frames) > 2:
        last = len(frames) - 1
        slider = (
            f'<label hidden>step <input type="range" min="1" max="{last}" value="{last}" '
            f'aria-label="{escaped(title)}: step"><output></output></label>'
        )
    return f'<div class="film"><h3>{escaped(title)}</h3>{slider}<div class="frames">{figures}</div></div>'


def picture(caption: str, frame: Frame) -> str:
    """Return a picture with a line below it."""
    width, height = frame.size
    address = data_address(frame.jpeg, "image/jpeg")
    return (
        f'<figure data-step="{escaped(caption)}"><img src="{address}" width="{width}" height="{height}" '
        f'alt="{escaped(caption)}"><figcaption>{escaped(caption)}</figcaption></figure>'
    )


def step_text(frame: Frame) -> str:
    """Return the step of a picture in words."""
    return "whole run" if frame.step is None else f"step {frame.step:,}"
