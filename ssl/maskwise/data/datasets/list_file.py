"""Images named in a list file: one path per line, or a table with columns for path, label and split."""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from maskwise.bounds import Count
from maskwise.data.datasets.files import ImageFiles, join_names, local_path, text_lines
from maskwise.data.datasets.labels import number_labels
from maskwise.data.datasets.packed_strings import PackedStrings
from maskwise.data.decoding.image import MAX_PIXELS, PixelLimit
from maskwise.data.decoding.multichannel import ValueRange
from maskwise.errors import UserError

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "image_file", "filepath")
LABEL_COLUMNS = ("label", "class", "target", "category", "label_name", "class_name", "y")
SPLIT_COLUMNS = ("split", "set", "subset", "fold")
PLAIN = (".txt", ".lst")  # one path per line
SUFFIXES = ".txt, .lst, .csv, .tsv, .json or .jsonl"


class ImageList(ImageFiles):
    """Images named in a list file, in its order.

    `.txt`/`.lst`: one path per line, optionally followed by a tab or blanks and a label; `#` starts a comment.
    `.csv`/`.tsv` with a header, `.jsonl` (one object per line) and `.json` (a list of objects, or an object of path:
    label): columns are found by their usual names, or named by `image_column`, `label_column`, `split_column`. Whole
    numbers as labels keep their numeric order, other labels are sorted; a row without a path is an error.

    path: the list; root: base folder of relative paths (default: the folder of the list); split: keep the rows with
    this value in the split column; classes, per_class, channels, bits, max_pixels, value_range as `ImageFiles`.
    Raises UserError for a list that is missing, unreadable, lacks a column, or names no image.
    """

    def __init__(
        self,
        path: str | Path,
        root: str | None = None,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        split_column: str | None = None,
        classes: str | Sequence[str] | None = None,
        per_class: Count | None = None,
        channels: int = 3,
        bits: int = 8,
        max_pixels: PixelLimit = MAX_PIXELS,
        value_range: ValueRange | None = None,
    ):
        path = local_path(path)
        if not path.is_file():
            raise UserError(
                f"data.path: {path} is not a file; give a list of images ({SUFFIXES}), or data.name=folder for a folder"
            )
        table = read(path)
        image_column = column(table, path, "image", image_column, PATH_COLUMNS, required=True)
        label_column = column(table, path, "label", label_column, LABEL_COLUMNS)
        if split is not None:
            table = select_split(table, path, split, split_column)
        names = [file_name(name, row, path) for row, name in enumerate(table[image_column], 1)]
        base = path.parent if root is None else local_path(root)
        strange = next((row for row, name in enumerate(table[image_column]) if not is_unicode(name)), None)
        if strange is not None and not (base / names[strange]).is_file():
            raise UserError(not_utf8(path))
        check_names(names, path, base)
        labels = class_names = None
        if label_column is not None:
            unlabeled = next((row for row, value in enumerate(table[label_column]) if value == ""), None)
            if unlabeled is not None:
                raise UserError(f"data.path: {path}: {names[unlabeled]} has no label and others do; label all, or none")
            if not all(map(is_unicode, table[label_column])):
                raise UserError(not_utf8(path))
            labels, class_names = number_labels(table[label_column])
        super().__init__(
            base,
            PackedStrings.of(names),
            labels,
            class_names,
            classes=classes,
            per_class=per_class,
            channels=channels,
            bits=bits,
            max_pixels=max_pixels,
            value_range=value_range,
        )
        self.notes = repeated_rows(names, path)
        add = "write one after each path" if path.suffix.lower() in PLAIN else "name their column as data.label_column"
        self.no_labels = f"{path} has no labels; {add}" if labels is None else None


def repeated_rows(names: list[str], path: Path) -> list[str]:
    """Describe rows that name a file again, [] without any: a table of boxes has several for one image."""
    seen: set[str] = set()
    again = [name for name in names if name in seen or seen.add(name)]
    if not again:
        return []
    return [
        f"{len(again)} of {len(names)} rows of {path} name a file that an earlier row names (the first: {again[0]})"
    ]


def select_split(table: dict[str, list[str]], path: Path, split: str, requested: str | None) -> dict[str, list[str]]:
    """Keep the rows of one split. Raises UserError where there are none."""
    name = column(table, path, "split", requested, SPLIT_COLUMNS, required=True)
    rows = [row for row, value in enumerate(table[name]) if value == split]
    if not rows:
        present = join_names(sorted(set(table[name])))
        raise UserError(f"data.split: no row of {path} has {split!r} in column {name!r}; it has {present}")
    return {key: [values[row] for row in rows] for key, values in table.items()}


def check_names(names: list[str], path: Path, base: Path) -> None:
    """Raise UserError for a list without images, a row without a path, or a first image that does not exist."""
    empty = next((row for row, name in enumerate(names) if not name), None)
    if empty is not None:
        raise UserError(f"data.path: row {empty + 1} of {path} names no image; fill in the path, or remove the row")
    if not names:
        raise UserError(f"data.path: {path} names no images; write one per line")
    if not (base / names[0]).is_file():
        present = sum((base / name).is_file() for name in names)
        missing = f"{names[0]} (row 1 of {path}) is missing"
        if present:
            raise UserError(f"{missing}; {present} of {len(names)} files were found")
        if (base / names[0].replace("\\", "/")).is_file():
            raise UserError(f"{missing}: the paths have backslashes; write them with slashes")
        raise UserError(
            f"{missing}; none of {len(names)} files was found in {base}: give the folder that the paths start from "
            "as data.root"
        )


