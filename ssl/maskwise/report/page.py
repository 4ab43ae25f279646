"""The page of a run, or of several compared, and its file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from maskwise import __version__
from maskwise.build.runs import distinct_names
from maskwise.doctor.diagnose import network_text
from maskwise.engine.atomic_file import write_atomic
from maskwise.errors import UserError
from maskwise.imaging.web_page import document, escaped
from maskwise.report import comparison, elements, sections
from maskwise.report.contents import Contents, read_contents
from maskwise.report.elements import Charts
from maskwise.report.style import SCRIPT, STYLE

FILE, COMPARISON = "report.html", "comparison.html"


def write_page(folders: Sequence, out=None) -> tuple[Path, list[Contents]]:
    """Write the page of run folders -> (its file, the runs).

    out: by default report.html in the folder of a single run, comparison.html here of several. The file is replaced at
    once; raises UserError for a folder that is no run and a file that cannot be written.
    """
    runs = [read_contents(folder) for folder in folders]
    if len({run.run.path for run in runs}) < len(runs):
        raise UserError("report: a run is named twice; name each once")
    path = Path(out) if out else Path(folders[0]) / FILE if len(runs) == 1 else Path(COMPARISON)
    try:
        write_atomic(path, page(runs))
    except UserError as error:
        raise UserError(f"{error}, or choose another file with --out") from None
    return path, runs


def page(runs: Sequence[Contents]) -> str:
    """Return the page as HTML."""
    drawing = Charts(compared=len(runs) > 1)
    names = distinct_names([run.run.path for run in runs])
    if len(runs) == 1:
        [run] = runs
        title, about = Path(run.run.path).resolve().name or run.run.path, about_run(run)
        parts = [
            sections.accuracy(run, drawing),
            *sections.curves(run, drawing),
            sections.pictures(run),
            sections.cost(run),
            sections.recipe(run),
        ]
        # alarms first: they tell how to read the rest
        parts = [sections.alarms(run), *parts]
        opening = sections.summary(run)
    else:
        title, about, opening = f"{len(runs)} runs", f'<p class="soft">{escaped(", ".join(names))}</p>', ""
        parts = [
            comparison.overview(runs, names),
            comparison.recipes(runs, names),
            *comparison.curves(runs, names, drawing),
            comparison.pictures(runs, names),
        ]
    parts = [part for part in parts if part]
    body = "\n".join([header(title, about), unreadable(runs, names), contents_of(parts), opening, *parts, footer()])
    return document(f"{title} - maskwise", body, STYLE, SCRIPT, {"charts": drawing.data})


def header(title: str, about: str) -> str:
    """Return the title with the button of the color scheme."""
    return (
        f"<header><div><h1>{escaped(title)}</h1>{about}</div>"
        '<button id="theme" type="button" hidden aria-label="color scheme"></button></header>'
    )


def about_run(run: Contents) -> str:
    """Return state and method of a run."""
    found = run.run
    state = f'<span class="state {found.state}">{escaped(found.state)}</span>'
    note = f'<span class="soft">{escaped(found.note)}</span>' if found.note else ""
    method = f'<p class="soft">{escaped(network_text(found.recipe))}</p>' if found.recipe else ""
    empty = "" if run.trained else "<p>No step was logged yet.</p>"
    return f"{method}<p>{state}{note}</p>{empty}"


def unreadable(runs: Sequence[Contents], names: Sequence[str]) -> str:
    """Return a line on each file that could not be read."""
    lines = [f"{name}: {note}" if len(runs) > 1 else note for run, name in zip(runs, names) for note in run.notes]
    return f'<div class="alarm">{elements.listed(lines)}</div>' if lines else ""


def contents_of(parts: Sequence[str]) -> str:
    """Return links to the sections."""
    found = [match for part in parts if (match := re.match(r'<section id="([a-z]+)"><h2>(.*?)</h2>', part))]
    links = "".join(f'<a href="#{match[1]}">{match[2]}</a>' for match in found)
    return f"<nav>{links}</nav>"


def footer() -> str:
    """Return the last lines of the page: its program, and where values of curves are found."""
    return (
        f"<footer>maskwise {escaped(__version__)}. Values of a chart: point at it, or choose it by Tab and use "
        'the arrow keys.</footer><div id="tip" role="status" hidden></div>'
    )
