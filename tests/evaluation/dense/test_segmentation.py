"""Segmentation by a linear layer, by k-NN and by clusters: parts against loops, colors that must be found, a pack."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from maskwise import api
from maskwise.data.benchmark_sets import ade20k, label_maps
from maskwise.data.datasets.subset import Subset
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.dense import label_sets, patch_maps
from maskwise.evaluation.dense import linear_segmentation as linear
from maskwise.evaluation.dense.knn_segmentation import patch_scores
from maskwise.evaluation.dense.unsupervised_segmentation import matched
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.nn.tokens import Features
from support import packs
from support.benchmark_folders import tiny_encoder
from support.labeled_folders import colored_halves
from support.planted import Plain

NAMES = ("linear_segmentation", "knn_segmentation", "unsupervised_segmentation")
FAST = {
    "linear_segmentation": {
        "size": 32,
        "iterations": 120,
        "warmup": 0,
        "lr": 0.5,
        "batch_size": 4,
        "weight_decay": 0.0,
    },
    "knn_segmentation": {"size": 32, "k": 3},
    "unsupervised_segmentation": {"size": 32},
}
ADE = {"linear_segmentation": {"iterations": 5}, "knn_segmentation": {}, "unsupervised_segmentation": {"clusters": 3}}


class Colors(Plain):
    """An encoder whose patch tokens are the mean colors of patches of 8 pixels, centered."""

    patch_size, image_size = (8, 8), (32, 32)

    def __init__(self):
        super().__init__(3)

    def forward(self, images, **requests):
        maps = F.avg_pool2d(images, 8)
        patches = maps.flatten(2).transpose(1, 2) - 0.3
        return Features(patches.mean(1), patches, None, tuple(maps.shape[-2:]))


# parts


def test_window_starts_cover_the_side():
    assert patch_maps.window_starts(512, 512, 341) == [0] and patch_maps.window_starts(300, 512, 341) == [0]
    assert patch_maps.window_starts(683, 512, 341) == [0, 171]  # as mmsegmentation: the last one ends with the image
    assert patch_maps.window_starts(1200, 512, 341) == [0, 341, 682, 688]


def test_sliding_logits_average_what_overlaps():
    image = torch.arange(70.0).reshape(1, 1, 7, 10)
    seen = []

    def predict(part):
        seen.append(tuple(part.shape[-2:]))
        return torch.cat([part, torch.full_like(part, float(len(seen)))], dim=1)

    logits = patch_maps.sliding_logits(predict, image, 4, 3)
    assert seen == [(4, 4)] * 6 and torch.equal(logits[:, :1], image)  # rows 0, 3; columns 0, 3, 6
    assert logits[0, 1, 0].tolist() == [1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3]
    assert logits[0, 1, 3, 3] == (1 + 2 + 4 + 5) / 4


def test_largest_class_equals_the_whole_interpolation(monkeypatch):
    scores = torch.randn(7, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores[None], size=(30, 41), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    for cells in (1 << 25, 2 * 30 * 41):
        monkeypatch.setattr(label_sets, "_CELLS", cells)
        assert torch.equal(label_sets.largest_class(scores, (30, 41)), expected)


def test_patches_have_their_most_frequent_class():
    labels = torch.tensor([[0, 1, 2, 255], [1, 1, 255, 255], [0, 1, 3, 3], [0, 1, 255, 2]])
    assert patch_maps.patch_classes(labels, (2, 2), (2, 2), 4, 255).tolist() == [1, 255, 0, 3]
    large = labels.repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert patch_maps.patch_classes(large, (2, 2), (6, 6), 4, 255).tolist() == [1, 255, 0, 3]
    assert patch_maps.patch_classes(large, (2, 2), (2, 2), 4, 255).tolist() == [1, 255, 0, 3]


def test_layers_in_proportion_to_the_depth():
    vit = tiny_encoder()
    assert patch_maps.layers_of(vit) == (0, 1) and patch_maps.layers_of(vit, (2,)) == (1,)
    assert patch_maps.layers_of(Colors()) == ()
    with pytest.raises(UserError, match="gives its last patches only"):
        patch_maps.layers_of(Colors(), (1,))
    vit.backbone.depth = 12
    assert patch_maps.layers_of(vit) == (3, 5, 7, 11)
    vit.backbone.depth = 24
    assert patch_maps.layers_of(vit) == (7, 11, 15, 23)
    with pytest.raises(UserError, match="has blocks 1 to 24, not 25"):
        patch_maps.layers_of(vit, (25,))
    resnet = Encoder(Backbone("resnet18"), POOLINGS["gap"](512))
    assert patch_maps.layers_of(resnet) == (1, 2, 3, 4)
    maps = patch_maps.patch_map(resnet.eval(), torch.randn(1, 3, 64, 96), (1, 2, 3, 4))
    assert maps.shape == (1, 64 + 128 + 256 + 512, 4, 6)  # stride 16


def test_patch_map_is_row_major_and_normalized():
    encoder, images = tiny_encoder(), torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, features = patch_maps.patch_map(encoder, images, (0, 1)), encoder(images, layers=(0, 1))
    assert maps.shape == (1, 96, 4, 6) and torch.equal(maps[0, 48:, 1, 2], features.patches[0, 1 * 6 + 2])
    assert torch.equal(maps[0, :48, 3, 1], features.layers[0][0, 1 + 3 * 6 + 1])  # after the class token


def test_learning_rate_of_mmsegmentation():
    assert linear.rate(0, 160_000, 1500) == pytest.approx(1e-6) and linear.rate(80_000, 160_000, 1500) == 0.5
    assert linear.rate(750, 160_000, 1500) == pytest.approx((1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6)))
    options = linear.LinearSegmentationOptions
    assert [linear.warmup_of(options(iterations=n)) for n in (160_000, 1600, 1000)] == [1500, 1500, 9]


@pytest.mark.parametrize("cells", [1 << 27, 100])
def test_loss_is_the_mean_over_all_pixels(cells, monkeypatch):
    """Unlabeled pixels count 0 in the mean; gradients equal those of the whole batch at once."""
    monkeypatch.setattr(linear, "_CELLS", cells)
    g = torch.Generator().manual_seed(0)
    head = linear.LinearHead(5, 3).double()
    maps, labels = torch.randn(4, 5, 2, 3, generator=g).double(), torch.randint(0, 3, (4, 16, 24), generator=g)
    labels[0, :8], labels[2] = 255, 255
    value = linear.segmentation_loss(head, maps, labels, labels.numel())
    gradient = head.classify.weight.grad.clone()
    head.zero_grad()
    large = F.interpolate(head(maps), size=(16, 24), mode="bilinear", align_corners=False)
    expected = 0.0
    for image in range(4):
        for y in range(16):
            for x in range(24):
                if labels[image, y, x] != 255:
                    expected = expected - large[image, :, y, x].log_softmax(0)[labels[image, y, x]] / labels.numel()
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-9)
    assert torch.allclose(gradient, head.classify.weight.grad, atol=1e-12)


def test_votes_by_hand():
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [-1.0, 0.0]]), torch.tensor([0, 1, 1, 2])
    scores = patch_scores(bank, labels, torch.tensor([[2.0, 2.0], [3.0, 4.0]]), 3, 4, 0.5)
    assert scores[0].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])  # three equally near
    near, far = np.exp(0.6 / 0.5), np.exp(0.8 / 0.5)
    assert scores[1].tolist() == pytest.approx([near / (near + 2 * far), 2 * far / (near + 2 * far), 0, 0], rel=1e-5)


def test_clusters_are_matched_by_the_most_right_pixels():
    counts = torch.tensor([[1, 9, 0, 3], [8, 7, 0, 0]])  # 2 classes, 4 clusters
    table = matched(counts)
    assert table.tolist() == [[9, 1, 3], [7, 8, 0]]
    scores = label_sets.numbers_of(table)
    assert scores["aacc"] == pytest.approx(100 * 17 / 28)
    assert scores["miou"] == pytest.approx(100 * (9 / (13 + 7) + 8 / (15 + 1)) / 2)
    assert matched(torch.tensor([[5], [2]])).tolist() == [[5, 0, 0], [2, 0, 0]]  # fewer clusters than classes


# layouts


def test_folder_of_images_and_labels(tmp_path):
    colored_halves(tmp_path, 8, "train")
    colored_halves(tmp_path, 3, "val", seed=5)
    sets = label_maps.read(tmp_path)
    assert label_maps.matches(tmp_path) and {role: len(images) for role, images in sets.items()} == {
        "train": 8,
        "test": 3,
    }
    assert sets["test"].label_map(0).shape == (32, 48) and sets["test"].image(0).shape == (3, 32, 48)
    assert label_sets.scored_classes("x", sets, ("train", "test")).values == (0, 1, 2)
    classes = label_sets.scored_classes("x", sets, ("train", "test"), 1)
    assert classes.index(torch.tensor([[0, 1, 2, 255]])).tolist() == [[0, 255, 1, 255]]
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\nbird\n")
    named = label_sets.scored_classes("x", label_maps.read(tmp_path), ("test",))
    assert len(named) == 4 and named.name(3) == "bird"
    assert Subset(sets["test"], [2]).label_map(0).equal(sets["test"].label_map(2))
    Image.new("RGB", (48, 32)).save(tmp_path / "labels" / "val" / "1.png")
    with pytest.raises(UserError, match="1.png is not an 8-bit gray or indexed PNG"):
        label_maps.read(tmp_path)["test"].label_map(1)
    (tmp_path / "labels" / "val" / "1.png").unlink()
    with pytest.raises(UserError, match="1 of 3 label maps are missing"):
        label_maps.read(tmp_path)


def test_folders_without_splits_and_given_training_images(tmp_path):
    one, two = colored_halves(tmp_path / "one", 4), colored_halves(tmp_path / "two", 3, "val")
    colored_halves(two, 2, "train")
    report = api.evaluate("knn_segmentation", Colors(), train=one, test=two, **FAST["knn_segmentation"])
    assert report.protocol["train"] == 4 and report.protocol["test"] == 3  # not the two training images of `two`
    assert api.evaluate("knn_segmentation", Colors(), test=two, **FAST["knn_segmentation"]).protocol["train"] == 2
    assert api.evaluate("knn_segmentation", Colors(), train=one, test=one, size=32).protocol["train"] == 4


def test_yolo_labels_are_no_label_maps(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "1.txt").write_text("0 .5 .5 1 1")
    assert not label_maps.matches(tmp_path)


# end to end


@pytest.mark.parametrize("name", NAMES)
def test_colors_are_found(tmp_path, name):
    """Patches of one color each: everything is right but the row of pixels at the edge."""
    colored_halves(tmp_path, 12, "train")
    colored_halves(tmp_path, 6, "val", seed=5)
    report = api.evaluate(name, Colors(), test=tmp_path, **FAST[name])
    assert report.numbers["miou"] > 95 and report.numbers["macc"] > 97 and report.numbers["aacc"] > 97
    assert set(report.protocol["iou"]) == {"0", "1", "2"} and json.dumps(report.protocol)
    more = {"clusters": 3} if name.startswith("unsupervised") else {}  # the color of the ignored class is still there
    ignored = api.evaluate(name, Colors(), test=tmp_path, **FAST[name], ignored=2, **more)
    assert set(ignored.protocol["iou"]) == {"0", "1"} and ignored.numbers["miou"] > 95


@pytest.mark.parametrize("name", NAMES)
def test_ade_in_miniature(tmp_path, name):
    pairs = {"training": 6, "validation": 5}
    for part, count in pairs.items():
        colored_halves(tmp_path / "made", count, part, labels=(0, 7, 150))
        for kind, folder, ending in (("images", "images", "jpg"), ("labels", "annotations", "png")):
            target = tmp_path / "ADEChallengeData2016" / folder / part
            target.mkdir(parents=True)
            for i in range(count):
                with Image.open(tmp_path / "made" / kind / part / f"{i}.png") as picture:
                    picture.save(target / f"ADE_{i}.{ending}", quality=95)
    data = ade20k.read(tmp_path)
    assert set(data["test"].label_map(0).unique().tolist()) <= {6, 149, 255}
    report = api.evaluate(name, Colors(), test=tmp_path, **{**FAST[name], **ADE[name]})
    assert report.protocol["classes"] == 150
    if name == "knn_segmentation":
        assert set(report.protocol["iou"]) == {"6", "149"} and report.numbers["miou"] > 95


@pytest.mark.parametrize("options", [{"augment": False}, {"batch_norm": True}, {"blocks": (2,), "stride": 8}])
def test_options_of_the_linear_layer(tmp_path, options):
    colored_halves(tmp_path, 5, "train", size=(40, 64))
    colored_halves(tmp_path, 2, "val", seed=5, size=(40, 64))
    settings = {**FAST["linear_segmentation"], "iterations": 12, **options}
    report = api.evaluate("linear_segmentation", tiny_encoder(), test=tmp_path, **settings)
    again = api.evaluate("linear_segmentation", tiny_encoder(), test=tmp_path, **settings)
    assert report.numbers == again.numbers and report.protocol["width"] == (48 if "blocks" in options else 96)
    assert "iterations=12 instead of 160000" in report.protocol["differences"]


class Half:
    """One of two ranks, which takes the other's sums from a table."""

    def __init__(self, rank):
        self.rank, self.size, self.is_main = rank, 2, rank == 0

    def all_sum(self, tensor):
        return tensor

    def gather(self, tensor):
        return tensor

    def gather_objects(self, value):
        return [value]