def file_name(text: str, row: int, path: Path) -> str:
    """Return the name of a file as the system spells it. Raises UserError for text that no file name can be."""
    try:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half of a surrogate pair, written as an escape in JSON
        raise UserError(
            f"data.path: row {row} of {path} names {text}, which is not valid Unicode; correct it"
        ) from None


def is_unicode(text: str) -> bool:
    """Return whether a text holds no byte that is not UTF-8."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def not_utf8(path: Path) -> str:
    """Describe a list in another encoding."""
    return f"data.path: {path} is not UTF-8 text; save it as UTF-8"


def read(path: Path) -> dict[str, list[str]]:
    """Read the columns of a list file as strings."""
    suffix = path.suffix.lower()
    readers = {
        ".txt": parse_lines,
        ".lst": parse_lines,
        ".csv": parse_table,
        ".tsv": parse_table,
        ".json": parse_json,
        ".jsonl": parse_json,
    }
    if suffix not in readers:
        raise UserError(f"data.path: {path} is not a list that can be read; give {SUFFIXES}")
    try:
        # A list that a shell wrote may name files in any bytes; `check_names` looks whether they exist.
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape" if suffix in PLAIN else "strict")
        return readers[suffix](path, text)
    except UnicodeDecodeError:
        raise UserError(not_utf8(path)) from None
    except (ValueError, RecursionError, csv.Error) as error:  # ValueError: JSON
        raise UserError(f"data.path: cannot read {path}: {error}; give {SUFFIXES}") from None


def parse_lines(path: Path, text: str) -> dict[str, list[str]]:
    """Parse one path per line; a label follows a tab, or a blank after the file extension."""
    pairs = []
    for line in text_lines(text):
        line = line.strip(" \t")
        if not line or line.startswith("#"):
            continue
        name, tab, label = line.partition("\t")
        if not tab:
            match = re.match(r"(.*\.\w{2,5})[ ]+([^ ./]+)$", line)
            name, label = match.groups() if match else (line, "")
        pairs.append((name.strip(" "), label.strip()))
    table = {"path": [name for name, _ in pairs]}
    if any(label for _, label in pairs):
        table["label"] = [label for _, label in pairs]
    return table


def parse_table(path: Path, text: str) -> dict[str, list[str]]:
    """Parse a table with a header; `.csv` may use semicolons or tabs."""
    first_line = text_lines(text)[0]
    delimiter = next((letter for letter in ",;\t" if letter in first_line), ",")
    if path.suffix.lower() == ".tsv":
        delimiter = "\t"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = [name.strip() for name in next(reader, [])]
    rows = [row for row in reader if row]
    twice = next((name for k, name in enumerate(header) if name and name in header[:k]), None)
    if twice is not None:
        raise UserError(f"data.path: {path} has two columns {twice!r}; rename one")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UserError(
                f"data.path: row {number} of {path} has {len(row)} columns and the header {len(header)}; correct it"
            )
    return {name: [row[k].strip() for row in rows] for k, name in enumerate(header)}


def parse_json(path: Path, text: str) -> dict[str, list[str]]:
    """Parse a list of objects, one object per line, or one object of path: label."""
    if path.suffix.lower() == ".jsonl":
        content = [json.loads(line) for line in text_lines(text) if line.strip()]
    else:
        content = json.loads(text)
    if isinstance(content, dict) and not any(isinstance(label, (dict, list)) for label in content.values()):
        content = [{"path": name, "label": label} for name, label in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f'data.path: {path} is not a list of objects such as {{"path": "a.jpg", "label": "cat"}}')
    names = dict.fromkeys(name for row in content for name in row)
    return {name: [text_of(row.get(name)) for row in content] for name in names}


def text_of(value) -> str:
    """Return a JSON value as the text of a cell: "" where it is missing, whole numbers without a point."""
    if value is None or value != value:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def column(
    table: dict[str, list[str]],
    path: Path,
    role: str,
    requested: str | None,
    usual: tuple[str, ...],
    required: bool = False,
) -> str | None:
    """Find the column of a role: the requested one, or the first with a usual name, ignoring case."""
    if requested is not None:
        if requested not in table:
            raise UserError(
                f"data.{role}_column: {path} has no column {requested!r}; it has {join_names(list(table)) or 'none'}"
            )
        return requested
    lower = {name.lower(): name for name in reversed(table)}
    match = next((lower[name] for name in usual if name in lower), None)
    if match is None and required:
        raise UserError(
            f"data.path: {path} has no column for the {role} ({', '.join(usual[:3])} ...); "
            f"it has {join_names(list(table)) or 'none'}: name it as data.{role}_column"
        )
    return match
