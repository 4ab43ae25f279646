"""File names of any bytes, in folders, lists and tar files, in any locale."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from data.datasets.test_tar import pack, png
from maskwise.data.datasets import Folder, ImageList, Tar
from maskwise.data.datasets.list_file import is_unicode
from maskwise.errors import UserError

CLASSES = ["cat\udcff", "d\u00f6g", "line\u2028sep", "new\nline"]
FILES = ["a\udcfe.png", "b\n.png", "c\u2028.png", "\u00e9\x85.png"]


@pytest.fixture
def tree(tmp_path):
    for k, folder in enumerate(CLASSES):
        (tmp_path / "odd" / folder).mkdir(parents=True)
        for j, name in enumerate(FILES):
            Image.new("RGB", (4, 4), (10 * k + j, 0, 0)).save(tmp_path / "odd" / folder / name, "PNG")
    return tmp_path / "odd"


def test_folders(tree):
    data = Folder(tree)
    assert data.classes == ["cat\udcff", "d\u00f6g", "line\u2028sep", "new\nline"]
    assert len(data) == 16 and [int(data.image(i)[0, 0, 0]) for i in range(16)] == [
        10 * CLASSES.index(data.name(i).split("/")[0]) + FILES.index(data.name(i).split("/")[1]) for i in range(16)
    ]


READ = """
import json, os, sys
from maskwise.data.datasets import Folder, ImageList
data = Folder("odd", classes=["d\\u00f6g", "cat\\udcff"])
rows = ImageList("rows.csv")
print(json.dumps({
    "encoding": sys.getfilesystemencoding(),
    "names": [os.fsencode(data.name(i)).hex() for i in range(len(data))],
    "red": [int(data.image(i)[0, 0, 0]) for i in range(len(data))],
    "classes": data.classes,
    "digest": data.fingerprint(),
    "listed": [int(rows.image(i)[0, 0, 0]) for i in range(len(rows))],
    "labels": rows.classes,
}))
"""


def test_the_same_images_in_an_ascii_locale(tree):
    (tree.parent / "rows.csv").write_text("path,label\nodd/d\u00f6g/\u00e9\x85.png,Zo\u00eb\n", encoding="utf-8")
    answers = []
    for settings in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}):
        environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run([sys.executable, "-c", READ], cwd=tree.parent, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr.decode()
        answers.append(json.loads(result.stdout))
    encodings = [answer.pop("encoding") for answer in answers]
    assert answers[0] == answers[1] and encodings == ["ascii", "utf-8"]
    assert answers[0]["classes"] == ["cat\udcff", "d\u00f6g"] and answers[0]["listed"] == [13]


def test_lists(tree):
    names = [f"odd/{folder}/{file}" for folder in CLASSES for file in FILES]
    rows = [{"path": name, "label": name[4]} for name in names if is_unicode(name)]
    for name, text in (
        ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("rows.json", json.dumps(rows)),
        ("rows.csv", "path,label\r\n" + "".join(f'"{row["path"]}",{row["label"]}\r\n' for row in rows)),
    ):
        (tree.parent / name).write_text(text, encoding="utf-8", newline="")
        data = ImageList(tree.parent / name)
        assert [data.name(i) for i in range(len(data))] == [row["path"] for row in rows]
        assert data.labels.tolist() == [["d", "l", "n"].index(row["label"]) for row in rows]
        assert [int(data.image(i)[0, 0, 0]) for i in range(3)] == [11, 12, 13]


def test_a_list_written_by_a_shell_may_name_any_bytes(tree):
    text = b"odd/cat\xff/a\xfe.png\todd\nodd/cat\xff/c\xe2\x80\xa8.png\teven\n"
    (tree.parent / "rows.txt").write_bytes(text)
    data = ImageList(tree.parent / "rows.txt")
    assert data.classes == ["even", "odd"] and [int(data.image(i)[0, 0, 0]) for i in range(2)] == [0, 2]
    label, missing = text.replace(b"odd\n", b"Zo\xeb\n"), text.replace(b"a\xfe", b"Zo\xeb")
    for other in (label, missing, text.decode("latin-1").encode("utf-16")):
        (tree.parent / "rows.txt").write_bytes(other)
        with pytest.raises(UserError, match="is not UTF-8 text; save it as UTF-8"):
            ImageList(tree.parent / "rows.txt")
    (tree.parent / "rows.csv").write_bytes(b"path,label\nodd/cat\xff/a\xfe.png,1\n")
    with pytest.raises(UserError, match="is not UTF-8 text; save it as UTF-8"):
        ImageList(tree.parent / "rows.csv")


def test_names_that_no_file_can_have(tree):
    (tree.parent / "rows.json").write_text('[{"path": "a\\ud800.png"}]')
    with pytest.raises(UserError, match=r"row 1 of .*rows.json names a\\ud800.png, which is not valid Unicode"):
        ImageList(tree.parent / "rows.json")
    (tree.parent / "rows.json").write_text('[{"path": "odd/new\\nline/b\\n.png"}, {"path": "a\\u0000.png"}]')
    data = ImageList(tree.parent / "rows.json")
    assert data.fingerprint() and data.stamp()
    with pytest.raises(Exception, match=r"a\\x00.png: embedded null byte"):
        data.image(1)


def test_tar_files(tmp_path):
    names = [f"{folder}/{file}" for folder in CLASSES for file in FILES[:2]]
    data = Tar(pack(tmp_path / "a.tar", {name: png(k) for k, name in enumerate(names)}))
    assert [data.name(i) for i in range(8)] == [f"a.tar/{name}" for name in names]
    assert data.classes == CLASSES and data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and data.fingerprint()
