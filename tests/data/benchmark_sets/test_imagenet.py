"""ImageNet, its classes and ReaL labels, and IN-9, in miniature."""

import json

from maskwise.data.benchmark_sets import imagenet, in9
from support import packs
from support.benchmark_folders import class_folders, labels_of, refused


def test_in9(tmp_path):
    names = [f"{i:02d}_{name}" for i, name in enumerate(in9.CLASSES)]
    for variant in ("original", "mixed_same", "fg_mask"):
        class_folders(tmp_path / "bg_challenge" / variant / "val", names, 2)
    result = in9.read(tmp_path)
    assert set(result) == {"original", "mixed_same"} and labels_of(result["original"]) == [i // 2 for i in range(18)]
    refused(in9.read, tmp_path, "mixed_rand/val", variants=("original", "mixed_rand"))
    (tmp_path / "bg_challenge" / "original" / "val" / "02_wheeled vehicle").rename(tmp_path / "gone")
    refused(in9.read, tmp_path, "should have nine")


def test_in9_map():
    """Check that 370 classes are mapped, with these counts."""
    table = in9.standard_map()
    assert table.shape == (1000,) and [int((table == label).sum()) for label in range(9)] == [
        116,
        52,
        42,
        36,
        35,
        27,
        26,
        20,
        16,
    ]
    for index, label in {
        151: 0,
        171: -1,
        172: -1,
        173: 0,
        268: 0,
        281: -1,
        285: -1,
        407: 2,
        33: 3,
        68: 3,
        388: 4,
        889: 6,
        384: 7,
        397: 8,
        999: -1,
    }.items():
        assert int(table[index]) == label


def test_in9_map_equals_the_published_one():
    import csv

    with open(packs.unpack("tinyimagenet100") / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    place = imagenet.indices([row["wnid"] for row in rows])
    assert place.tolist() == [int(row["imagenet_index"]) for row in rows]
    assert in9.standard_map()[place].tolist() == [int(row["in9_index"]) for row in rows]


def test_in9_map_file(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"0": -1, "2": 8, "1": 3}))
    assert in9.read_map(tmp_path / "map.json").tolist() == [-1, 3, 8]
    (tmp_path / "map.json").write_text(json.dumps({"0": 9}))
    refused(in9.read_map, tmp_path / "map.json", "from -1 to 8")


def test_imagenet_and_the_first_files_of_each_class(tmp_path):
    class_folders(tmp_path / "train", ["n01440764", "n01443537"], 3)
    class_folders(tmp_path / "validation", ["n01440764", "n01443537"], 1)
    result = imagenet.read(tmp_path, per_class=2)
    assert imagenet.matches(tmp_path) and (len(result["train"]), len(result["test"])) == (4, 2)
    assert result["train"].files == [
        f"{wnid}/{i:04d}.JPEG" for wnid in ("n01440764", "n01443537") for i in range(2)
    ]  # the first in sorted order
    refused(imagenet.read, tmp_path, "fewer than the requested 4", per_class=4)


def test_imagenet_indices_of_class_names():
    wnids = imagenet.synsets()
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids) and wnids[217] == "n02102040"
    assert imagenet.indices(["10", "2"]).tolist() == [10, 2] and imagenet.indices(["cat"]) is None


def test_real_labels(tmp_path):
    class_folders(tmp_path / "val", ["n01440764"], 2, pattern="ILSVRC2012_val_{:08d}.JPEG")
    from maskwise.data.datasets.folder import Folder

    data = Folder(tmp_path, split="val")
    (tmp_path / "real.json").write_text(json.dumps([[1, 2], []]))
    refused(imagenet.real_labels, tmp_path / "real.json", data, "has no number from 1 to 2")
    (tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000000.JPEG").rename(
        tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000002.JPEG"
    )
    assert imagenet.real_labels(tmp_path / "real.json", Folder(tmp_path, split="val")) == [[1, 2], []]
