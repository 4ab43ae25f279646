"""Layer decay against a table written out by hand."""

import pytest

from maskwise.errors import UserError
from maskwise.evaluation.finetune import FineTuned
from maskwise.evaluation.probes.layer_decay import layer_groups
from support.tiny_sets import tiny_encoder

BLOCK = (
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.bias",
    "attn.proj.bias",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.bias",
    "mlp.fc2.bias",
)
MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
# two blocks, decay .5: layer -> (lr_scale, decayed names, names without decay)
TABLE = {
    0: (
        0.125,
        {"encoder.backbone.patch_embed.proj.weight"},
        {"encoder.backbone.cls_token", "encoder.backbone.pos_embed", "encoder.backbone.patch_embed.proj.bias"},
    ),
    1: (
        0.25,
        {f"encoder.backbone.blocks.0.{name}" for name in MATRICES},
        {f"encoder.backbone.blocks.0.{name}" for name in BLOCK},
    ),
    2: (
        0.5,
        {f"encoder.backbone.blocks.1.{name}" for name in MATRICES},
        {f"encoder.backbone.blocks.1.{name}" for name in BLOCK},
    ),
    3: (
        1.0,
        {"encoder.pooling.wq.weight", "encoder.pooling.wk.weight", "head.weight"},
        {
            "encoder.pooling.norm_patches.weight",
            "encoder.pooling.norm_patches.bias",
            "encoder.norm.weight",
            "encoder.norm.bias",
            "head.bias",
        },
    ),
}


def test_groups_equal_the_table():
    model = FineTuned(tiny_encoder("simpool", depth=2, class_token=True), 5)
    groups = {(group["layer"], group["weight_decay"] > 0): group for group in layer_groups(model, 2, 0.05, 0.5)}
    assert len(groups) == 8
    for layer, (scale, decayed, plain) in TABLE.items():
        for key, names, decay in (((layer, True), decayed, 0.05), ((layer, False), plain, 0.0)):
            assert (
                set(groups[key]["names"]) == names
                and groups[key]["lr_scale"] == scale
                and groups[key]["weight_decay"] == decay
            )
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_backbone_without_blocks():
    model = FineTuned(tiny_encoder(depth=1), 2)
    assert {group["lr_scale"] for group in layer_groups(model, None, 0.05)} == {1.0}
    with pytest.raises(UserError, match="give layer_decay=1"):
        layer_groups(model, None, 0.05, 0.75)