def test_ranks_share_images_and_batches(tmp_path):
    colored_halves(tmp_path, 5, "train")
    colored_halves(tmp_path, 5, "val", seed=1)
    data, encoder = label_maps.read(tmp_path), Colors()
    options = linear.LinearSegmentationOptions(**{**FAST["linear_segmentation"], "iterations": 3})
    whole = [batch.tolist() for _, batches in linear.batch_rows(5, None, options) for batch in batches]
    shares = [[b.tolist() for _, batches in linear.batch_rows(5, Half(r), options) for b in batches] for r in (0, 1)]
    assert len(whole) == 3 and all(len(batch) == 4 for batch in whole)
    assert [sorted(a + b) for a, b in zip(*shares)] == [sorted(batch) for batch in whole]
    head, classes = linear.LinearHead(3, 3), label_sets.Classes((0, 1, 2))
    rest = (head, encoder, data["test"], classes, (), 32)
    halves = [linear.test_counts(*rest, Half(rank), options, {}) for rank in (0, 1)]
    assert torch.equal(sum(halves), linear.test_counts(*rest, None, options, {}))


def test_refusals(tmp_path):
    colored_halves(tmp_path, 2, "train")
    colored_halves(tmp_path, 2, "val")
    data = label_maps.read(tmp_path)
    for name in NAMES:
        with pytest.raises(UserError, match=f"{name}: the test images have no label maps; give test=FOLDER"):
            EVALUATIONS[name](Colors(), {**data, "test": object()})
    with pytest.raises(UserError, match="8 patches for 99 clusters|patches for 99 clusters"):
        EVALUATIONS["unsupervised_segmentation"](Colors(), data, clusters=99, size=8)
    with pytest.raises(UserError, match="size=4 is less than a patch of 8 pixels"):
        EVALUATIONS["linear_segmentation"](Colors(), data, size=4)
    Image.new("L", (10, 10)).save(tmp_path / "labels" / "train" / "0.png")
    with pytest.raises(UserError, match="is 48x32 pixels and its label map 10x10"):
        EVALUATIONS["linear_segmentation"](Colors(), data, **FAST["linear_segmentation"])


@pytest.mark.slow
def test_coco_pack(tmp_path):
    """Photographs with the stuff and things of COCO; 0 is unlabeled there. Raw colors already beat chance."""
    folder = packs.unpack("coco200")
    (tmp_path / "images").symlink_to(folder / "images")
    (tmp_path / "labels").symlink_to(folder / "semantic_segmentation" / "masks")
    data = label_maps.read(tmp_path)
    assert len(data["train"]) == len(data["test"]) == 100
    report = api.evaluate("knn_segmentation", Colors(), test=tmp_path, size=64, ignored=0, bank=5000)
    assert 100 < report.protocol["classes"] < 200 and 0.5 < report.numbers["miou"] < 20
    assert report.numbers["aacc"] > 8
    groups = api.evaluate("unsupervised_segmentation", Colors(), test=tmp_path, size=64, ignored=0, restarts=1)
    assert 0 < groups.numbers["miou"] < 20
