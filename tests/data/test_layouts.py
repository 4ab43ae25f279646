"""Every layout as users have it on disk, in miniature; and the one line for what is missing."""

import json
import pickle
import shutil

import numpy as np
import packs
import pytest
import torch
from evaluation.on_disk import class_folders, labels_of, photograph, revisited
from maskwise.data.layouts import (
    LAYOUTS, ade, cars, cifar, coco, copydays, cub, davis, flowers, imagenet, in9, inshop, pickles, products, voc, wsol,
)  # fmt: skip
from maskwise.data.layouts import revisited as landmarks
from maskwise.functional.errors import UserError
from PIL import Image


def refused(function, *parts, **options):
    """The one line of a refusal, which must name what is looked for."""
    with pytest.raises(UserError) as caught:
        function(*parts[:-1], **options)
    assert "\n" not in str(caught.value) and parts[-1] in str(caught.value), caught.value
    return str(caught.value)


def cub_on_disk(root):
    place = root / "CUB_200_2011"
    lines = {name: [] for name in cub.LISTS}
    for number, label in enumerate([1, 100, 101, 200, 200], start=1):
        name = f"{label:03d}.Bird/Bird_{number:04d}.jpg"
        photograph(place / "images" / name, number)
        for file, text in zip(cub.LISTS, (name, str(label), str(number % 2), f"{number}.0 2.0 10.5 20.0")):
            lines[file].append(f"{number} {text}")
    for file, rows in lines.items():
        (place / file).write_text("\n".join(rows) + "\n")
    return root


def test_cub(tmp_path):
    root = cub_on_disk(tmp_path)
    assert cub.holds(root) and cub.holds(root / "CUB_200_2011") and not cub.holds(root / "nowhere")
    test = cub.read(root)["test"]
    assert labels_of(test) == [100, 199, 199] and test.image(0).shape == (3, 32, 32)  # classes 101-200
    assert test.boxes(0).tolist() == [[3.0, 2.0, 13.5, 22.0]]
    split = cub.read(root, part="split")
    assert (len(split["train"]), len(split["test"])) == (3, 2)
    (root / "CUB_200_2011" / "images" / "101.Bird" / "Bird_0003.jpg").unlink()
    refused(cub.read, root, "1 of 3 images are missing")
    (root / "CUB_200_2011" / "image_class_labels.txt").write_text("1 1\n")
    refused(cub.read, root, "do not list the same images")
    (root / "CUB_200_2011" / "images.txt").unlink()
    refused(cub.read, root, "lacks images.txt")


def test_cars(tmp_path):
    io = pytest.importorskip("scipy.io")
    kind = [("relative_im_path", "O"), ("class", "O"), ("test", "O")]
    rows = [(f"car_ims/{i:06d}.jpg", label, i % 2) for i, label in enumerate([1, 98, 99, 196])]
    for i, row in enumerate(rows):
        photograph(tmp_path / row[0], i)
    io.savemat(tmp_path / "cars_annos.mat", {"annotations": np.array(rows, dtype=kind)})
    assert cars.holds(tmp_path) and labels_of(cars.read(tmp_path)["test"]) == [98, 195]
    assert {role: len(found) for role, found in cars.read(tmp_path, part="split").items()} == {"train": 2, "test": 2}
    (tmp_path / "cars_annos.mat").write_bytes(b"nonsense")
    refused(cars.read, tmp_path, "cannot read")


def test_products(tmp_path):
    place = tmp_path / "Stanford_Online_Products"
    text = "image_id class_id super_class_id path\n"
    for i in range(1, 5):
        photograph(place / "sofa_final" / f"{i}.JPG", i)
        text += f"{i} {(i + 1) // 2} 1 sofa_final/{i}.JPG\n"
    (place / "Ebay_test.txt").write_text(text)
    assert products.holds(tmp_path) and labels_of(products.read(tmp_path)["test"]) == [0, 0, 1, 1]
    refused(products.read, tmp_path, "lacks Ebay_train.txt", part="split")
    (place / "Ebay_test.txt").write_text("header\n1 1 1\n")
    refused(products.read, tmp_path, "line 2")


