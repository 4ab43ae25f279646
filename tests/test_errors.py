"""File names in messages: one line of valid Unicode, whatever bytes they hold."""

import pytest

from maskwise.data.decoding.image import CorruptImage
from maskwise.errors import UserError, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("é 写真 😀.png", "é 写真 😀.png"),
        ("a\u00a0b\u3000c", "a\u00a0b\u3000c"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("a\u2028b\u2029c\x85", "a\\u2028b\\u2029c\\x85"),
        ("a\udcff\udce9.png", "a\\xff\\xe9.png"),
        ("a\udcc3\udcbc.png", "aü.png"),  # UTF-8 that the locale did not decode
        ("a\ud800", "a\\ud800"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_printable_names(text, shown):
    assert printable(text) == shown and printable(shown) == shown
    shown.encode("utf-8")


def test_errors_and_unreadable_images_are_printable():
    assert str(UserError("2 mistakes", "  a\nb", "  c")) == "2 mistakes\n  a\\nb\n  c"
    assert str(UserError("no file a\nb\udcff; give another")) == "no file a\\nb\\xff; give another"
    error = CorruptImage("a\n\udcff.png", "cut\nshort")
    assert (error.name, error.reason, str(error)) == ("a\\n\\xff.png", "cut\\nshort", "a\\n\\xff.png: cut\\nshort")
