"""Sheets of several models, of every block, and of the mass of the attention."""

import numpy as np
import pytest
import torch

from maskwise.data.datasets.shapes import Shapes
from maskwise.errors import UserError
from maskwise.evaluation.suite import figure_sheets
from maskwise.evaluation.suite.attention_sheets import attention_map
from maskwise.evaluation.suite.figure_sheets import block_attention, figure_sheet, overlay, pooling_title
from maskwise.functional.attention import mass_mask
from maskwise.imaging import drawing
from maskwise.nn import POOLINGS, Backbone, Encoder


def encoder(pooling="cls", **options):
    torch.manual_seed(len(options) + len(pooling))
    backbone = Backbone(
        "vit_tiny_patch16_224",
        image_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=2,
        class_token=pooling == "cls",
    )
    return Encoder(backbone, POOLINGS[pooling](24, **options)).eval()


def images(count=2):
    data = Shapes(count, size=32)
    return torch.stack([data.image(i) for i in range(count)])


@pytest.fixture
def drawn(monkeypatch):
    """The arguments with which sheets are drawn."""
    sheets = []
    monkeypatch.setattr(
        drawing, "sheet", lambda rows, names, tile: sheets.append((rows, names)) or np.zeros((8, 8, 3), np.uint8)
    )
    return sheets


def test_a_sweep_of_gamma_has_a_column_for_each(drawn):
    models = [(str(gamma), encoder("simpool", gamma=gamma)) for gamma in (None, 0.5, 1.25, 2.0)]
    pictures = images()
    figure_sheet(models, pictures)
    [(rows, titles)] = drawn
    assert titles == ["image", "no gamma", "gamma 0.5", "gamma 1.25", "gamma 2"] and len(rows) == 2
    for i, row in enumerate(rows):
        assert np.array_equal(row[0], pictures[i].permute(1, 2, 0).numpy())
        for (_, model), picture in zip(models, row[1:]):
            attention, grid = attention_map(model, pictures)
            assert np.array_equal(picture, drawing.overlay_heat(row[0], attention[i].reshape(grid).numpy(), 0.75))


def test_a_learned_gamma_is_named_and_alike_columns_take_the_names_of_models(drawn):
    learned = encoder("simpool", learn_gamma=True, gamma_max=5.0)
    with torch.no_grad():
        learned.pooling.exponent.fill_(3.25)
    assert pooling_title(learned) == "gamma 3.25"
    figure_sheet([("runs", encoder()), ("runs", encoder("cls"))], images(1))
    figure_sheet([("a", encoder()), ("b", encoder("simpool"))], images(1))
    assert [titles for _, titles in drawn] == [["image", "runs", "runs"], ["image", "class token", "gamma 1.25"]]


def test_blocks_come_first_and_end_in_the_last_blocks_attention(drawn):
    model, other, pictures = encoder(), encoder("simpool"), images()
    figure_sheet([("cls", model), ("simpool", other)], pictures, blocks=True)
    [(rows, titles)] = drawn
    assert titles == ["image", "block 1", "block 2", "block 3", "class token", "gamma 1.25"]
    for row in rows:
        assert np.array_equal(row[3], row[4]) and not np.array_equal(row[1], row[2])
    maps = block_attention(model, pictures)
    torch.testing.assert_close(maps[2][0], attention_map(model, pictures)[0])
    assert [grid for _, grid in maps] == [(4, 4)] * 3
    with pytest.raises(UserError, match="this model has no class token"):
        figure_sheet([("simpool", other)], pictures, blocks=True)


def test_mass_colors_the_patches_that_hold_it(drawn):
    model, pictures = encoder("simpool"), images()
    figure_sheet([("a", model)], pictures, mass=0.6)
    [(rows, _)] = drawn
    attention, grid = attention_map(model, pictures)
    chosen = mass_mask(attention, 0.6)
    assert 0.4 < chosen.double().mean() < 0.8
    for i, (image, picture) in enumerate(rows):
        mask = chosen[i].reshape(grid).numpy().repeat(8, 0).repeat(8, 1)
        assert np.array_equal(picture[~mask], image[~mask])
        expected = 0.45 * image[mask] + 0.55 * np.array(figure_sheets.SEGMENT)
        assert np.abs(picture[mask] - expected).max() <= 0.5 + 1e-9
    flat = overlay(np.zeros((4, 4, 3), np.uint8), torch.tensor([0.7, 0.1, 0.1, 0.1]), (2, 2), 0.6)
    assert flat[:2, :2].any() and not flat[2:].any() and not flat[:, 2:].any()


def test_models_without_attention_are_refused():
    with pytest.raises(UserError, match="runs gives no attention to draw: leave it out"):
        figure_sheet([("a", encoder()), ("runs", encoder("gap"))], images(1))
