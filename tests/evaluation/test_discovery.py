"""Discovery: LOST, DINO-seg and TokenCut against loops of their papers, answers by hand, and CorLoc end to end."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy import linalg
from torch import nn

import maskwise
from data.benchmark_sets.test_benchmark_sets import voc_on_disk
from launch.reproduce.derived_sets import coco_boxes
from maskwise.data.benchmark_sets import boxed
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.evaluation import discovery
from maskwise.evaluation.discovery import dino_seg_box, lost_box, token_cut_box
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.nn.tokens import Features
from support import packs
from support.benchmark_folders import refused, tiny_encoder
from support.planted import Pictures


def flood(mask, height, width, seed):
    """The 4-connected component of a patch, by a stack."""
    found, stack = set(), [seed]
    while stack:
        patch = stack.pop()
        if patch in found or not mask[patch]:
            continue
        found.add(patch)
        row, column = divmod(patch, width)
        for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= y < height and 0 <= x < width:
                stack.append(y * width + x)
    return found


def box_of(patches, width, side):
    rows, columns = [p // width for p in patches], [p % width for p in patches]
    return [min(columns) * side, min(rows) * side, (max(columns) + 1) * side, (max(rows) + 1) * side]


def components_of(mask, height, width):
    left, found = [p for p in range(height * width) if mask[p]], []
    while left:
        found.append(flood(mask, height, width, left[0]))
        left = [p for p in left if p not in found[-1]]
    return found


def lost_by_loops(keys, height, width, side, image, k):
    count = len(keys)
    products = [[float(a @ b) for b in keys.double()] for a in keys.double()]
    degree = [sum(products[i][j] > 0 for j in range(count) if j != i) for i in range(count)]
    order = sorted(range(count), key=lambda i: (degree[i], i))
    seed = order[0]
    expanded = [q for q in order[:k] if products[seed][q] > 0]
    mask = [sum(products[q][j] for q in expanded) > 0 for j in range(count)]
    box = box_of(flood(mask, height, width, seed), width, side)
    return [min(b, image[1 - i % 2]) for i, b in enumerate(box)], seed, expanded, mask


@pytest.mark.parametrize("number", range(6))
def test_lost_is_the_paper_in_loops(number):
    g = torch.Generator().manual_seed(number)
    height, width = (5, 7) if number % 2 else (9, 4)
    keys = torch.randn(height * width, 3, generator=g) + 0.4 * torch.randn(3, generator=g)
    image = (height * 8 - 3, width * 8 - 5)
    for k in (4, 100):
        box, seed, expanded, mask = lost_by_loops(keys, height, width, 8, image, k)
        result = lost_box(keys, (height, width), 8, image, k=k)
        assert result.box.tolist() == box and result.seed == seed
        assert result.expanded.tolist() == expanded and result.mask.tolist() == mask


def test_lost_by_hand():
    """Two objects of the direction (1, 0) in a background (-1, 1): the seed's one alone is in the box."""
    keys = torch.tensor([-1.0, 1.0]).repeat(6 * 8, 1)
    for row, column in ((1, 1), (1, 2), (2, 1), (4, 6), (4, 7), (5, 6), (5, 7)):
        keys[row * 8 + column] = torch.tensor([1.0, 0.0])
    result = lost_box(keys, (6, 8), 16, (90, 125))
    assert result.seed == 9, "similar to 6 others, the background to 40; of equal degrees the first"
    assert result.box.tolist() == [16, 16, 48, 48] and result.mask.sum() == 7 and len(result.expanded) == 7
    keys[1 * 8 + 1], keys[1 * 8 + 2], keys[2 * 8 + 1] = keys[0].clone(), keys[0].clone(), keys[0].clone()
    assert lost_box(keys, (6, 8), 16, (90, 125)).box.tolist() == [96, 64, 125, 90], "cut at the image"
    assert lost_box(keys, (6, 8), (10, 20), (60, 160)).box.tolist() == [120, 40, 160, 60], "height and width of patches"


def test_keys_of_lost_are_neither_normalized_nor_centered():
    """Sums of products count, so that long keys outweigh short ones."""
    g = torch.Generator().manual_seed(1)
    keys = torch.randn(12, 2, generator=g) * (2 * torch.randn(12, 1, generator=g)).exp() + 0.5
    result = lost_box(keys, (3, 4), 1, (3, 4))
    assert result.mask.tolist() == lost_by_loops(keys, 3, 4, 1, (3, 4), 100)[3]
    for others in (F.normalize(keys, dim=1), keys - keys.mean(dim=0)):
        assert not torch.equal(lost_box(others, (3, 4), 1, (3, 4)).mask, result.mask)


