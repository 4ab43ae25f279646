"""Mask overlap: closed forms with encoders that attend to objects, or to the background."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import maskwise
from data.benchmark_sets.test_benchmark_sets import coco_on_disk, cub_on_disk
from maskwise.data.datasets.shapes import Shapes
from maskwise.errors import UserError
from maskwise.evaluation.mask_overlap import mask_overlap
from support.benchmark_folders import tiny_encoder
from support.planted import Pictures

COUNT, SIZE, PATCH = 24, 48, 8


class ObjectAttention(nn.Module):
    """An encoder with attention on object patches, looked up in the data (sign=-1: on the background)."""

    mean = (0.5, 0.5, 0.5)
    pooling = SimpleNamespace(k=1)

    def __init__(self, data, sign=1.0):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.masks = {data.image(i).float().sum().item(): data.mask(i) for i in range(len(data))}
        self.sign = sign

    def transform(self, image):
        return image.float()

    def uint8_crop(self, image):
        return image

    def forward(self, images):
        side = SIZE // PATCH
        covers = [
            self.masks[image.sum().item()]
            .double()
            .unflatten(1, (side, PATCH))
            .unflatten(0, (side, PATCH))
            .mean(dim=(1, 3))
            for image in images
        ]
        attention = torch.stack(covers).flatten(1).float()
        attention = torch.softmax(8 * self.sign * attention, 1)
        return SimpleNamespace(attention=attention[:, None].expand(-1, 3, -1), grid=(side, side))


@pytest.fixture(scope="module")
def data():
    return Shapes(COUNT, size=SIZE)


def truth(data):
    side = SIZE // PATCH
    return torch.stack(
        [
            data.mask(i).double().unflatten(1, (side, PATCH)).unflatten(0, (side, PATCH)).mean(dim=(1, 3)).flatten()
            >= 0.5
            for i in range(COUNT)
        ]
    )


def test_closed_forms(data):
    on = truth(data)
    hidden = int(on.shape[1] * 0.3)
    report = mask_overlap(
        ObjectAttention(data),
        data,
        maskings=("attmask_high", "attmask_low", "random", "block"),
        untrained=ObjectAttention(data, -1.0),
    )
    numbers = report.numbers
    assert numbers["chance"] == pytest.approx(100 * on.double().mean().item())
    best = 100 * on.sum(1).clamp(max=hidden).sum().item() / (hidden * COUNT)
    assert numbers["attmask_high"] == pytest.approx(best) == pytest.approx(numbers["best"]) and best < 100
    worst = 100 * (hidden - (~on).sum(1)).clamp(min=0).sum().item() / (hidden * COUNT)
    assert numbers["attmask_low"] == pytest.approx(worst) == pytest.approx(numbers["attmask_high_untrained"])
    assert numbers["attmask_low_untrained"] == pytest.approx(best)
    assert abs(numbers["random"] - numbers["chance"]) < 6
    assert numbers["attention"] > 90 > 10 > numbers["attention_untrained"]
    assert "random_untrained" not in numbers and "best_untrained" not in numbers
    assert numbers["attmask_high_recall"] == pytest.approx(100 * on.sum(1).clamp(max=hidden).sum() / on.sum())
    assert numbers["attmask_low_recall"] == pytest.approx(numbers["attmask_low"] * hidden * COUNT / on.sum())
    assert abs(numbers["random_recall"] - 100 * hidden / on.shape[1]) < 6 and "random_recall_untrained" not in numbers
    assert numbers["attmask_low_recall_untrained"] == pytest.approx(numbers["attmask_high_recall"])
    assert report.protocol["images"] == COUNT and report.protocol["ratio"] == 0.3


def test_mode_and_random_state_are_unchanged(data):
    encoder = ObjectAttention(data).train()
    before = torch.random.get_rng_state()
    mask_overlap(encoder, {"test": data}, limit=8)
    assert encoder.training and torch.equal(before, torch.random.get_rng_state())


def test_two_ranks_equal_one(data):
    whole = mask_overlap(ObjectAttention(data), data, limit=21).numbers
    sums = []

    def world(rank, all_sum):
        return SimpleNamespace(rank=rank, size=2, all_sum=all_sum)

    for rank in (0, 1):
        mask_overlap(ObjectAttention(data), data, world(rank, lambda totals: sums.append(totals) or totals), limit=21)
    together = mask_overlap(ObjectAttention(data), data, world(0, lambda totals: sums[0] + sums[1]), limit=21).numbers
    assert together == pytest.approx(whole)


def test_mistakes_are_refused(data):
    with pytest.raises(UserError, match="no object masks"):
        mask_overlap(ObjectAttention(data), SimpleNamespace(labels=None))
    with pytest.raises(UserError, match="attmask_hihg"):
        mask_overlap(ObjectAttention(data), data, maskings=("attmask_hihg",))


def test_boxes_stand_for_objects_where_there_are_no_masks(data):
    """An 8 x 8 patch counts where at least half of it lies in a box, of any box of the image."""
    boxed_data = Pictures([data.image(i) for i in range(2)])
    boxes = torch.tensor([[8.0, 0.0, 20.0, 16.0], [43.0, 32.0, 48.0, 48.0]])  # columns 1, half of 2; 5 of the last 8
    boxed_data.boxes = lambda i: boxes
    report = mask_overlap(ObjectAttention(data), {"test": boxed_data}, ratio=0.5, maskings=["random", "block"])
    assert report.numbers["chance"] == pytest.approx(100 * 6 / 36) and report.protocol["ground_truth"] == "boxes"
    boxes[0, 2], boxes[1, 0] = 19.0, 45.0  # less than half
    report = mask_overlap(ObjectAttention(data), {"test": boxed_data}, ratio=1.0, maskings="random")
    assert report.numbers["chance"] == pytest.approx(100 * 2 / 36) == pytest.approx(report.numbers["random"])
    assert report.numbers["random_recall"] == 100


def test_encoders_without_attention_compare_the_maskings_that_need_none(data):
    report = mask_overlap(tiny_encoder(pooling="gap", size=48), data, limit=4)
    assert set(report.numbers) == {"chance", "best", "random", "random_recall", "block", "block_recall"}
    with pytest.raises(UserError, match="attmask_high needs attention"):
        mask_overlap(tiny_encoder(pooling="gap", size=48), data, maskings="attmask_high")


def test_layouts_end_to_end(tmp_path):
    cub_on_disk(tmp_path / "cub")
    coco_on_disk(tmp_path / "coco")
    reports = [maskwise.evaluate("mask_overlap", tiny_encoder(), test=tmp_path / name) for name in ("cub", "coco")]
    assert [report.protocol["ground_truth"] for report in reports] == ["boxes", "masks"]
    assert [report.protocol["images"] for report in reports] == [2, 2] and all(r.numbers["chance"] > 0 for r in reports)
