"""Lists and tables of images, and choices of classes."""

import json

import pytest
from PIL import Image

from maskwise.data.datasets import DATASETS, Folder
from maskwise.data.listed import Listed, lines_of
from maskwise.functional.errors import UserError

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
    "lines.jsonl": "\n".join(json.dumps({"file_name": name, "label": label}) for name, label in zip(NAMES, ["cat", "dog", "cat", "eel"])),
    "index.json": json.dumps(dict(zip(NAMES, ["cat", "dog", "cat", "eel"]))),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_list_says_the_same(root, name):
    data = DATASETS["list"](path=listing(root, name, TABLES[name]))
    assert [data.name(i) for i in range(4)] == NAMES and data.classes == ["cat", "dog", "eel"] and data.labels.tolist() == [0, 1, 0, 2]
    assert [int(data.image(i)[0, 0, 0]) for i in range(4)] == [0, 1, 2, 3] and data.image(0).shape == (3, 4, 5)


def test_lists_without_labels_and_other_columns_and_roots(root, tmp_path):
    data = Listed(listing(root, "bare.txt", "\n".join(NAMES)))
    assert data.labels is None and data.classes is None and len(data) == 4
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    table = listing(elsewhere, "t.csv", "where,what,path\nx/one.png,7,?\ntwo.png,10,?\n")
    data = Listed(table, root=str(root), image_column="where", label_column="what")
    assert data.classes == ["7", "10"] and data.labels.tolist() == [0, 1]  # numbers in their own order
    spaces = lines_of(table, "a b/c d.jpg\na b/c.jpg 3\n")
    assert spaces == {"path": ["a b/c d.jpg", "a b/c.jpg"], "label": ["", "3"]}


def test_splits_of_a_table(root):
    table = listing(root, "plain.csv", TABLES["plain.csv"])
    data = Listed(table, split="val")
    assert [data.name(i) for i in range(len(data))] == NAMES[2:] and data.classes == ["cat", "eel"]
    with pytest.raises(UserError, match="no row of .* has 'test' in column 'split'; it holds train, val"):
        Listed(table, split="test")


@pytest.mark.parametrize(
    "name, text, options, words",
    [
        ("a.csv", "foo,bar\n1,2\n", {}, "has no column for the image"),
        ("a.csv", "path,label\nx/one.png\n", {}, "row 1 of .* has 1 columns and the header 2"),
        ("a.csv", "path,label\nx/one.png,cat\ntwo.png,\n", {}, "two.png has no label and others do"),
        ("a.csv", "path\nnowhere.png\n", {}, "names nowhere.png first, and .* holds no such file; give the folder .* as data.root"),
        ("a.csv", "path\nx/one.png\n", {"label_column": "kind"}, "data.label_column: .* has no column 'kind'; it has path"),
        ("a.csv", "path\n", {}, "names no images"),
        ("a.json", "{", {}, "cannot read"),
        ("a.json", "[1]", {}, "not a list of objects"),
        ("a.parquet", "", {}, "is not a list that can be read"),
        ("a.txt", "x/one.png\n", {"classes": ["cat"]}, "data.classes needs"),
    ],
)
def test_wrong_lists_end_in_one_line(root, name, text, options, words):
    with pytest.raises(UserError, match=words) as caught:
        Listed(listing(root, name, text), **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def tree(tmp_path):
    for label in ("ant", "bee", "cow", "dog"):
        for k in range(3):
            (tmp_path / label).mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / label / f"{k}.png")
    return tmp_path


def test_some_classes(tree):
    data = Folder(tree, classes=["dog", "bee"])
    assert data.classes == ["bee", "dog"] and data.labels.tolist() == [0] * 3 + [1] * 3 and data.name(3) == "dog/0.png"
    both = Folder(tree, classes=["dog", "bee"], per_class=2)
    assert both.labels.tolist() == [0, 0, 1, 1] and both.name(3) == "dog/1.png"
    (tree.parent / "chosen.txt").write_text("cow some words\n\n# remark\nant\n")
    assert Folder(tree, classes=str(tree.parent / "chosen.txt")).classes == ["ant", "cow"]


@pytest.mark.parametrize(
    "classes, words",
    [(["be"], "no class 'be'; did you mean 'bee'"), (["ant", "ant"], "stands 2 times"), ([], "is empty"), ("nowhere.txt", "there is no file nowhere.txt")],
)
def test_wrong_classes_end_in_one_line(tree, classes, words):
    with pytest.raises(UserError, match=words):
        Folder(tree, classes=classes)


def test_lists_and_classes_from_a_recipe(root):
    from maskwise import build
    from maskwise.recipe import read_recipe

    table = listing(root, "plain.csv", TABLES["plain.csv"])
    recipe = read_recipe("debug/tiny", "data.name=list", f"data.path={table}", "data.split=train", "data.test_split=val", "data.classes=[cat, dog, eel]")
    assert recipe.data.keywords()["classes"] == ("cat", "dog", "eel")
    with pytest.raises(UserError, match="no class 'eel'"):  # the train rows have no eel
        build.dataset(recipe)
    plain = read_recipe("debug/tiny", "data.name=list", f"data.path={table}", "data.test_split=val")
    assert len(build.dataset(plain)) == 4 and len(build.dataset(plain, "test")) == 2
