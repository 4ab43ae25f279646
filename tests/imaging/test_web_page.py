"""Pages: escaping, the policy that forbids requests and foreign scripts, legible colors."""

import base64
import hashlib
import json
import re

import pytest

from maskwise.imaging import web_page
from maskwise.imaging.web_page import document, escaped, json_text

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">'


def test_texts_end_no_element():
    page = document(HOSTILE, f"<p>{escaped(HOSTILE)}</p>", script="1;", data={"name": HOSTILE, "list": [1.5]})
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<img" not in page
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(data) == {"name": HOSTILE, "list": [1.5]}
    assert escaped("a\nb\x00'\"<&") == "a\\nb\\x00&#x27;&quot;&lt;&amp;"


def test_policy_permits_this_script_and_no_request():
    script = "document.title = 'é'"
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', document("t", "", script=script))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none';")
    assert "img-src data:" in policy and "script-src" not in document("t", "")


def test_json_refuses_numbers_that_javascript_cannot_read():
    with pytest.raises(ValueError):
        json_text({"a": float("nan")})


def luminance(color):
    """Relative luminance (WCAG 2) of #rgb or #rrggbb."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", ["LIGHT", "DARK"])
def test_colors_are_legible(name):
    colors, curves = getattr(web_page, name), getattr(web_page, f"CURVES_{name}")

    def contrast(color, ground):
        dark, bright = sorted((luminance(color), luminance(ground)))
        return (bright + 0.05) / (dark + 0.05)

    for ground in (colors["paper"], colors["card"]):
        assert contrast(colors["ink"], ground) > 7
        assert min(contrast(colors[text], ground) for text in ("soft", "alarm")) > 4.5
    assert min(contrast(curve, colors["paper"]) for curve in curves) > 3
    assert len(set(curves)) == 8
