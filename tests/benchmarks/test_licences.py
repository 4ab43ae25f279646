"""docs/licences.md names every declared dependency with the licence that it states, and none of them is copyleft."""

import pytest

from benchmarks import licences


def test_every_declared_dependency_has_its_row():
    assert list(licences.rows()) == list(licences.declared()) and len(licences.rows()) >= 15


@pytest.mark.parametrize("package", licences.declared())
def test_the_licence_is_the_stated_one(package):
    row, stated = licences.rows()[package], licences.stated(package)
    assert licences.families(row) and "copyleft" not in licences.families(row)
    if stated is None:
        pytest.skip(f"{package} is not installed")
    # versions word it differently: one family in common is asked for, and no new kind of obligation
    assert licences.families(row) & licences.families(stated) and "copyleft" not in licences.families(stated)


@pytest.mark.parametrize("text, found", [("MIT License", {"MIT"}), ("MIT-CMU", {"HPND"}), ("BSD-3-Clause AND MIT", {"BSD", "MIT"}), ("GNU LGPL v3", {"copyleft"}), ("Apache 2.0", {"Apache"})])
def test_families(text, found):
    assert licences.families(text) == found
