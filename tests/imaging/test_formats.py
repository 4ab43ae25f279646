"""The one list of formats: what Pillow decodes inside this process, and HEIF where a package adds its decoder."""

import io
import sys
import types

import pytest
from PIL import Image, PngImagePlugin, features

from maskwise.imaging import formats
from maskwise.imaging.pil import opened


def test_formats_are_those_of_pillow_with_pillows_endings():
    Image.init()
    assert set(formats.FORMATS) - {"HEIF"} <= set(Image.OPEN) and not {"EPS", "WMF", "PDF"} & set(formats.FORMATS)
    known = Image.registered_extensions()
    for name, endings in formats.FORMATS.items():
        for ending in endings:
            assert name == "HEIF" or known[ending] in (name, "MPO"), ending


def test_a_build_of_pillow_without_a_codec(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    formats.has_codec.cache_clear()
    assert ".avif" not in formats.endings() and ".jp2" in formats.endings() and "AVIF" not in formats.readable()
    formats.has_codec.cache_clear()


@pytest.fixture
def heif(monkeypatch):
    """A package pillow_heif whose decoder reads PNG."""
    package = types.ModuleType("pillow_heif")
    package.register_heif_opener = lambda: Image.register_open("HEIF", PngImagePlugin.PngImageFile)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    formats.register_heif.cache_clear()
    yield
    for table in (Image.OPEN, Image.ID):
        table.pop("HEIF") if isinstance(table, dict) else table.remove("HEIF")
    formats.register_heif.cache_clear()


def test_heif_where_a_package_reads_it(heif):
    assert ".heic" in formats.endings() and formats.readable()[-1] == "HEIF"


def test_heif_without_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.register_heif.cache_clear()
    assert ".heic" not in formats.endings() and ".avif" in formats.endings()
    held = io.BytesIO()
    Image.new("RGB", (4, 4)).save(held, "PNG")
    assert opened(held).size == (4, 4)
    formats.register_heif.cache_clear()