def inshop_on_disk(root):
    rows = [("id_2", "query"), ("id_1", "query"), ("id_1", "gallery"), ("id_2", "gallery"), ("id_2", "gallery"), ("id_3", "train")]
    text = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    for i, (item, status) in enumerate(rows):
        photograph(root / "Img" / "img" / item / f"{i}.jpg", i, tint=int(item[-1]))
        text += f"img/{item}/{i}.jpg   {item}   {status}\n"
    (root / "Eval").mkdir()
    (root / "Eval" / "list_eval_partition.txt").write_text(text)
    return root


def test_inshop(tmp_path):
    found = inshop.read(inshop_on_disk(tmp_path))
    assert inshop.holds(tmp_path) and labels_of(found["test"]) == [1, 0] and labels_of(found["gallery"]) == [0, 1, 1]


def test_flowers(tmp_path):
    io = pytest.importorskip("scipy.io")
    for i in range(1, 7):
        photograph(tmp_path / "jpg" / f"image_{i:05d}.jpg", i)
    io.savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 4, 5, 6]])})
    io.savemat(tmp_path / "setid.mat", {"trnid": [[5]], "valid": [[2]], "tstid": [[6, 1, 3, 4]]})
    found = flowers.read(tmp_path)
    assert found["train"].files == ["jpg/image_00002.jpg", "jpg/image_00005.jpg"] and labels_of(found["train"]) == [1, 4]
    assert labels_of(found["test"]) == [0, 2, 3, 5]
    io.savemat(tmp_path / "setid.mat", {"trnid": [[5]], "valid": [[2]]})
    refused(flowers.read, tmp_path, "no variable tstid")


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-100-python"])
def test_cifar(tmp_path, name):
    place, g = tmp_path / name, np.random.default_rng(0)
    place.mkdir()
    ten = name.startswith("cifar-10-")
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    rows = {file: g.integers(0, 256, (2, 3072), dtype=np.uint8) for file in files}
    for number, file in enumerate(files):
        content = {"data": rows[file], "labels" if ten else "fine_labels": [number, 1], "filenames": ["a", "b"]}
        (place / file).write_bytes(pickle.dumps(content, protocol=2))
    found = cifar.read(tmp_path)
    assert cifar.holds(tmp_path) and len(found["train"]) == (10 if ten else 2) and len(found["test"]) == 2
    assert np.array_equal(found["test"].image(1).numpy(), rows[files[-1]][1].reshape(3, 32, 32))
    assert labels_of(found["test"]) == [len(files) - 1, 1]
    (place / files[0]).write_bytes(pickle.dumps({"data": [1, 2], "labels": [1, 2]}))
    refused(cifar.read, tmp_path, "rows of 3072")


