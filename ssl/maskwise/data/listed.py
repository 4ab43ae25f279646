"""Images named by a file: a plain list, or a table with columns for the path, the label and the split."""

import csv
import json
import re
from pathlib import Path

from maskwise.data.decode import MAX_PIXELS
from maskwise.data.files import Files, numbered, shortened
from maskwise.data.names import Names
from maskwise.functional.errors import UserError

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "image_file", "filepath")
LABEL_COLUMNS = ("label", "class", "target", "category", "label_name", "class_name", "y")
SPLIT_COLUMNS = ("split", "set", "subset", "fold")
SUFFIXES = ".txt, .lst, .csv, .tsv, .json or .jsonl"


class Listed(Files):
    """Images named by a list file, in its order.

    `.txt`/`.lst`: a path a line, then optionally a tab or blanks and a label; `#` begins a remark. `.csv`/`.tsv` with a
    header, `.jsonl` (an object a line) and `.json` (a list of objects, or an object of path: label): columns are
    found by their usual names, or named by `image_column`, `label_column`, `split_column`. Labels that are whole
    numbers keep their numeric order, others are sorted; rows without a path are errors.

    path: the list; root: the folder that relative paths start from (default: the list's); split: keep the rows whose
    split column says so; classes, per_class, channels, bits, max_pixels as `Files`.
    Raises UserError for a list that is not there, cannot be read, lacks a column, or names no image.
    """

    def __init__(self, path, root: str | None = None, split: str | None = None, image_column: str | None = None, label_column: str | None = None,
                 split_column: str | None = None, classes=None, per_class: int | None = None, channels: int = 3, bits: int = 8,
                 max_pixels: int = MAX_PIXELS):
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"data.path: {path} is not a file; give a list of images ({SUFFIXES}), or data.name=folder for a folder")
        table = read(path)
        image_column = column(table, path, "image", image_column, PATH_COLUMNS, required=True)
        label_column = column(table, path, "label", label_column, LABEL_COLUMNS)
        if split is not None:
            where = column(table, path, "split", split_column, SPLIT_COLUMNS, required=True)
            said = sorted(set(table[where]))
            keep = [row for row, value in enumerate(table[where]) if value == split]
            if not keep:
                raise UserError(f"data.split: no row of {path} has {split!r} in column {where!r}; it holds {shortened(said)}")
            table = {name: [values[row] for row in keep] for name, values in table.items()}
        names = table[image_column]
        empty = next((row for row, name in enumerate(names) if not name), None)
        if empty is not None:
            raise UserError(f"data.path: row {empty + 1} of {path} names no image; fill it, or take it out")
        if not names:
            raise UserError(f"data.path: {path} names no images; write one a line")
        base = path.parent if root is None else Path(root).expanduser()
        if not (base / names[0]).is_file():
            raise UserError(f"data.root: {path} names {names[0]} first, and {base} holds no such file; give the folder that the paths start from as data.root")
        labels = class_names = None
        if label_column is not None:
            bare = next((row for row, value in enumerate(table[label_column]) if value == ""), None)
            if bare is not None:
                raise UserError(f"data.path: {path}: {names[bare]} has no label and others do; label all, or none")
            labels, class_names = numbered(table[label_column])
        super().__init__(base, Names.of(names), labels, class_names, classes=classes, per_class=per_class, channels=channels, bits=bits, max_pixels=max_pixels)


def read(path: Path) -> dict[str, list[str]]:
    """The columns of a list, as strings of equal number."""
    suffix = path.suffix.lower()
    readers = {".txt": lines_of, ".lst": lines_of, ".csv": rows_of, ".tsv": rows_of, ".json": objects_of, ".jsonl": objects_of}
    if suffix not in readers:
        raise UserError(f"data.path: {path} is not a list that can be read; give {SUFFIXES}")
    try:
        return readers[suffix](path, path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"data.path: {path} is not UTF-8 text; save it as UTF-8") from None
    except (json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"data.path: cannot read {path}: {error}; give {SUFFIXES}") from None


def lines_of(path: Path, text: str) -> dict[str, list[str]]:
    """A path a line; the last word is a label where a tab, or a blank after an image's ending, sets it apart."""
    pairs = []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, tab, label = line.partition("\t")
        if not tab:
            apart = re.match(r"(.*\.\w{2,5})[ ]+([^ ./]+)$", line)
            name, label = apart.groups() if apart else (line, "")
        pairs.append((name.strip(), label.strip()))
    table = {"path": [name for name, _ in pairs]}
    if any(label for _, label in pairs):
        table["label"] = [label for _, label in pairs]
    return table


def rows_of(path: Path, text: str) -> dict[str, list[str]]:
    """A table with a header."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in text.partition("\n")[0] and "," not in text.partition("\n")[0] else ","
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    header = [name.strip() for name in next(reader, [])]
    rows = [row for row in reader if row]
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UserError(f"data.path: row {number} of {path} has {len(row)} columns and the header {len(header)}; mend it")
    return {name: [row[k].strip() for row in rows] for k, name in enumerate(header)}


def objects_of(path: Path, text: str) -> dict[str, list[str]]:
    """A list of objects, objects a line, or one object of path: label."""
    content = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix.lower() == ".jsonl" else json.loads(text)
    if isinstance(content, dict):
        content = [{"path": name, "label": label} for name, label in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(f'data.path: {path} is not a list of objects such as {{"path": "a.jpg", "label": "cat"}}')
    names = dict.fromkeys(name for row in content for name in row)
    return {name: ["" if row.get(name) is None else str(row[name]) for row in content] for name in names}


def column(table: dict[str, list[str]], path: Path, what: str, asked: str | None, usual: tuple[str, ...], required: bool = False) -> str | None:
    """The column that holds `what`: the one asked for, or the first of the usual names, in whatever case."""
    if asked is not None:
        if asked not in table:
            raise UserError(f"data.{what}_column: {path} has no column {asked!r}; it has {shortened(list(table)) or 'none'}")
        return asked
    lower = {name.lower(): name for name in reversed(table)}
    found = next((lower[name] for name in usual if name in lower), None)
    if found is None and required:
        raise UserError(f"data.path: {path} has no column for the {what} ({', '.join(usual[:3])} ...); it has {shortened(list(table)) or 'none'}: name it as data.{what}_column")
    return found