def test_a_key_of_zeros_finds_nothing():
    keys = torch.ones(12, 3)
    keys[5] = 0
    result = lost_box(keys, (3, 4), 8, (24, 32))
    assert result.seed == 5 and result.box.tolist() == [0, 0, 0, 0] and len(result.expanded) == 0
    assert dino_seg_box(torch.zeros(4), (2, 2), 8).tolist() == [0, 0, 0, 0]


def dino_seg_by_loops(attention, height, width, side, mass, faithful):
    values = attention.double().tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    mask, share = [False] * len(values), 0.0
    for i in order:
        share += values[i] / sum(values)
        mask[i] = share > 1 - mass
    found = components_of(mask, height, width)
    if faithful:
        background = [p for p in range(len(values)) if not mask[p]]
        found = found[:-1] if len(found) > 1 else [background]
    largest = max(map(len, found))
    return box_of(next(part for part in found if len(part) == largest), width, side)


@pytest.mark.parametrize("number", range(8))
def test_dino_seg_is_the_toolkit_in_loops(number):
    g = torch.Generator().manual_seed(number)
    height, width = (6, 9) if number % 2 else (8, 5)
    rough = F.interpolate(torch.rand(1, 1, 3, 3, generator=g), (height, width), mode="bicubic")
    attention = (8 * rough.flatten()).softmax(0)
    for mass in (0.3, 0.6, 0.9):
        for faithful in (False, True):
            expected = dino_seg_by_loops(attention, height, width, 16, mass, faithful)
            assert dino_seg_box(attention, (height, width), 16, mass, faithful).tolist() == expected


def test_dino_seg_faithful_repeats_the_published_fault():
    attention = torch.full((5, 6), 0.001)
    attention[1:3, 1:4] = 1.0
    assert dino_seg_box(attention.flatten(), (5, 6), 8, mass=0.9).tolist() == [8, 8, 32, 24]
    assert dino_seg_box(attention.flatten(), (5, 6), 8, 0.9, faithful=True).tolist() == [0, 0, 48, 40], "the background"
    attention[4, 5] = 1.0
    attention[0, 0] = 1.0  # three components; the last in raster order is the corner
    assert dino_seg_box(attention.flatten(), (5, 6), 8, 0.99, faithful=True).tolist() == [8, 8, 32, 24]
    attention[0, 0], attention[4, 3:6] = 0.001, 1.0
    attention[1:3, 1:4] = 0.001
    attention[1, 1] = 1.0  # the larger one is the last: only the smaller can be chosen
    assert dino_seg_box(attention.flatten(), (5, 6), 8, 0.99).tolist() == [24, 32, 48, 40]
    assert dino_seg_box(attention.flatten(), (5, 6), 8, 0.99, faithful=True).tolist() == [8, 8, 16, 16]


@pytest.mark.parametrize("number", (0, 1, 8, 10))  # 8 and 10: another box if split at zero
def test_token_cut_is_the_generalized_eigenvalue_problem(number):
    g = torch.Generator().manual_seed(number)
    keys = torch.randn(6 * 5, 4, generator=g) + 0.3
    unit = F.normalize(keys.double(), dim=1)
    weights = torch.where(unit @ unit.T > 0.2, 1.0, 1e-5).double().numpy()
    degree = weights.sum(1)
    _, vectors = linalg.eigh(-weights + torch.tensor(degree).diag().numpy(), torch.tensor(degree).diag().numpy())
    vector = torch.from_numpy(vectors[:, 1])
    above = (vector > vector.mean()).tolist()
    seed = max(range(30), key=lambda i: abs(float(vector[i])))
    mask = [value == above[seed] for value in above]
    expected = box_of(flood(mask, 6, 5, seed), 5, 8)
    assert token_cut_box(keys, (6, 5), 8, (48, 40)).tolist() == expected
    assert token_cut_box(100 * keys, (6, 5), 8, (48, 40)).tolist() == expected, "cosines"


def test_token_cut_by_hand():
    keys = torch.tensor([0.0, 1.0]).repeat(7 * 7, 1)
    for row, column in ((2, 3), (2, 4), (3, 3), (3, 4), (4, 4)):
        keys[row * 7 + column] = torch.tensor([5.0, 0.0])
    assert token_cut_box(keys, (7, 7), 10, (70, 45)).tolist() == [30, 20, 45, 50]


