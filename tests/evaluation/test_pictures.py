"""Sheets and curves: the right number of pictures in the right place, from an encoder whose attention is known."""

import json

import numpy as np
import pytest
import torch

from maskwise.data.shapes import Shapes
from maskwise.data.subset import evenly
from maskwise.evaluation.pictures import TILE, attention_sheet, curves, look, training_sheet
from maskwise.evaluation.quickstart import quickstart
from maskwise.evaluation.report import Report
from maskwise.methods.masking import MASKINGS
from maskwise.nn import CLS, Backbone, Encoder


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mask_token=True)
    return Encoder(backbone, CLS(24))


def test_sheet_has_a_column_for_everything_asked(encoder):
    images = torch.stack([encoder.uncoloured(Shapes(3, size=32).image(i)) for i in range(3)])
    rules = {"high": MASKINGS["attmask_high"](ratio=0.5, var=0.0, prob=1.0), "random": MASKINGS["random"](ratio=0.5, var=0.0, prob=1.0)}
    sheet = attention_sheet(encoder, images, rules, torch.arange(3), untrained=encoder)
    assert sheet.dtype == np.uint8 and sheet.shape[1] // TILE == 5 and sheet.shape[0] // TILE == 3
    attention, grid = look(encoder, images)
    assert attention.shape == (3, 16) and grid == (4, 4)
    grey = np.abs(sheet[:, 3 * (TILE + 4) : 4 * (TILE + 4)].astype(int) - [118, 118, 124]).max(-1) < 16
    assert 0.35 < grey.mean() < 0.6  # half of the patches are covered


def test_training_sheet_leaves_no_trace(encoder):
    images = torch.stack([encoder.uncoloured(Shapes(2, size=32).image(i)) for i in range(2)])
    encoder.train()
    state = torch.random.get_rng_state()
    once, twice = (training_sheet(encoder, images, MASKINGS["attmask_hint"](), torch.arange(2)) for _ in range(2))
    assert encoder.training and torch.equal(state, torch.random.get_rng_state()) and (once == twice).all()


def test_curves_read_a_run(tmp_path):
    lines = [{"step": s, "loss": 8.0 / s, "cls": 5.0 / s, "patch": 3.0 / s, "teacher_entropy": 4.0, "teacher_spread": 5.0} for s in (1, 2, 3)]
    lines.append({"step": 3, "report": "knn", "numbers": {"top1": 40.0, "top5": 80.0}})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves(path).shape == (3 * 360, 640, 3)
    path.write_text("")
    assert curves(path).shape[1:] == (640, 3)


def test_quickstart_tells_the_story(encoder, tmp_path):
    data = {"train": Shapes(48, size=32), "test": Shapes(24, size=32, split="test")}
    story = quickstart(encoder, encoder, tmp_path, data, bank=32, queries=16)
    numbers = story.numbers
    assert numbers["knn_teacher_pooled"] == numbers["knn_untrained_pooled"] and 0 < numbers["hidden_chance"] < 100
    assert {"knn_pixels", "knn_chance", "hidden_random", "hidden_block", "hidden_attmask_hint"} <= set(numbers)
    text = str(story)
    for words in ("trained teacher", "raw pixels", "block-wise", "Where everything is", "What to try next", "sheet.png"):
        assert words in text
    assert (tmp_path / "pictures" / "sheet.png").is_file()
    assert Report.load(tmp_path / "reports" / "quickstart.json").numbers == pytest.approx(numbers)


def test_quickstart_without_labels_or_masks(encoder, tmp_path):
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

    story = quickstart(encoder, encoder, tmp_path, {"train": Bare(), "test": Bare()})
    assert story.numbers == {} and "Where everything is" in str(story)


def test_some_keeps_rows_and_labels_together():
    whole = Shapes(40, size=32)
    few = evenly(whole, 10)
    assert len(few) == 10 and few.labels.tolist() == [int(whole.labels[4 * i]) for i in range(10)]
    assert torch.equal(few.image(3), whole.image(12)) and torch.equal(few.mask(3), whole.mask(12)) and few.name(3) == whole.name(12)
