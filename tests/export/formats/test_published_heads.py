"""Numbers of heads of published networks against timm's models of the same size."""

import pytest
import timm
import torch

from maskwise.export.formats.published_heads import DINOV3_HEADS, HEADS, MOCO_V3_HEADS, heads_of

MODELS = {  # a timm model per size; `uncertain` without one
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224.mae",
    (1280, 32): "vit_huge_patch14_224.mae",
    (1408, 40): "vit_giant_patch14_clip_224",
    (1536, 40): "vit_giant_patch14_dinov2",
    (1664, 48): "vit_gigantic_patch14_clip_224",
}
DINOV3 = {
    (384, 12): "vit_small_patch16_dinov3",
    (768, 12): "vit_base_patch16_dinov3",
    (1024, 24): "vit_large_patch16_dinov3",
    (1280, 32): "vit_huge_plus_patch16_dinov3",
    (4096, 40): "vit_7b_patch16_dinov3",
}


def size_of(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    return (model.embed_dim, len(model.blocks)), model.blocks[0].attn.num_heads


@pytest.mark.parametrize("size", HEADS)
def test_heads_are_those_of_timms_models(size):
    assert size_of(MODELS[size]) == (size, HEADS[size])


@pytest.mark.parametrize("size", DINOV3)
def test_heads_of_dinov3_are_those_of_timms_models(size):
    assert size_of(DINOV3[size]) == (size, DINOV3_HEADS[size])


def test_other_sizes_and_fixed_tables_are_unknown():
    assert heads_of(48, 12) is None and heads_of(384, 11) is None
    table = torch.cat([torch.zeros(1, 1, 384), torch.ones(1, 4, 384)], dim=1)
    assert heads_of(384, 12, table) is None and heads_of(384, 12, table + 1) == 6
    assert heads_of(768, 12, table) == 12
    assert heads_of(384, 12, table, "moco_v3") == MOCO_V3_HEADS[384, 12] == 12


def test_the_architecture_of_a_run_tells_the_heads_of_its_width():
    for arch, width, heads in (
        ("vit_tiny", 192, 3),
        ("vit_small", 384, 6),
        ("deit_small", 384, 6),
        ("vit_base", 768, 12),
    ):
        assert heads_of(width, 7) is None and heads_of(width, 7, arch=arch) == heads
    assert heads_of(64, 7, arch="vit_small") is None and heads_of(384, 7, arch="resnet50") is None
    assert heads_of(384, 12, torch.zeros(1, 197, 384), arch="vit_small") is None  # 6, and 12 in MoCo v3
