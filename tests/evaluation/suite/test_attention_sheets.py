"""Attention sheets, training curves and the run report."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from maskwise.data.datasets.shapes import Shapes
from maskwise.data.datasets.subset import subsample_evenly
from maskwise.evaluation.report import Report
from maskwise.evaluation.suite.attention_sheets import TILE, attention_map, attention_sheet, curves, training_sheet
from maskwise.evaluation.suite.run_report import run_report
from maskwise.imaging import drawing
from maskwise.imaging.charts import SIZE
from maskwise.methods import DINO
from maskwise.methods.masking import MASKINGS
from maskwise.methods.student_teacher import Views
from maskwise.nn import CLS, POOLINGS, Backbone, Encoder, ProjectionHead


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    backbone = Backbone(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mask_token=True
    )
    return Encoder(backbone, CLS(24))


def test_sheet_has_a_column_for_each_map_and_mask(encoder):
    images = torch.stack([encoder.uint8_crop(Shapes(3, size=32).image(i)) for i in range(3)])
    rules = {
        "high": MASKINGS["attmask_high"](ratio=0.5, var=0.0, prob=1.0),
        "random": MASKINGS["random"](ratio=0.5, var=0.0, prob=1.0),
    }
    sheet = attention_sheet(encoder, images, rules, torch.arange(3), untrained=encoder)
    assert sheet.dtype == np.uint8 and sheet.shape[1] // TILE == 5 and sheet.shape[0] // TILE == 3
    attention, grid = attention_map(encoder, images)
    assert attention.shape == (3, 16) and grid == (4, 4)
    gray = np.abs(sheet[:, 3 * (TILE + 4) : 4 * (TILE + 4)].astype(int) - [118, 118, 124]).max(-1) < 16
    assert 0.35 < gray.mean() < 0.6  # half of the patches are covered
    mask = rules["high"](attention[:, None], grid, step=0, sample_ids=torch.arange(3), views=1)
    title = sheet.shape[0] - 3 * (TILE + 4) - 4
    assert title > 0 and (sheet[4:title] < 120).all(-1).sum() > 100  # titles above the pictures
    for image in range(3):
        top = 4 + title + image * (TILE + 4)
        # centers of the 4 x 4 patches
        covered = gray[top + TILE // 8 : top + TILE : TILE // 4, 4 + TILE // 8 : 4 + TILE : TILE // 4]
        assert np.array_equal(covered, mask[image].reshape(grid).numpy())


class TopRight(nn.Module):
    """An encoder with attention on a 2 x 2 grid, the most at the top right and the least at the bottom left."""

    mean, std, pooling = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), SimpleNamespace(k=1)
    attention = torch.tensor([0.2, 0.5, 0.1, 0.15])

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return SimpleNamespace(attention=self.attention.expand(len(images), 2, 4), grid=(2, 2))


def test_a_sheet_by_hand():
    """Image, attention and mask on white: the top right is brightest and covered, the bottom left darkest."""
    high = MASKINGS["attmask_high"](ratio=0.25, var=0.0, prob=1.0)
    low = MASKINGS["attmask_low"](ratio=0.25, var=0.0, prob=1.0)
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    sheet = attention_sheet(TopRight(), white, {"high": high, "low": low}, torch.arange(1)).astype(int)
    top = sheet.shape[0] - TILE - 4
    picture, heat, covered, least = (sheet[top:-4, 4 + i * (TILE + 4) :][:, :TILE].sum(axis=2) for i in range(4))

    def patches(tile):
        """The four patches, each of one color."""
        parts = tile.reshape(2, TILE // 2, 2, TILE // 2).transpose(0, 2, 1, 3).reshape(4, -1)
        assert (parts == parts[:, :1]).all()
        return parts[:, 0].tolist()

    assert patches(picture) == [3 * 255] * 4
    bright = patches(heat)
    assert bright[1] > bright[0] > bright[3] > bright[2]
    assert [value < 3 * 255 for value in patches(covered)] == [False, True, False, False]
    assert [value < 3 * 255 for value in patches(least)] == [False, False, True, False]


def test_training_sheet_keeps_mode_and_random_state(encoder):
    images = torch.stack([encoder.uint8_crop(Shapes(2, size=32).image(i)) for i in range(2)])
    encoder.train()
    state = torch.random.get_rng_state()
    once, twice = (training_sheet(encoder, images, MASKINGS["attmask_hint"](), torch.arange(2)) for _ in range(2))
    assert encoder.training and torch.equal(state, torch.random.get_rng_state()) and (once == twice).all()


def test_a_sheet_shows_the_masks_of_training_for_several_query_vectors():
    """With k queries training follows their maximum per patch; their mean is nearly uniform."""
    torch.manual_seed(0)
    size = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    backbone = Backbone("vit_tiny_patch16_224", mask_token=True, **size)
    encoder = Encoder(backbone, POOLINGS["slot"](24, k=3, reduce="mean"))
    method = DINO(encoder, ProjectionHead(24, 8), masking=MASKINGS["attmask_high"](ratio=0.5, var=0.0, prob=1.0))
    images = torch.stack([encoder.uint8_crop(Shapes(3, size=32).image(i)) for i in range(3)])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (encoder.mean, encoder.std))
    features = method.teacher_features((images / 255 - mean) / std)
    trained = method.sample_masks(features, Views(3, 1, 1), 0, torch.arange(3)).mask
    attention, grid = attention_map(method.teacher.encoder, images)
    torch.testing.assert_close(attention, features.attention.amax(dim=1))
    drawn = method.masking(attention[:, None], grid, step=0, sample_ids=torch.arange(3), views=1)
    assert torch.equal(drawn, trained) and drawn.sum() == 3 * 8
    mean_masks = method.masking(features.attention, grid, step=0, sample_ids=torch.arange(3), views=1)
    assert not torch.equal(mean_masks, trained)


def test_sheets_name_maskings_by_the_keys_of_recipes(encoder, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(
        drawing, "sheet", lambda rows, names, tile: titles.append(names) or np.zeros((8, 8, 3), np.uint8)
    )
    images = torch.stack([encoder.uint8_crop(Shapes(1, size=32).image(0))])
    for masking in (MASKINGS["attmask_low"](), MASKINGS["block"](), MASKINGS["none"]()):
        training_sheet(encoder, images, masking, torch.arange(1))
    run_report(encoder, encoder, tmp_path, {"train": Shapes(24, size=32), "test": Shapes(8, size=32, split="test")})
    assert titles == [
        ["image", "teacher", "attmask_low"],
        ["image", "teacher", "block"],
        ["image", "teacher", "none"],
        ["image", "untrained", "teacher", "attmask_high", "attmask_hint", "random", "block"],
    ]


def test_curves_read_a_run(tmp_path):
    lines = [
        {"step": s, "loss": 8.0 / s, "cls": 5.0 / s, "patch": 3.0 / s, "teacher_entropy": 4.0, "teacher_spread": 5.0}
        for s in (1, 2, 3)
    ]
    lines.append({"step": 3, "report": "knn", "numbers": {"top1": 40.0, "top5": 80.0}})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves(path).shape == (3 * SIZE[0], SIZE[1], 3)
    path.write_text("")
    assert curves(path).shape == (*SIZE, 3)


def test_run_report_has_numbers_files_and_next_steps(encoder, tmp_path):
    data = {"train": Shapes(48, size=32), "test": Shapes(24, size=32, split="test")}
    report = run_report(encoder, encoder, tmp_path, data, bank=32, queries=16)
    numbers = report.numbers
    assert numbers["knn_teacher_pooled"] == numbers["knn_untrained_pooled"] and 0 < numbers["hidden_chance"] < 100
    assert {"knn_pixels", "knn_chance", "hidden_random", "hidden_block", "hidden_attmask_hint"} <= set(numbers)
    text = str(report)
    for words in ("trained teacher", "raw pixels", "attmask_high, untrained", "Files", "Next steps", "sheet.png"):
        assert words in text
    assert "k-NN top-1, per cent (k = 20, bank of 32 images, 16 queries; chance 12.5)" in text
    listed = text[text.index("Files") :].partition("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in listed] == [
        str(tmp_path / name) for name in ("pictures/sheet.png", "reports/run_report.json")
    ]
    assert len({line.index(content) for line, content in zip(listed, ("images, attention", "the numbers above"))}) == 1
    assert (tmp_path / "pictures" / "sheet.png").is_file()
    assert Report.load(tmp_path / "reports" / "run_report.json").numbers == pytest.approx(numbers)


def test_run_report_without_labels_or_masks(encoder, tmp_path):
    class Bare:
        labels, classes = None, None
        shapes = Shapes(8, size=32)

        def __len__(self):
            return 8

        def image(self, i):
            return self.shapes.image(i)

        def name(self, i):
            return str(i)

        def fingerprint(self):
            return "bare"

    report = run_report(encoder, encoder, tmp_path, {"train": Bare(), "test": Bare()})
    assert report.numbers == {} and "Files" in str(report)


def test_subsample_evenly_keeps_rows_and_labels_together():
    whole = Shapes(40, size=32)
    few = subsample_evenly(whole, 10)
    assert len(few) == 10 and few.labels.tolist() == [int(whole.labels[4 * i]) for i in range(10)]
    assert (
        torch.equal(few.image(3), whole.image(12))
        and torch.equal(few.mask(3), whole.mask(12))
        and few.name(3) == whole.name(12)
    )
