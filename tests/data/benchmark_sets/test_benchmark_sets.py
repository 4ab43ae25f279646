"""Benchmark sets in their published layouts, in miniature, and the messages for missing files."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.data.benchmark_sets import (
    BENCHMARK_SETS,
    ade20k,
    boxed,
    cars,
    cifar,
    coco,
    copydays,
    cub,
    davis,
    flowers,
    inshop,
    products,
    safe_pickle,
    voc,
    wsol,
)
from maskwise.data.benchmark_sets import revisited as landmarks
from maskwise.data.datasets.shapes import Shapes
from maskwise.data.datasets.subset import Subset
from support import packs
from support.benchmark_folders import labels_of, photograph, refused, revisited


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
    assert cub.matches(root) and cub.matches(root / "CUB_200_2011") and not cub.matches(root / "nowhere")
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
    assert cars.matches(tmp_path) and labels_of(cars.read(tmp_path)["test"]) == [98, 195]
    assert {role: len(images) for role, images in cars.read(tmp_path, part="split").items()} == {"train": 2, "test": 2}
    (tmp_path / "cars_annos.mat").write_bytes(b"nonsense")
    refused(cars.read, tmp_path, "cannot read")


def test_products(tmp_path):
    place = tmp_path / "Stanford_Online_Products"
    text = "image_id class_id super_class_id path\n"
    for i in range(1, 5):
        photograph(place / "sofa_final" / f"{i}.JPG", i)
        text += f"{i} {(i + 1) // 2} 1 sofa_final/{i}.JPG\n"
    (place / "Ebay_test.txt").write_text(text)
    assert products.matches(tmp_path) and labels_of(products.read(tmp_path)["test"]) == [0, 0, 1, 1]
    refused(products.read, tmp_path, "lacks Ebay_train.txt", part="split")
    (place / "Ebay_test.txt").write_text("header\n1 1 1\n")
    refused(products.read, tmp_path, "line 2")


def inshop_on_disk(root):
    rows = [
        ("id_2", "query"),
        ("id_1", "query"),
        ("id_1", "gallery"),
        ("id_2", "gallery"),
        ("id_2", "gallery"),
        ("id_3", "train"),
    ]
    text = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    for i, (item, status) in enumerate(rows):
        photograph(root / "Img" / "img" / item / f"{i}.jpg", i, tint=int(item[-1]))
        text += f"img/{item}/{i}.jpg   {item}   {status}\n"
    (root / "Eval").mkdir()
    (root / "Eval" / "list_eval_partition.txt").write_text(text)
    return root


def test_inshop(tmp_path):
    result = inshop.read(inshop_on_disk(tmp_path))
    assert (
        inshop.matches(tmp_path) and labels_of(result["test"]) == [1, 0] and labels_of(result["gallery"]) == [0, 1, 1]
    )


def test_flowers(tmp_path):
    io = pytest.importorskip("scipy.io")
    for i in range(1, 7):
        photograph(tmp_path / "jpg" / f"image_{i:05d}.jpg", i)
    io.savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 4, 5, 6]])})
    io.savemat(tmp_path / "setid.mat", {"trnid": [[5]], "valid": [[2]], "tstid": [[6, 1, 3, 4]]})
    result = flowers.read(tmp_path)
    assert result["train"].files == ["jpg/image_00002.jpg", "jpg/image_00005.jpg"] and labels_of(result["train"]) == [
        1,
        4,
    ]
    assert labels_of(result["test"]) == [0, 2, 3, 5]
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
    result = cifar.read(tmp_path)
    assert cifar.matches(tmp_path) and len(result["train"]) == (10 if ten else 2) and len(result["test"]) == 2
    assert np.array_equal(result["test"].image(1).numpy(), rows[files[-1]][1].reshape(3, 32, 32))
    assert labels_of(result["test"]) == [len(files) - 1, 1]
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
    refused(safe_pickle.read_pickle, tmp_path / "gnd.pkl", "ground truth", "not plain pickled data")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol_are_read(tmp_path, protocol):
    content = {
        "a": [1, 2.5, "text", b"bytes", None, (True,)],
        "array": np.arange(6.0).reshape(2, 3),
        "number": np.float32(1.5),
        "index": np.int64(7),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    result = safe_pickle.read_pickle(tmp_path / "x.pkl", "ground truth")
    assert (
        result["a"] == content["a"]
        and np.array_equal(result["array"], content["array"])
        and result["number"] == 1.5
        and result["index"] == 7
    )


def test_damaged_pickles_give_one_line(tmp_path):
    whole = pickle.dumps({"a": list(range(100)), "b": np.arange(50)})
    for cut in (0, 1, 20, len(whole) - 3):
        (tmp_path / "x.pkl").write_bytes(whole[:cut])
        refused(safe_pickle.read_pickle, tmp_path / "x.pkl", "ground truth", "ground truth")


def test_revisited(tmp_path):
    place = revisited(tmp_path)
    assert landmarks.matches(tmp_path) and landmarks.matches(place)
    result = landmarks.read(tmp_path)
    assert (len(result["query"]), len(result["database"])) == (3, 12)
    assert (
        result["ground_truth"][1]["easy"] == [1, 4]
        and result["ground_truth"][1]["hard"] == [7]
        and result["ground_truth"][1]["bbx"].tolist() == [4, 2, 50.5, 40]
    )
    (place / "jpg" / "db_3.jpg").unlink()
    refused(landmarks.read, tmp_path, "db_3.jpg")
    photograph(place / "jpg" / "db_3.jpg", 3)
    content = pickle.loads((place / "gnd_roxford5k.pkl").read_bytes())
    content["gnd"][0]["hard"] = [99]
    (place / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))
    refused(landmarks.read, tmp_path, "outside its list of 12")
    (place / "gnd_roxford5k.pkl").unlink()
    refused(landmarks.read, tmp_path, "gnd_<name>.pkl")


def copydays_on_disk(root, originals: int = 5):
    for i in range(originals):
        photograph(root / "original" / f"20{i:02d}00.jpg", i, (48, 40))
        whole = Image.open(root / "original" / f"20{i:02d}00.jpg")
        for group, name in (("strong", f"20{i:02d}01.jpg"), ("jpegqual/30", f"20{i:02d}00.jpg")):
            (root / group).mkdir(parents=True, exist_ok=True)
            whole.crop((4, 4, 44, 38)).save(root / group / name, quality=30) if group == "strong" else whole.save(
                root / group / name, quality=30
            )
    return root


def test_copydays(tmp_path):
    result = copydays.read(copydays_on_disk(tmp_path))
    assert set(result["copies"]) == {"strong", "jpegqual/30"} and labels_of(result["copies"]["strong"]) == [
        0,
        1,
        2,
        3,
        4,
    ]
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
    boxes = "".join(
        f"<object><name>dog</name><bndbox><xmin>{x}</xmin><ymin>2</ymin>"
        "<xmax>20</xmax><ymax>30</ymax></bndbox></object>"
        for x in (1, 5)
    )
    (place / "Annotations" / "000005.xml").write_text(f"<annotation>{boxes}</annotation>")
    return place


def test_voc_counts_from_one(tmp_path):
    place = voc_on_disk(tmp_path)
    assert voc.matches(tmp_path) and voc.read(tmp_path)["test"].boxes(0).tolist() == [[0, 1, 20, 30], [4, 1, 20, 30]]
    (place / "Annotations" / "000005.xml").write_text('<!DOCTYPE x [<!ENTITY a "b">]><annotation/>')
    refused(voc.read, tmp_path, "entities")
    refused(voc.read, tmp_path, "VOC2012", year="2012")


def test_coco(tmp_path):
    for name in ("000000000001.jpg", "000000000002.jpg"):
        photograph(tmp_path / "val2017" / name, 1)
    table = {
        "images": [{"id": 1, "file_name": "000000000001.jpg"}, {"id": 2, "file_name": "000000000002.jpg"}],
        "annotations": [
            {"image_id": 1, "bbox": [1.4, 2.6, 10, 5], "iscrowd": 0},
            {"image_id": 1, "bbox": [0, 0, 32, 32], "iscrowd": 1},
            {"image_id": 2, "bbox": [3, 3, 4, 4]},
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(table))
    test = coco.read(tmp_path)["test"]
    assert coco.matches(tmp_path) and test.boxes(0).tolist() == [[1, 3, 11, 8]] and test.ids == [1, 2]
    (tmp_path / "names.txt").write_text("val2017/000000000002.jpg\n")
    assert coco.read(tmp_path, names=tmp_path / "names.txt")["test"].ids == [2]
    (tmp_path / "names.txt").write_text("000000000009.jpg\n")
    refused(coco.read, tmp_path, "000000000009.jpg", names=tmp_path / "names.txt")


def test_wsol_of_a_pack():
    root = packs.unpack("tinyimagenet100")
    result = wsol.read(root)
    assert wsol.matches(root) and set(result) == {"fullsup", "test"}
    assert (
        result["test"].boxes(0).shape[1] == 4
        and result["test"].sizes[0] == (64, 64)
        and result["test"].image(0).shape == (3, 64, 64)
    )


def test_wsol_boxes_and_sizes_are_those_of_the_lists(tmp_path):
    photograph(tmp_path / "a.jpg", 1)
    place = tmp_path / "wsol" / "test"
    place.mkdir(parents=True)
    rows = {wsol.LISTS[0]: "a.jpg", wsol.LISTS[1]: "a.jpg,7", wsol.LISTS[2]: "a.jpg,64,48"}
    rows[wsol.LISTS[3]] = "a.jpg,1,2,30,44\na.jpg,5,6,17.5,8"
    for name, text in rows.items():
        (place / name).write_text(text + "\n")
    test = wsol.read(tmp_path)["test"]
    assert test.boxes(0).tolist() == [[1, 2, 30, 44], [5, 6, 17.5, 8]], "x0, y0, x1, y1"
    assert test.sizes == [(64, 48)] and labels_of(test) == [7]


def test_davis_of_a_pack():
    result = davis.read(packs.unpack("davis-mini"))["test"]
    assert len(result) == 5 and sum(len(sequence.frames) for sequence in result) == 231
    mask = result[0].mask(0)
    assert mask.shape == result[0].frames.image(0).shape[1:] and set(mask.unique().tolist()) == {0, 1}


def test_ade(tmp_path):
    for part in ("training", "validation"):
        photograph(tmp_path / "images" / part / "ADE_1.jpg", 1)
        (tmp_path / "annotations" / part).mkdir(parents=True)
        Image.fromarray(np.array([[0, 1], [150, 2]], dtype=np.uint8)).save(
            tmp_path / "annotations" / part / "ADE_1.png"
        )
    result = ade20k.read(tmp_path)
    assert ade20k.matches(tmp_path) and result["test"].label_map(0).tolist() == [[255, 0], [149, 1]]


def test_no_benchmark_set_matches_an_empty_folder(tmp_path):
    assert [name for name, layout in BENCHMARK_SETS.items() if layout.matches(tmp_path)] == []


def test_a_subset_keeps_its_boxes(tmp_path):
    some = Subset(cub.read(cub_on_disk(tmp_path))["test"], [2, 0])
    assert some.boxes(1).tolist() == [[3.0, 2.0, 13.5, 22.0]] and torch.equal(some.labels, torch.tensor([199, 100]))


def test_voc_marks_truncated_and_difficult_objects(tmp_path):
    place = voc_on_disk(tmp_path)
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    flags = (
        "",
        "<difficult>1</difficult>",
        "<truncated>1</truncated><difficult>0</difficult>",
        "<difficult>0</difficult>",
    )
    objects = "".join(f"<object>{flag}{box}</object>" for flag in flags)
    (place / "Annotations" / "000005.xml").write_text(f"<annotation>{objects}</annotation>")
    test = voc.read(tmp_path)["test"]
    assert test.hard(0).tolist() == [False, True, True, False]
    assert boxed.boxes_of(test, 0).tolist() == [[0, 0, 9, 9]] * 4
    assert boxed.boxes_of(test, 0, hard=False).tolist() == [[0, 0, 9, 9]] * 2
    assert Subset(test, [0]).hard(0).tolist() == test.hard(0).tolist()


def coco_on_disk(root, part="val2017", segmentation=((4, 6, 12, 6, 12, 20, 4, 20),)):
    photograph(root / part / "COCO_1.jpg", 1, (40, 30))
    photograph(root / part / "COCO_2.jpg", 2, (24, 30))
    table = {
        "images": [
            {"id": 1, "file_name": "COCO_1.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "COCO_2.jpg", "width": 24, "height": 30},
        ],
        "annotations": [{"image_id": 1, "bbox": [4, 6, 9, 15], "segmentation": [list(part) for part in segmentation]}],
    }
    (root / "annotations").mkdir()
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(table))
    return root


def test_coco_draws_the_masks_of_polygons(tmp_path):
    test = boxed.read(coco_on_disk(tmp_path))["test"]
    assert test.mask(0).shape == (30, 40) and test.mask(0)[6:21, 4:13].all() and test.mask(0).sum() == 15 * 9
    assert not test.mask(1).any() and torch.equal(boxed.object_mask(test, 0, (30, 40)), test.mask(0))
    assert not hasattr(coco.read(tmp_path)["test"], "mask")


def test_coco_without_polygons_has_boxes_only(tmp_path):
    test = boxed.read(coco_on_disk(tmp_path, segmentation=()))["test"]
    assert not hasattr(test, "mask") and test.boxes(0).tolist() == [[4, 6, 13, 21]]
    mask = boxed.object_mask(test, 0, (30, 40))
    assert mask[6:21, 4:13].all() and mask.sum() == 15 * 9


def test_the_20000_images_of_coco_are_those_of_their_list(tmp_path):
    coco_on_disk(tmp_path, part="train2014")
    (tmp_path / "coco_20k_filenames.txt").write_text("train2014/COCO_2.jpg\n")
    assert boxed.read(tmp_path)["test"].ids == [2]


def test_boxed_reads_every_layout_with_boxes_and_no_other(tmp_path):
    assert boxed.read(tmp_path) == {}
    voc_on_disk(tmp_path / "voc")
    cub_on_disk(tmp_path / "cub")
    assert [len(boxed.read(tmp_path / name)["test"]) for name in ("voc", "cub")] == [1, 2]
    shapes = Shapes(2, 32)
    x0, y0, x1, y1 = shapes.box(1).tolist()
    assert boxed.boxes_of(shapes, 1).tolist() == [[x0, y0, x1 + 1, y1 + 1]]
    assert torch.equal(boxed.object_mask(shapes, 1, (32, 32)), shapes.mask(1))
    assert boxed.boxes_of(Subset(shapes, [1]), 0).tolist() == boxed.boxes_of(shapes, 1).tolist()


def test_ids_of_wsol_may_lie_in_class_folders(tmp_path):
    photograph(tmp_path / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG", 1)
    place = tmp_path / "wsol" / "test"
    place.mkdir(parents=True)
    name = "val/ILSVRC2012_val_00000001.JPEG"
    for file, text in zip(wsol.LISTS, (name, f"{name},0", f"{name},32,32", f"{name},1,2,30,31")):
        (place / file).write_text(text + "\n")
    test = boxed.read(tmp_path)["test"]
    assert test.name(0) == "val/n01440764/ILSVRC2012_val_00000001.JPEG" and test.box_size(0) == (32, 32)
    assert boxed.boxes_of(test, 0).tolist() == [[1, 2, 31, 32]], "maxima are pixels of the object"
    assert boxed.boxes_of(Subset(test, [0]), 0).tolist() == [[1, 2, 31, 32]]
