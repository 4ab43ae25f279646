"""Localization: maps with known boxes, original sizes, thresholds of another set, ranks and layouts end to end."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import maskwise
from data.benchmark_sets.test_benchmark_sets import cub_on_disk
from maskwise.evaluation import localization
from maskwise.functional import metrics
from maskwise.nn.tokens import Features
from support import packs
from support.benchmark_folders import photograph, refused, tiny_encoder
from support.planted import Pictures


class Bright(nn.Module):
    """An encoder whose attention is the brightness of 14 x 14 cells (head 0), or its opposite (head 1)."""

    mean, std, image_size, dim = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (32, 32), 1
    pooling = SimpleNamespace(k=1)

    def __init__(self):
        super().__init__()
        self.anchor, self.sizes = nn.Parameter(torch.zeros(())), []

    def transform(self, image):
        return image.float() / 255

    def forward(self, images, attention=True):
        self.sizes.append(tuple(images.shape[-2:]))
        cells = nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 14).flatten(1)
        heads = torch.stack([4 * cells, -cells], dim=1)
        return Features(cells, cells[..., None], heads, (14, 14))


def white_objects():
    """Images of several sizes, each with one white rectangle, and that rectangle as its box, ends exclusive."""
    images, boxes = [], []
    for height, width, (x0, y0, x1, y1) in (
        (56, 112, (16, 8, 64, 32)),
        (140, 70, (20, 60, 50, 130)),
        (84, 84, (6, 6, 60, 66)),
    ):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, y0:y1, x0:x1] = 255
        images.append(image)
        boxes.append(torch.tensor([[float(x0), y0, x1, y1]]))
    pictures = Pictures(images)
    pictures.boxes = lambda i: boxes[i]
    return pictures, boxes


def test_white_rectangles_are_localized_in_images_of_any_size():
    pictures, _ = white_objects()
    encoder = Bright()
    report = localization.localization(encoder, {"test": pictures})
    assert encoder.sizes == [(224, 224)], "a square, whatever the aspect"
    assert report.numbers["max_box_acc_v2"] == report.numbers["max_box_acc"] == 100
    assert report.numbers["max_box_acc_v2_iou70"] == 100 > report.numbers["center_max_box_acc_v2"]
    wrong = localization.localization(encoder, {"test": pictures}, head=1)
    assert wrong.numbers["max_box_acc_v2_iou70"] == 100, "the rectangle is a hole now, with a contour of its own"
    assert wrong.numbers["max_box_acc"] < 100 and "head 1" in wrong.protocol["differences"][0]
    assert localization.localization(encoder, {"test": pictures}, size=64).protocol["differences"] == [
        "images of 64 pixels instead of 224"
    ]
    refused(localization.localization, encoder, {"test": pictures}, "no head 2", head=2)
    refused(localization.localization, encoder, {"test": Pictures(pictures.images)}, "needs images with boxes")


def test_numbers_are_those_of_the_metric():
    pictures, _ = white_objects()
    encoder = tiny_encoder()
    report = localization.localization(encoder, {"test": pictures}, batch_size=2)
    maps, boxes = [], []
    for i, image in enumerate(pictures.images):
        picture = torch.nn.functional.interpolate(image[None].float(), (224, 224), mode="bilinear", antialias=True)
        normalized = (picture.round() / 255 - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(
            encoder.std
        ).view(3, 1, 1)
        with torch.no_grad():
            maps.append(encoder(normalized).attention.mean(1).reshape(28, 28))
        x0, y0, x1, y1 = pictures.boxes(i)[0].tolist()
        height, width = image.shape[1:]
        corners = [x0, y0, min(x1, width - 1), min(y1, height - 1)]
        boxes.append(torch.tensor([[int(c * 224 / (width, height)[k % 2]) for k, c in enumerate(corners)]]))
    by_metric = metrics.max_box_acc(torch.stack(maps), boxes)
    assert report.numbers["max_box_acc_v2"] == pytest.approx(by_metric["mean"])
    assert report.numbers["max_box_acc"] == pytest.approx(metrics.max_box_acc(torch.stack(maps), boxes, version=1)[0.5])


def test_boxes_are_scaled_from_the_stated_size_and_cut_at_the_image():
    pictures = Pictures([torch.zeros(3, 50, 100, dtype=torch.uint8)])
    pictures.boxes = lambda i: torch.tensor([[10.0, 5.0, 100.0, 49.0]])
    assert localization.scaled_boxes(pictures, 0, (100, 50)).tolist() == [[22, 22, 221, 219]], "100 is cut to 99"
    pictures.box_size = lambda i: (200, 100)
    assert localization.scaled_boxes(pictures, 0, (100, 50)).tolist() == [[11, 11, 112, 109]]
    pictures.inclusive = True
    assert localization.scaled_boxes(pictures, 0, (100, 50)).tolist() == [[11, 11, 112, 109]]
    del pictures.box_size, pictures.inclusive, pictures.boxes
    pictures.box = lambda i: torch.tensor([10, 5, 99, 49])
    assert localization.scaled_boxes(pictures, 0, (100, 50)).tolist() == [[22, 22, 221, 219]], "of shapes: inclusive"


def test_thresholds_of_fullsup_are_applied_to_the_test_images():
    def picture(outside):
        image = torch.full((3, 224, 224), 0, dtype=torch.uint8)
        image[:, :208, :208] = outside
        image[:, 32:160, 32:160] = 255
        return image

    small, large = torch.tensor([[32.0, 32.0, 160.0, 160.0]]), torch.tensor([[0.0, 0.0, 208.0, 208.0]])
    sets = {"test": Pictures([picture(100)] * 2), "fullsup": Pictures([picture(100)] * 2)}
    sets["test"].boxes, sets["fullsup"].boxes = (lambda i: small), (lambda i: large)
    numbers = localization.localization(Bright(), sets).numbers
    assert numbers["max_box_acc_v2_iou70"] == 100 and numbers["max_box_acc_v2_iou70_fullsup"] == 0
    sets["fullsup"].boxes = lambda i: small
    assert localization.localization(Bright(), sets).numbers["max_box_acc_v2_iou70_fullsup"] == 100


def test_two_ranks_equal_one():
    pictures, boxes = white_objects()
    boxes[1][:] = torch.tensor([0.0, 0.0, 10.0, 10.0])
    whole = localization.localization(Bright(), {"test": pictures}).numbers
    sums = []

    def world(rank, all_sum):
        return SimpleNamespace(rank=rank, size=2, all_sum=all_sum)

    localization.localization(
        Bright(), {"test": pictures}, world(0, lambda part: sums.append(part) or part), batch_size=1
    )
    order = iter(sums)
    other = world(1, lambda part: part + next(order))
    assert localization.localization(Bright(), {"test": pictures}, other, batch_size=1).numbers == pytest.approx(whole)
    assert 0 < whole["max_box_acc_v2_iou70"] < 100


def test_cub_end_to_end_and_encoders_without_attention(tmp_path):
    report = maskwise.evaluate("localization", tiny_encoder(), test=cub_on_disk(tmp_path))
    assert report.protocol["images"] == 2 and 0 <= report.numbers["max_box_acc_v2"] <= 100
    refused(maskwise.evaluate, "localization", tiny_encoder(pooling="gap"), "no attention", test=tmp_path)


def test_imagenet_with_boxes_end_to_end(tmp_path):
    place = tmp_path / "Annotations" / "CLS-LOC" / "val"
    place.mkdir(parents=True)
    for number, wnid in ((1, "n01440764"), (2, "n02102040")):
        name = f"ILSVRC2012_val_{number:08d}"
        photograph(tmp_path / "val" / wnid / f"{name}.JPEG", number, (64, 48))
        objects = "<object><bndbox><xmin>4</xmin><ymin>6</ymin><xmax>64</xmax><ymax>40</ymax></bndbox></object>"
        (place / f"{name}.xml").write_text(f"<annotation>{objects * number}</annotation>")
    report = maskwise.evaluate("localization", tiny_encoder(), test=tmp_path)
    assert report.protocol["images"] == 2 and set(report.numbers) >= {"max_box_acc_v2", "max_box_acc"}
    from maskwise.data.benchmark_sets import imagenet_boxes

    test = imagenet_boxes.read(tmp_path)["test"]
    assert test.boxes(1).tolist() == [[4, 6, 64, 40]] * 2 and test.inclusive
    assert localization.scaled_boxes(test, 0, (64, 48)).tolist() == [[14, 28, 220, 186]]


@pytest.mark.parametrize("name", ("tinyimagenet100", "imagenette224-core"))
def test_packs_end_to_end(name):
    from maskwise.data.benchmark_sets import boxed
    from maskwise.data.datasets.subset import subsample_evenly

    sets = {role: subsample_evenly(images, 12) for role, images in boxed.read(packs.unpack(name)).items()}
    report = maskwise.evaluate("localization", tiny_encoder(size=64), test=sets)
    assert report.cost["images"] == 24
    for number in ("max_box_acc_v2", "center_max_box_acc_v2", "max_box_acc_v2_fullsup"):
        assert 5 < report.numbers[number] < 100
    assert report.numbers["max_box_acc_v2"] >= report.numbers["max_box_acc_v2_fullsup"]
