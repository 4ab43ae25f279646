"""Detection: targets and results in COCO's format, AP by hand, squares that are found, a pack end to end."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise import api
from maskwise.data.benchmark_sets import coco
from maskwise.data.datasets.subset import Subset
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.dense import detection
from maskwise.evaluation.dense.feature_pyramid import SimplePyramid, StagePyramid, pyramid_of
from maskwise.nn import POOLINGS, Backbone, Encoder
from support import packs
from support.benchmark_folders import tiny_encoder
from support.labeled_folders import instances, squares

pytest.importorskip("pycocotools")

SHORT = {"steps": 2, "batch_size": 2, "size": 64, "regions": 8, "detections": 5}


@pytest.fixture
def folder(tmp_path):
    return squares(squares(tmp_path, "train2017", 4), "val2017", 2, seed=9)


def test_targets(folder):
    data = detection.read(folder)
    assert {role: len(images) for role, images in data.items()} == {"test": 2, "train": 4}
    truth = detection.annotations(data["train"].file)
    image, target = detection.training_pair(data["train"], truth, [3, 7], 0, seed=0)
    assert image.shape == (3, 112, 112) and float(image.max()) <= 1 and target["labels"].tolist() == [1]
    x0, y0, x1, y1 = (int(v) for v in target["boxes"][0])
    mask = target["masks"][0].bool()
    assert mask[y0:y1, x0:x1].all() and int(mask.sum()) == (y1 - y0) * (x1 - x0)
    bright = image.mean(dim=0) > 0.5
    assert (bright == mask).double().mean() > 0.99  # mirrored alike
    pairs = [detection.training_pair(data["train"], truth, [3, 7], place, seed=0) for place in range(24)]
    assert len({round(float(picture.sum())) for picture, _ in pairs[:4]}) == 4  # an epoch has each image once
    assert 4 < len({tuple(its["boxes"][0].tolist()) for _, its in pairs}) <= 8  # and mirror images


def test_mirrored():
    masks = torch.zeros(1, 4, 10, dtype=torch.uint8)
    masks[0, 1, 2:5] = 1
    target = detection.mirrored({"boxes": torch.tensor([[2.0, 1, 5, 2]]), "labels": torch.ones(1), "masks": masks}, 10)
    assert target["boxes"].tolist() == [[5, 1, 8, 2]] and target["masks"][0, 1].nonzero().flatten().tolist() == [
        5,
        6,
        7,
    ]


def test_average_precision_by_hand(folder):
    """IoU .5, .75 and 1 pass 1, 6 and 10 of the thresholds .50, .55 ... .95."""
    data = detection.read(folder)["test"]
    truth = detection.annotations(data.file)
    boxes = {entry["image_id"]: entry["bbox"] for entry in truth.anns.values()}

    def results(share):
        return [
            {"image_id": i, "category_id": 3, "score": 0.9, "bbox": [x, y, share * w, h]}
            for i, (x, y, w, h) in boxes.items()
        ]

    for share, passed in ((1.0, 10), (0.751, 6), (0.501, 1), (0.4, 0)):
        scores = detection.average_precisions(truth, results(share), data.ids, "bbox")
        assert scores["ap"] == pytest.approx(100 * passed / 10) and scores["ap50"] == (100.0 if passed else 0.0)
    assert math.isnan(scores["ap_small"]) and not math.isnan(scores["ap_medium"])  # 40 to 60 pixels: medium
    one = detection.average_precisions(truth, results(1.0)[:1], data.ids, "bbox")
    assert one["ap"] == pytest.approx(100 * 51 / 101)  # recall .5: 51 of 101 recall points
    assert detection.average_precisions(truth, [], data.ids, "segm")["ap"] == 0.0
    mask = torch.from_numpy(truth.annToMask(truth.anns[1])).bool()
    segments = [{"image_id": 10, "category_id": 3, "score": 1.0, "segmentation": detection.run_lengths(mask)}]
    assert detection.average_precisions(truth, segments, [10], "segm")["ap"] == pytest.approx(100.0)


def test_learning_rate():
    assert [detection.rate(step, 1200) for step in (0, 119, 120, 799)] == [1 / 120, 1.0, 1.0, 1.0]
    assert [detection.rate(step, 1200) for step in (800, 1099, 1100)] == pytest.approx([0.1, 0.1, 0.01])


def test_pyramids():
    vit, resnet = tiny_encoder(), Encoder(Backbone("resnet18"), POOLINGS["gap"](512)).eval()
    simple, stages = pyramid_of(vit), pyramid_of(resnet)
    assert isinstance(simple, SimplePyramid) and isinstance(stages, StagePyramid)
    with torch.no_grad():
        maps = simple.train()(torch.randn(1, 3, 64, 96))
        assert {name: tuple(level.shape[1:]) for name, level in maps.items()} == {
            "0": (256, 32, 48),
            "1": (256, 16, 24),
            "2": (256, 8, 12),
            "3": (256, 4, 6),
            "pool": (256, 2, 3),
        }
        maps = stages(torch.randn(1, 3, 64, 96))
        assert [tuple(level.shape[-2:]) for level in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert simple.training and not any(part.training for part in simple.encoder.modules())


@pytest.mark.parametrize("kind", ["vit", "resnet18"])
def test_detection_in_miniature(folder, kind):
    encoder = tiny_encoder() if kind == "vit" else Encoder(Backbone("resnet18"), POOLINGS["gap"](512)).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    report = api.evaluate("detection", encoder, test=folder, **SHORT)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())  # a copy is trained
    assert {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap_large"} <= set(report.numbers)
    assert report.protocol["comparable"] is False and "not comparable" in report.protocol["differences"][0]
    assert report.protocol["categories"] == 2 and math.isfinite(report.protocol["last_loss"])
    again = api.evaluate("detection", encoder, test=folder, **SHORT)
    assert again.protocol["last_loss"] == report.protocol["last_loss"]  # keyed draws


@pytest.mark.long
def test_squares_are_found(folder):
    report = api.evaluate(
        "detection", tiny_encoder(), test=folder, **{**SHORT, "steps": 150, "size": 112, "regions": 16}, lr=1e-3
    )
    assert report.numbers["box_ap50"] > 50 and report.numbers["mask_ap50"] > 50


def test_a_part_of_the_images(folder):
    data = detection.read(folder)
    part = {"train": Subset(data["train"], [2]), "test": Subset(data["test"], [1])}
    report = EVALUATIONS["detection"](tiny_encoder(), part, **{**SHORT, "batch_size": 1})
    assert report.protocol["test"] == 1 and report.numbers["box_ap"] >= 0


def test_ranks_share_the_images(folder):
    data = detection.read(folder)
    network = detection.mask_rcnn(tiny_encoder(), 2, detection.DetectionOptions(size=64, detections=5))
    network.roi_heads.score_thresh = 0.0

    class Half:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def gather_objects(self, rows):
            return [rows]

    whole = detection.predictions(network, data["test"], [3, 7], None, {})
    halves = [detection.predictions(network, data["test"], [3, 7], Half(rank), {}) for rank in (0, 1)]
    assert {row["category_id"] for row in whole[0]} <= {3, 7}
    for x, y, width, height in (row["bbox"] for row in whole[0]):
        assert min(x, y, width, height) >= 0 and x + width <= 112 and y + height <= 112
    assert [row["image_id"] for row in halves[1][0]] == [20] * len(halves[1][0])
    assert whole[0] == halves[0][0] + halves[1][0] and whole[1] == halves[0][1] + halves[1][1] and whole[0]


def test_refusals(folder, monkeypatch):
    data = detection.read(folder)
    with pytest.raises(UserError, match="no train images with instances; give train=FOLDER in the layout of COCO"):
        EVALUATIONS["detection"](tiny_encoder(), {"train": [1], "test": data["test"]})
    table = json.loads(data["train"].file.read_text())
    del table["annotations"][0]["segmentation"]
    data["train"].file.write_text(json.dumps(table))
    with pytest.raises(UserError, match="annotation 1 has no segmentation"):
        EVALUATIONS["detection"](tiny_encoder(), data)
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(UserError, match="pip install 'maskwise"):
        EVALUATIONS["detection"](tiny_encoder(), data)


@pytest.mark.slow
def test_coco_pack(tmp_path):
    """Photographs with COCO's polygons: two steps, and the true outlines as results score 100."""
    folder, names = packs.unpack("coco200"), set()
    for part in ("train2017", "val2017"):
        images = {}
        for path in sorted((folder / "images" / part).glob("*.jpg"))[:6]:
            with Image.open(path) as picture:
                pixels = np.array(picture.convert("RGB"))
            lines = (folder / "instance_segmentation" / "labels" / part / f"{path.stem}.txt").read_text().splitlines()
            objects = []
            for line in lines:
                words = line.split()
                scale = np.tile([pixels.shape[1], pixels.shape[0]], len(words) // 2)
                objects.append((int(words[0]), (np.array(words[1:], dtype=float) * scale).tolist()))
            names |= {category for category, _ in objects}
            images[path.name] = (pixels, objects)
        instances(tmp_path, part, images)
    for part in ("train2017", "val2017"):
        file = tmp_path / "annotations" / f"instances_{part}.json"
        table = json.loads(file.read_text())
        table["categories"] = [{"id": number, "name": str(number)} for number in sorted(names)]
        file.write_text(json.dumps(table))
    report = api.evaluate("detection", tiny_encoder(), test=tmp_path, **{**SHORT, "size": 160})
    assert 0 <= report.numbers["box_ap"] < 10 and report.protocol["categories"] == len(names)
    data = coco.read(tmp_path)["test"]
    truth = detection.annotations(data.file)
    entries = list(truth.anns.values())
    boxes = [{key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0} for entry in entries]
    masks = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "score": 1.0}
        | {"segmentation": detection.run_lengths(torch.from_numpy(truth.annToMask(entry)).bool())}
        for entry in entries
    ]
    assert detection.average_precisions(truth, boxes, data.ids, "bbox")["ap"] == pytest.approx(100.0)
    assert detection.average_precisions(truth, masks, data.ids, "segm")["ap"] == pytest.approx(100.0)
