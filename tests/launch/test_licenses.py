"""docs/licenses.md names every declared dependency with the license that it states, and none of them is copyleft."""

import pytest

from launch.reproduce import licenses


def test_every_declared_dependency_is_listed():
    assert list(licenses.rows()) == list(licenses.declared()) and len(licenses.rows()) >= 15


@pytest.mark.parametrize("package", licenses.declared())
def test_license_equals_the_declared_one(package):
    row, stated = licenses.rows()[package], licenses.stated(package)
    assert licenses.families(row) and "copyleft" not in licenses.families(row)
    if stated is None:
        pytest.skip(f"{package} is not installed")
    # versions word it differently: one family in common is asked for, and no new kind of obligation
    assert licenses.families(row) & licenses.families(stated) and "copyleft" not in licenses.families(stated)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("MIT License", {"MIT"}),
        ("MIT-CMU", {"HPND"}),
        ("BSD-3-Clause AND MIT", {"BSD", "MIT"}),
        ("GNU LGPL v3", {"copyleft"}),
        ("Apache 2.0", {"Apache"}),
    ],
)
def test_families(text, expected):
    assert licenses.families(text) == expected