class Drawn(nn.Module):
    """An encoder whose keys and attention are those of a bright object: patch (1, 0) on it, (-1, 1) off it."""

    mean, std, image_size, dim = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (32, 32), 2
    pooling = SimpleNamespace(k=1, needs={"cls_attention"}, gives_attention=True)

    def __init__(self, patch=8):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.backbone = SimpleNamespace(stage_dims=None, patch_size=(patch, patch))
        self.seen = []

    def transform(self, image):
        return image.float() / 255

    def forward(self, images, attention=True, keys=False):
        self.seen.append(images)
        cover = F.avg_pool2d(images.mean(1, keepdim=True), self.backbone.patch_size)
        grid, on = tuple(cover.shape[-2:]), cover.flatten(1) > 0.5
        directions = torch.where(on[..., None], torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]))
        heads = torch.stack([(0.05 + on.float() * (head == 4)) for head in range(6)], dim=1)
        return Features(directions[:, 0], directions, heads / heads.sum(-1, keepdim=True), grid, directions)


def boxed_pictures(*sizes):
    """Images (height, width) with one white object each, and its box."""
    images, boxes = [], []
    for height, width in sizes:
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, 8:24, 8:32] = 255
        images.append(image)
        boxes.append(torch.tensor([[0.0, 0.0, 4.0, 4.0], [8.0, 8.0, 32.0, 24.0]]))
    pictures = Pictures(images)
    pictures.boxes = lambda i: boxes[i]
    pictures.all_boxes = boxes
    return pictures


def test_images_of_any_size_are_padded_after_normalization_and_scored():
    pictures, encoder = boxed_pictures((40, 50), (33, 61), (64, 40)), Drawn()
    encoder.mean = (-1.0, -1.0, -1.0)  # padding is 0, not a normalized black, which is 1
    report = discovery.discovery(encoder, {"test": pictures})
    assert [tuple(images.shape) for images in encoder.seen] == [(1, 3, 40, 56), (1, 3, 40, 64), (1, 3, 64, 40)]
    assert encoder.seen[0][..., 50:].eq(0).all() and encoder.seen[1][..., 33:, :].eq(0).all()
    encoder.mean = (0.0, 0.0, 0.0)
    report = discovery.discovery(encoder, {"test": pictures})
    assert report.numbers == {
        "lost": 100,
        "dino_seg": 100,
        "dino_seg_faithful": 0,
        "token_cut": 100,
        "whole_image": 0,
    }, "one blob: the published code takes the background"
    assert report.protocol["source"] == "keys" and report.protocol["images"] == 3
    only = discovery.discovery(encoder, {"test": pictures}, methods="dino_seg", head=0)
    assert list(only.numbers) == ["dino_seg", "dino_seg_faithful", "whole_image"] and only.numbers["dino_seg"] == 0
    for part, numbers in (
        ("methods", {"methods": ["lots"]}),
        ("no head 9", {"head": 9}),
        ("source=map", {"source": "map"}),
    ):
        refused(discovery.discovery, encoder, {"test": pictures}, part.replace("methods", "lots"), **numbers)
    refused(discovery.discovery, encoder, {"test": Pictures(pictures.images)}, "boxes")


def test_large_images_are_downscaled_and_boxes_returned_to_their_size():
    pictures = boxed_pictures((40, 48))
    pictures.images = [F.interpolate(image[None], scale_factor=2)[0] for image in pictures.images]
    pictures.all_boxes[0] *= 2
    report = discovery.discovery(Drawn(), {"test": pictures}, long_side=48)
    assert report.numbers["lost"] == 100 and "1 images downscaled to 48 pixels" in report.protocol["differences"]


def test_images_without_objects_and_hard_objects_leave_the_count():
    pictures = boxed_pictures((40, 48), (40, 48), (40, 48))
    pictures.all_boxes[0] = torch.zeros(0, 4)
    pictures.all_boxes[1] = torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    flags = [torch.zeros(0, dtype=torch.bool), torch.tensor([True]), torch.tensor([True, False])]
    pictures.hard = lambda i: flags[i]
    report = discovery.discovery(Drawn(), {"test": pictures}, methods="lost")
    assert report.numbers["lost"] == 50 and report.protocol["images"] == 2
    report = discovery.discovery(Drawn(), {"test": pictures}, methods="lost", hard=False)
    assert report.numbers["lost"] == 100 and report.protocol["images"] == 1


