"""The one exception whose text is written for the person at the keyboard, and file names in such texts."""

import unicodedata

BREAKING = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, surrogates, line and paragraph separators


class UserError(Exception):
    """A mistake at the border: its text names the cause and the remedy in one line; several mistakes take one each."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(map(printable, lines)))


def printable(text: str) -> str:
    """Return a text that stays on one line and is valid Unicode: line breaks and stray bytes become escapes.

    A file name may hold any bytes; those that the locale does not decode are surrogates in Python.
    """
    if text.isprintable():
        return text
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair, from a JSON file: no file name
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(
        letter.encode("unicode_escape").decode("ascii") if unicodedata.category(letter) in BREAKING else letter
        for letter in text
    )
