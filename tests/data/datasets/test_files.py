"""Lists and tables of images, and selection of classes."""

import json

import pytest
from PIL import Image

from maskwise.data.datasets import DATASETS, Folder
from maskwise.data.datasets.list_file import ImageList, parse_lines
from maskwise.errors import UserError

NAMES = ["x/one.png", "two.png", "x/three.png", "four.png"]


@pytest.fixture
def root(tmp_path):
    for k, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), (k, k, k)).save(tmp_path / name)
    return tmp_path


def listing(root, name, text):
    (root / name).write_text(text)
    return root / name


TABLES = {
    "tabs.txt": "# mine\nx/one.png\tcat\ntwo.png\tdog\n\nx/three.png\tcat\nfour.png\teel\n",
    "blanks.lst": "x/one.png cat\ntwo.png dog\nx/three.png cat\nfour.png eel\n",
    "plain.csv": "Path,Label,split\nx/one.png,cat,train\ntwo.png,dog,train\nx/three.png,cat,val\nfour.png,eel,val\n",
    "semicolons.csv": "label;file\ncat;x/one.png\ndog;two.png\ncat;x/three.png\neel;four.png\n",
    "tabs.tsv": "image\tclass\nx/one.png\tcat\ntwo.png\tdog\nx/three.png\tcat\nfour.png\teel\n",
    "lines.jsonl": "\n".join(
        json.dumps({"file_name": name, "label": label}) for name, label in zip(NAMES, ["cat", "dog", "cat", "eel"])
    ),
    "index.json": json.dumps(dict(zip(NAMES, ["cat", "dog", "cat", "eel"]))),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_list_format_gives_the_same_dataset(root, name):
    data = DATASETS["list"](path=listing(root, name, TABLES[name]))
    assert (
        [data.name(i) for i in range(4)] == NAMES
        and data.classes == ["cat", "dog", "eel"]
        and data.labels.tolist() == [0, 1, 0, 2]
    )
    assert [int(data.image(i)[0, 0, 0]) for i in range(4)] == [0, 1, 2, 3] and data.image(0).shape == (3, 4, 5)


def test_lists_without_labels_and_other_columns_and_roots(root, tmp_path):
    data = ImageList(listing(root, "bare.txt", "\n".join(NAMES)))
    assert data.labels is None and data.classes is None and len(data) == 4
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    table = listing(elsewhere, "t.csv", "where,what,path\nx/one.png,7,?\ntwo.png,10,?\n")
    data = ImageList(table, root=str(root), image_column="where", label_column="what")
    assert data.classes == ["7", "10"] and data.labels.tolist() == [0, 1]  # numeric order
    spaces = parse_lines(table, "a b/c d.jpg\na b/c.jpg 3\n")
    assert spaces == {"path": ["a b/c d.jpg", "a b/c.jpg"], "label": ["", "3"]}


def test_the_reason_for_missing_labels(root):
    bare = ImageList(listing(root, "bare.txt", "\n".join(NAMES)))
    assert bare.no_labels == f"{root / 'bare.txt'} has no labels; write one after each path"
    table = ImageList(listing(root, "t.csv", "path,kind\ntwo.png,dog\n"))
    assert table.no_labels == f"{root / 't.csv'} has no labels; name their column as data.label_column"
    assert ImageList(root / "t.csv", label_column="kind").no_labels is None


@pytest.mark.parametrize(
    "rows, classes",
    [
        ([1, 1.0, "1", " 1 "], ["1"]),
        (["--1", "2", "10", "2"], ["--1", "10", "2"]),
        (["\u00b2", "2", "10", "\u0663"], ["10", "2", "\u00b2", "\u0663"]),
        ([True, False, True, False], ["False", "True"]),
        ([-1, 2, 10, 2], ["-1", "2", "10"]),
    ],
)
def test_labels_of_json(root, rows, classes):
    lines = [{"path": name, "label": label} for name, label in zip(NAMES, rows)]
    assert ImageList(listing(root, "rows.json", json.dumps(lines))).classes == classes


def test_cells_with_line_breaks_quotes_tabs_and_a_byte_order_mark(root):
    text = '\ufeffpath,label,note\r\n"x/one.png","a ""b""\nc",\r\ntwo.png,d,"e,f"\r\n'
    (root / "rows.csv").write_text(text, encoding="utf-8", newline="")
    data = ImageList(root / "rows.csv")
    assert [data.name(i) for i in range(2)] == NAMES[:2] and data.classes == ['a "b"\nc', "d"]
    data = ImageList(listing(root, "tabs.csv", "path\tlabel\ntwo.png\tdog\n"))
    assert data.classes == ["dog"]
    (root / "rows.txt").write_bytes(b"x/one.png\tcat\rtwo.png\tdog\r")
    assert ImageList(root / "rows.txt").classes == ["cat", "dog"]


def test_absolute_and_relative_paths(root):
    elsewhere = root / "lists"
    elsewhere.mkdir()
    data = ImageList(listing(elsewhere, "rows.txt", f"{root / 'two.png'}\n../x/three.png\n./../four.png\n"))
    assert [int(data.image(i)[0, 0, 0]) for i in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="the paths have backslashes; write them with slashes"):
        ImageList(listing(root, "windows.txt", "x\\one.png\n"))


def test_splits_of_a_table(root):
    table = listing(root, "plain.csv", TABLES["plain.csv"])
    data = ImageList(table, split="val")
    assert [data.name(i) for i in range(len(data))] == NAMES[2:] and data.classes == ["cat", "eel"]
    with pytest.raises(UserError, match="no row of .* has 'test' in column 'split'; it has train, val"):
        ImageList(table, split="test")


@pytest.mark.parametrize(
    "name, text, options, words",
    [
        ("a.csv", "foo,bar\n1,2\n", {}, "has no column for the image"),
        ("a.csv", "path,label\nx/one.png\n", {}, "row 1 of .* has 1 columns and the header 2"),
        ("a.csv", "path,label\nx/one.png,cat\ntwo.png,\n", {}, "two.png has no label and others do"),
        (
            "a.csv",
            "path\nnowhere.png\n",
            {},
            "nowhere.png .row 1 of .*a.csv. is missing; none of 1 files was found in .*: give .* data.root",
        ),
        (
            "a.csv",
            "path\nnowhere.png\nx/one.png\n",
            {},
            "nowhere.png .row 1 of .*a.csv. is missing; 1 of 2 files were found$",
        ),
        (
            "a.csv",
            "path\nx/one.png\n",
            {"label_column": "kind"},
            "data.label_column: .* has no column 'kind'; it has path",
        ),
        ("a.csv", "path\n", {}, "names no images"),
        ("a.csv", "path,label,label\nx/one.png,1,2\n", {}, "has two columns 'label'; rename one"),
        ("a.json", '{"images": [{"file_name": "x/one.png"}]}', {}, "not a list of objects"),
        ("a.json", "[" * 9999, {}, "cannot read"),
        ("a.json", "{", {}, "cannot read"),
        ("a.json", "[1]", {}, "not a list of objects"),
        ("a.parquet", "", {}, "is not a list that can be read"),
        ("a.txt", "x/one.png\n", {"classes": ["cat"]}, "data.classes needs"),
    ],
)
def test_wrong_lists_give_one_line(root, name, text, options, words):
    with pytest.raises(UserError, match=words) as caught:
        ImageList(listing(root, name, text), **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tree(tmp_path):
    for label in ("ant", "bee", "cow", "dog"):
        for k in range(3):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / label / f"{k}.png")
    return tmp_path


def test_selected_classes(tree):
    data = Folder(tree, classes=["dog", "bee"])
    assert data.classes == ["bee", "dog"] and data.labels.tolist() == [0] * 3 + [1] * 3 and data.name(3) == "dog/0.png"
    both = Folder(tree, classes=["dog", "bee"], per_class=2)
    assert both.labels.tolist() == [0, 0, 1, 1] and both.name(3) == "dog/1.png"
    (tree.parent / "chosen.txt").write_text("cow some words\n\n# remark\nant\n")
    assert Folder(tree, classes=str(tree.parent / "chosen.txt")).classes == ["ant", "cow"]


@pytest.mark.parametrize(
    "classes, words",
    [
        (["be"], "no class 'be'; did you mean 'bee'"),
        (["ant", "ant"], "is listed 2 times"),
        ([], "is empty"),
        ("nowhere.txt", "there is no file nowhere.txt"),
    ],
)
def test_wrong_classes_give_one_line(tree, classes, words):
    with pytest.raises(UserError, match=words):
        Folder(tree, classes=classes)


def test_lists_and_classes_from_a_recipe(root):
    from maskwise import build
    from maskwise.recipe.reading import read_recipe

    table = listing(root, "plain.csv", TABLES["plain.csv"])
    recipe = read_recipe(
        "debug/tiny",
        "data.name=list",
        f"data.path={table}",
        "data.split=train",
        "data.test_split=val",
        "data.classes=[cat, dog, eel]",
    )
    assert recipe.data.keywords()["classes"] == ("cat", "dog", "eel")
    with pytest.raises(UserError, match="no class 'eel'"):  # the train rows have no eel
        build.dataset(recipe)
    plain = read_recipe("debug/tiny", "data.name=list", f"data.path={table}", "data.test_split=val")
    assert len(build.dataset(plain)) == 4 and len(build.dataset(plain, "test")) == 2