def test_two_ranks_equal_one():
    pictures = boxed_pictures((40, 50), (33, 61), (64, 40), (40, 48), (40, 40))
    pictures.all_boxes[3] = torch.tensor([[0.0, 0.0, 40.0, 48.0]])
    whole = discovery.discovery(Drawn(), {"test": pictures}).numbers
    parts = {}

    def world(rank):
        def gather(rows):
            parts.setdefault(rank, []).append(rows)
            other = parts.get(1 - rank, [])
            return torch.cat([rows, other[len(parts[rank]) - 1]]) if len(other) >= len(parts[rank]) else rows

        return SimpleNamespace(rank=rank, size=2, gather=gather, gather_objects=lambda value: [value])

    discovery.discovery(Drawn(), {"test": pictures}, world(0))
    assert discovery.discovery(Drawn(), {"test": pictures}, world(1)).numbers == pytest.approx(whole)


@pytest.mark.parametrize("pooling", ("cls", "simpool"))
def test_the_keys_are_those_of_the_last_block_or_of_simpool(pooling):
    encoder = tiny_encoder(pooling=pooling).double()
    images = torch.rand(1, 3, 24, 40, dtype=torch.float64)
    source = discovery.source_of(encoder, discovery.DiscoveryOptions())
    features = discovery.Padded(encoder, source)(images, attention=True, keys=True)
    tokens = encoder.backbone(images, keys=True, attention=pooling == "cls")
    if pooling == "cls":
        assert source == "keys" and torch.equal(features.keys, tokens.keys)
    else:
        weights = encoder.pooling
        normed = F.layer_norm(tokens.patches, (48,), weights.norm_patches.weight, weights.norm_patches.bias, 1e-6)
        assert source == "pooling" and torch.allclose(features.keys, normed @ weights.wk.weight.T)
        query = weights.wq(tokens.patches.mean(1))
        by_keys = (features.keys @ query[:, :, None])[..., 0].div(math.sqrt(48)).softmax(-1)
        assert torch.allclose(features.attention[:, 0], by_keys), "the keys are those that made the attention"
        assert torch.allclose(encoder(images).attention, features.attention)
        own = discovery.DiscoveryOptions(source="keys")
        assert torch.equal(discovery.Padded(encoder, discovery.source_of(encoder, own))(images).keys, tokens.keys)


@torch.no_grad()
def test_the_map_of_a_cnn_is_normalized_as_a_whole():
    encoder, images = Encoder(Backbone("resnet18"), POOLINGS["simpool"](512)).eval(), torch.rand(1, 3, 70, 40)
    padded = discovery.Padded(encoder, "patches")
    features = padded(images)
    assert padded.padded((70, 40)) == (96, 64) and tuple(features.grid) == (3, 2)
    raw = encoder(F.pad(images, (0, 24, 0, 26))).patches
    scaled = (raw - raw.mean()) / (raw.var(correction=0) + 1e-5).sqrt()
    assert torch.allclose(features.keys, scaled, atol=1e-5) and features.keys.shape == (1, 6, 512)
    assert discovery.source_of(encoder, discovery.DiscoveryOptions()) == "pooling"


def test_voc_end_to_end(tmp_path):
    voc_on_disk(tmp_path)
    report = maskwise.evaluate("discovery", tiny_encoder(), test=tmp_path)
    assert set(report.numbers) == {"lost", "dino_seg", "dino_seg_faithful", "token_cut", "whole_image"}
    assert report.protocol["images"] == 1 and all(value in (0, 100) for value in report.numbers.values())


def test_coco_of_a_pack_end_to_end(tmp_path):
    """On photographs an untrained encoder finds less than whole images, and by keys more than nothing."""
    folder = coco_boxes(packs.unpack("coco200"), tmp_path / "coco")
    images = boxed.read(folder)["test"]
    some = subsample_evenly(images, 10)
    report = maskwise.evaluate("discovery", tiny_encoder(size=64), test=some, long_side=320)
    assert 9 <= report.protocol["images"] <= 10 and "downscaled" in report.protocol["differences"][1]
    assert all(0 <= value <= 100 for value in report.numbers.values()) and report.numbers["whole_image"] > 0
    overlap = maskwise.evaluate("mask_overlap", tiny_encoder(size=64), test=some).numbers
    assert 10 < overlap["chance"] < 90 and abs(overlap["random"] - overlap["chance"]) < 10
    assert overlap["random_recall"] == pytest.approx(30, abs=4)