class Boom:
    def __reduce__(self):
        import os

        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content", [Boom(), {"gnd": [Boom()]}, np.array([Boom()], dtype=object)])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(content))
    refused(pickles.read_pickle, tmp_path / "gnd.pkl", "ground truth", "not plain pickled data")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol_are_read(tmp_path, protocol):
    content = {"a": [1, 2.5, "text", b"bytes", None, (True,)], "array": np.arange(6.0).reshape(2, 3), "number": np.float32(1.5), "index": np.int64(7)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = pickles.read_pickle(tmp_path / "x.pkl", "ground truth")
    assert found["a"] == content["a"] and np.array_equal(found["array"], content["array"]) and found["number"] == 1.5 and found["index"] == 7


def test_damaged_pickles_are_told_in_one_line(tmp_path):
    whole = pickle.dumps({"a": list(range(100)), "b": np.arange(50)})
    for cut in (0, 1, 20, len(whole) - 3):
        (tmp_path / "x.pkl").write_bytes(whole[:cut])
        refused(pickles.read_pickle, tmp_path / "x.pkl", "ground truth", "ground truth")


def test_revisited(tmp_path):
    place = revisited(tmp_path)
    assert landmarks.holds(tmp_path) and landmarks.holds(place)
    found = landmarks.read(tmp_path)
    assert (len(found["query"]), len(found["database"])) == (3, 12)
    assert found["ground_truth"][1]["easy"] == [1, 4] and found["ground_truth"][1]["hard"] == [7] and found["ground_truth"][1]["bbx"].tolist() == [4, 2, 50.5, 40]
    (place / "jpg" / "db_3.jpg").unlink()
    refused(landmarks.read, tmp_path, "db_3.jpg")
    photograph(place / "jpg" / "db_3.jpg", 3)
    content = pickle.loads((place / "gnd_roxford5k.pkl").read_bytes())
    content["gnd"][0]["hard"] = [99]
    (place / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    refused(landmarks.read, tmp_path, "outside its list of 12")
    (place / "gnd_roxford5k.pkl").unlink()
    refused(landmarks.read, tmp_path, "gnd_<name>.pkl")


def test_in9(tmp_path):
    names = [f"{i:02d}_{name}" for i, name in enumerate(in9.CLASSES)]
    for variant in ("original", "mixed_same", "fg_mask"):
        class_folders(tmp_path / "bg_challenge" / variant / "val", names, 2)
    found = in9.read(tmp_path)
    assert set(found) == {"original", "mixed_same"} and labels_of(found["original"]) == [i // 2 for i in range(18)]
    refused(in9.read, tmp_path, "mixed_rand/val", variants=("original", "mixed_rand"))
    (tmp_path / "bg_challenge" / "original" / "val" / "02_wheeled vehicle").rename(tmp_path / "gone")
    refused(in9.read, tmp_path, "should hold nine")


def test_in9_map():
    """pooling.md fact 49: 370 classes are mapped, in these numbers."""
    table = in9.standard_map()
    assert table.shape == (1000,) and [int((table == label).sum()) for label in range(9)] == [116, 52, 42, 36, 35, 27, 26, 20, 16]
    for index, label in {151: 0, 171: -1, 172: -1, 173: 0, 268: 0, 281: -1, 285: -1, 407: 2, 33: 3, 68: 3, 388: 4, 889: 6, 384: 7, 397: 8, 999: -1}.items():
        assert int(table[index]) == label


def test_in9_map_of_the_packs():
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


def test_imagenet_and_its_first_files_of_each_class(tmp_path):
    class_folders(tmp_path / "train", ["n01440764", "n01443537"], 3)
    class_folders(tmp_path / "validation", ["n01440764", "n01443537"], 1)
    found = imagenet.read(tmp_path, per_class=2)
    assert imagenet.holds(tmp_path) and (len(found["train"]), len(found["test"])) == (4, 2)
    assert found["train"].files == [f"{wnid}/{i:04d}.JPEG" for wnid in ("n01440764", "n01443537") for i in range(2)]  # fact 48: sorted, the first
    refused(imagenet.read, tmp_path, "fewer than the 4", per_class=4)


def test_classes_meet_by_name_or_by_imagenet_index():
    wnids = imagenet.synsets()
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids) and wnids[217] == "n02102040"
    assert imagenet.indices(["10", "2"]).tolist() == [10, 2] and imagenet.indices(["cat"]) is None
    assert imagenet.columns("x", ["b", "a"], ["a", "b", "c"]).tolist() == [1, 0]
    assert imagenet.columns("x", ["2", "0"], [wnids[0], wnids[2]]).tolist() == [1, 0]
    refused(imagenet.columns, "ImageNet-R", ["a", "z"], ["a"], "1 of its 2 classes are unknown")


def test_real_labels(tmp_path):
    class_folders(tmp_path / "val", ["n01440764"], 2, pattern="ILSVRC2012_val_{:08d}.JPEG")
    from maskwise.data.datasets import Folder

    data = Folder(tmp_path, split="val")
    (tmp_path / "real.json").write_text(json.dumps([[1, 2], []]))
    refused(imagenet.real_labels, tmp_path / "real.json", data, "has no number from 1 to 2")
    (tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000000.JPEG").rename(tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000002.JPEG")
    assert imagenet.real_labels(tmp_path / "real.json", Folder(tmp_path, split="val")) == [[1, 2], []]


def copydays_on_disk(root, originals: int = 5):
    for i in range(originals):
        photograph(root / "original" / f"20{i:02d}00.jpg", i, (48, 40))
        whole = Image.open(root / "original" / f"20{i:02d}00.jpg")
        for group, name in (("strong", f"20{i:02d}01.jpg"), ("jpegqual/30", f"20{i:02d}00.jpg")):
            (root / group).mkdir(parents=True, exist_ok=True)
            whole.crop((4, 4, 44, 38)).save(root / group / name, quality=30) if group == "strong" else whole.save(root / group / name, quality=30)
    return root


def test_copydays(tmp_path):
    found = copydays.read(copydays_on_disk(tmp_path))
    assert set(found["copies"]) == {"strong", "jpegqual/30"} and labels_of(found["copies"]["strong"]) == [0, 1, 2, 3, 4]
    photograph(tmp_path / "strong" / "999901.jpg", 1)
    refused(copydays.read, tmp_path, "999901.jpg is a copy of no original")
    shutil.rmtree(tmp_path / "original")
    refused(copydays.read, tmp_path, "lacks original")


def voc_on_disk(root):
    place = root / "VOCdevkit" / "VOC2007"
    photograph(place / "JPEGImages" / "000005.jpg", 1)
    for folder in ("Annotations", "ImageSets/Main"):
        (place / folder).mkdir(parents=True)
    (place / "ImageSets" / "Main" / "trainval.txt").write_text("000005\n")
    boxes = "".join(f"<object><name>dog</name><bndbox><xmin>{x}</xmin><ymin>2</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>" for x in (1, 5))
    (place / "Annotations" / "000005.xml").write_text(f"<annotation>{boxes}</annotation>")
    return place


def test_voc_counts_from_one(tmp_path):
    place = voc_on_disk(tmp_path)
    assert voc.holds(tmp_path) and voc.read(tmp_path)["test"].boxes(0).tolist() == [[0, 1, 20, 30], [4, 1, 20, 30]]
    (place / "Annotations" / "000005.xml").write_text('<!DOCTYPE x [<!ENTITY a "b">]><annotation/>')
    refused(voc.read, tmp_path, "entities")
    refused(voc.read, tmp_path, "VOC2012", year="2012")


def test_coco(tmp_path):
    for name in ("000000000001.jpg", "000000000002.jpg"):
        photograph(tmp_path / "val2017" / name, 1)
    table = {
        "images": [{"id": 1, "file_name": "000000000001.jpg"}, {"id": 2, "file_name": "000000000002.jpg"}],
        "annotations": [
            {"image_id": 1, "bbox": [1.4, 2.6, 10, 5], "iscrowd": 0}, {"image_id": 1, "bbox": [0, 0, 32, 32], "iscrowd": 1}, {"image_id": 2, "bbox": [3, 3, 4, 4]},
        ],
    }  # fmt: skip
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(table))
    test = coco.read(tmp_path)["test"]
    assert coco.holds(tmp_path) and test.boxes(0).tolist() == [[1, 3, 11, 8]] and test.ids == [1, 2]
    (tmp_path / "names.txt").write_text("val2017/000000000002.jpg\n")
    assert coco.read(tmp_path, names=tmp_path / "names.txt")["test"].ids == [2]
    (tmp_path / "names.txt").write_text("000000000009.jpg\n")
    refused(coco.read, tmp_path, "000000000009.jpg", names=tmp_path / "names.txt")


def test_wsol_of_a_pack():
    root = packs.unpack("tinyimagenet100")
    found = wsol.read(root)
    assert wsol.holds(root) and set(found) == {"fullsup", "test"}
    assert found["test"].boxes(0).shape[1] == 4 and found["test"].sizes[0] == (64, 64) and found["test"].image(0).shape == (3, 64, 64)


def test_davis_of_a_pack():
    found = davis.read(packs.unpack("davis-mini"))["test"]
    assert len(found) == 5 and sum(len(sequence.frames) for sequence in found) == 231
    mask = found[0].mask(0)
    assert mask.shape == found[0].frames.image(0).shape[1:] and set(mask.unique().tolist()) == {0, 1}


def test_ade(tmp_path):
    for part in ("training", "validation"):
        photograph(tmp_path / "images" / part / "ADE_1.jpg", 1)
        (tmp_path / "annotations" / part).mkdir(parents=True)
        Image.fromarray(np.array([[0, 1], [150, 2]], dtype=np.uint8)).save(tmp_path / "annotations" / part / "ADE_1.png")
    found = ade.read(tmp_path)
    assert ade.holds(tmp_path) and found["test"].label_map(0).tolist() == [[255, 0], [149, 1]]


def test_no_layout_claims_an_empty_folder(tmp_path):
    assert [name for name, layout in LAYOUTS.items() if layout.holds(tmp_path)] == []


def test_a_subset_keeps_its_boxes(tmp_path):
    from maskwise.data.subset import Subset

    some = Subset(cub.read(cub_on_disk(tmp_path))["test"], [2, 0])
    assert some.boxes(1).tolist() == [[3.0, 2.0, 13.5, 22.0]] and torch.equal(some.labels, torch.tensor([199, 100]))
