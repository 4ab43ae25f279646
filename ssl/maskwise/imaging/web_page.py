"""Self-contained HTML pages: one file, light and dark, that opens without a server and requests nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping

from maskwise.errors import printable

LIGHT = {"paper": "#fff", "card": "#f7f7f9", "ink": "#222228", "soft": "#62626c", "line": "#dcdce2", "alarm": "#b3261e"}
DARK = {
    "paper": "#16161a",
    "card": "#1f1f25",
    "ink": "#e8e8ec",
    "soft": "#a3a3ad",
    "line": "#3a3a43",
    "alarm": "#ff8a80",
}
# eight colors of curves, each at least 3 : 1 against its paper
CURVES_LIGHT = ("#1f62b0", "#c9540c", "#26854e", "#a03278", "#7a5b3a", "#00808c", "#8a7000", "#5b4bc4")
CURVES_DARK = ("#6fa8ff", "#ff9c5a", "#5fcf8f", "#f07cc4", "#d0ab82", "#4fd0da", "#e0c24a", "#a89bff")


def variables(colors: Mapping[str, str], curves: tuple[str, ...], scheme: str) -> str:
    """Return the CSS variables of a color scheme, and the scheme of controls."""
    named = {**colors, **{f"c{number}": color for number, color in enumerate(curves)}}
    return f"color-scheme: {scheme}; " + " ".join(f"--{name}: {color};" for name, color in named.items())


BASE_STYLE = f"""
:root {{ {variables(LIGHT, CURVES_LIGHT, "light")} }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {variables(DARK, CURVES_DARK, "dark")} }} }}
:root[data-theme=dark] {{ {variables(DARK, CURVES_DARK, "dark")} }}
*, ::before, ::after {{ box-sizing: border-box; }}
body {{ background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 75rem; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }}
"""


def document(title: str, body: str, style: str = "", script: str = "", data: Mapping | None = None) -> str:
    """Return a page of HTML `body`; script: run at its end, with `data` as JSON in the element `data`.

    A content security policy forbids every request, and every script but this one. title: text, escaped here.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'; " if script else ""
    policy = f"default-src 'none'; {allowed}style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escaped(title)}</title><style>{BASE_STYLE}{style}</style></head><body>",
        body,
    ]
    if data is not None:
        parts.append(f'<script type="application/json" id="data">{json_text(data)}</script>')
    if script:
        parts.append(f"<script>{script}</script>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def escaped(text: object) -> str:
    """Return a text for HTML, in elements and in quoted attributes."""
    return html.escape(printable(str(text)))


def json_text(data: Mapping) -> str:
    """Return JSON that ends no script element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def data_address(content: bytes, kind: str) -> str:
    """Return the address of a file that is part of the page; kind: its type, such as image/jpeg."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
