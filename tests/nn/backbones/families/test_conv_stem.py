"""Convolutional stems: parity with timm, what a token sees, masks, sizes, weights and refusals."""

import functools

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from maskwise.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn import Backbone
from maskwise.nn.backbones.families.conv_stem import StemOptions

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 32}
CONV = {"stem": "conv", "stem_channels": (8, 12), "stem_strides": (2, 2)}
NAMES = {  # patch in pixels
    "vit_base_mci_224": ({}, 16),
    "vit_tiny_r_s16_p8_224": ({}, 32),
    "vit_tiny_r_s16_p8_384": ({"patch_size": 4}, 4),
    "vitamin_small_224": ({}, 16),
    "vit_small_r26_s32_224": ({}, 32),
}


def tiny(**options):
    torch.manual_seed(0)
    return Backbone("vit_tiny_patch16_224", **{**TINY, **CONV, **options}).double()


def shaken(module):
    """Change all weights, so that nothing has a neutral value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return module


def images(*size, count=2):
    return torch.randn(count, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


CASES = {
    "two layers of stride 2": {},
    "no class token": {"class_token": False},
    "registers": {"reg_tokens": 2},
    "group norm": {"stem_norm_layer": "group"},
    "batch norm": {"stem_norm_layer": "batch"},
    "one layer of stride 1 more": {"stem_channels": (8, 8, 12), "stem_strides": (2, 1, 2)},
    "kernels as wide as strides": {"stem_strides": (4, 2), "stem_kernels": (4, 2)},
    "a wide kernel": {"stem_strides": (4, 1), "stem_kernels": (7, 3)},
    "norm before the blocks": {"pre_norm": True},
    "oblong images": {"image_size": (32, 16)},
}


def convolutions(stem_channels, stem_strides, stem_kernels=None, stem_norm_layer="layer", **_):
    """timm's stem, its paddings written out: half the kernel, or 0 where patches do not overlap."""
    kernels = stem_kernels or (3,) * len(stem_strides)
    return ConvStem(
        depth=len(stem_channels) + 1,
        channels=(*stem_channels, 32),
        kernel_size=(*kernels, 1),
        stride=(*stem_strides, 1),
        padding=(*(0 if k == s else (k - 1) // 2 for k, s in zip(kernels, stem_strides)), 0),
        norm_layer={"layer": "layernorm2d", "group": "groupnorm1", "batch": "batchnorm2d"}[stem_norm_layer],
    )


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_tokens_equal_timms_own_forward(options):
    backbone = shaken(tiny(**options)).eval()
    plain = {**TINY, **CONV, **options}
    stem = convolutions(**{key: plain.pop(key) for key in list(plain) if key.startswith("stem_")})
    plain = {("img_size" if key == "image_size" else key): value for key, value in plain.items() if key != "stem"}
    twin = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        global_pool="",
        fc_norm=False,
        patch_size=1,
        embed_layer=functools.partial(HybridEmbed, backbone=stem, proj=False),
        **plain,
    ).double()
    twin.load_state_dict(backbone.state_dict())
    x = images(*backbone.image_size)
    tokens = backbone(x)
    own = backbone.norm(torch.cat([tokens.prefix, tokens.patches], dim=1))
    torch.testing.assert_close(own, twin.eval()(x), rtol=0, atol=1e-9)
    assert tokens.grid == tuple(side // backbone.patch_size[0] for side in backbone.image_size)


@pytest.mark.parametrize("name", NAMES)
def test_named_hybrids_equal_timms_own_forward(name):
    options, patch = NAMES[name]
    torch.manual_seed(0)
    backbone = shaken(Backbone(name, image_size=64, depth=1, **options)).double().eval()
    in_positions = {"patch_size": patch // 4} if options else {}  # of a map of stride 4
    twin = timm.create_model(
        name, num_classes=0, global_pool="", fc_norm=False, img_size=64, depth=1, **in_positions
    ).double()
    twin.load_state_dict(backbone.state_dict())
    tokens = backbone(images(64, 64))
    own = backbone.norm(torch.cat([tokens.prefix, tokens.patches], dim=1))
    torch.testing.assert_close(own, twin.eval()(images(64, 64)), rtol=0, atol=1e-9)
    assert backbone.patch_size == (patch, patch) and tokens.grid == (64 // patch, 64 // patch)
    assert Backbone(**backbone.spec()).patch_size == (patch, patch)


def seen_pixels(backbone, row, column):
    """Rows and columns of pixels that patch (row, column) depends on, before the blocks."""
    x = images(32, 32, count=1).requires_grad_()
    tokens = backbone._embed(x, None, (8, 8))[0, -64:].unflatten(0, (8, 8))
    seen = torch.autograd.grad(tokens[row, column].square().sum(), x)[0].abs().sum((0, 1)) > 0
    return torch.nonzero(seen.any(1))[:, 0].tolist(), torch.nonzero(seen.any(0))[:, 0].tolist()


def test_a_token_of_overlapping_kernels_sees_three_pixels_above_and_left_of_its_patch():
    """3 x 3 and again 3 x 3 at stride 2: 7 pixels from 3 before the patch, as docs/design.md says."""
    rows, columns = seen_pixels(tiny(), 3, 5)
    assert rows == list(range(4 * 3 - 3, 4 * 3 + 4)) and columns == list(range(4 * 5 - 3, 4 * 5 + 4))


def test_a_token_of_kernels_as_wide_as_their_strides_sees_its_patch_alone():
    rows, columns = seen_pixels(tiny(stem_kernels=(2, 2)), 3, 5)
    assert rows == list(range(12, 16)) and columns == list(range(20, 24))


def test_a_group_norm_lets_every_token_see_every_pixel():
    rows, columns = seen_pixels(tiny(stem_norm_layer="group"), 3, 5)
    assert rows == columns == list(range(32))


@pytest.mark.parametrize("kernels, hidden_rows", [((2, 2), slice(8, 20)), (None, slice(8, 17))])
@pytest.mark.parametrize("class_token", [True, False])
def test_masked_patches_have_no_influence_where_no_visible_patch_sees_them(kernels, hidden_rows, class_token):
    """Patches of rows and columns 2 to 4 hidden: with overlap the 3 last pixels are seen by the next patches."""
    backbone = shaken(tiny(mask_token=True, stem_kernels=kernels, class_token=class_token)).train()
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:5, 2:5] = True
    x, changed = images(32, 32), images(32, 32)
    changed[..., hidden_rows, hidden_rows] += 1.0
    before, after = backbone(x, mask.flatten(1)), backbone(changed, mask.flatten(1))
    assert torch.equal(before.patches, after.patches) and torch.equal(before.prefix, after.prefix)
    assert not torch.equal(backbone(x).patches, backbone(changed).patches)
    wider = images(32, 32)
    wider[..., 8 : hidden_rows.stop + 1, 8:20] += 1.0
    assert not torch.equal(before.patches, backbone(wider, mask.flatten(1)).patches)


def test_masked_tokens_are_the_mask_token_at_their_position():
    backbone = shaken(tiny(mask_token=True)).train()
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[0, 5] = mask[1, 60] = True
    embedded = backbone._embed(images(32, 32), mask, (8, 8))[:, 1:]
    for image, patch in ((0, 5), (1, 60)):
        expected = backbone.mask_token[0] + backbone.pos_embed[0, 1 + patch]
        torch.testing.assert_close(embedded[image, patch], expected)
    visible = backbone._embed(images(32, 32), None, (8, 8))[:, 1:]
    assert torch.equal(embedded[~mask], visible[~mask])


@pytest.mark.parametrize("position", ["offset", "size", "offset_always"])
def test_local_crops_get_resampled_positions(position):
    backbone = shaken(tiny(position=position))
    x = images(16, 24)
    stem = backbone.patch_embed.backbone(x).flatten(2).transpose(1, 2)
    table = position_table(backbone.pos_embed[:, 1:], (8, 8), (4, 6), position)
    torch.testing.assert_close(backbone._embed(x, None, (4, 6))[:, 1:], stem + table)
    assert backbone(x).grid == (4, 6)


def test_packed_batches_and_recomputation_equal_plain_ones():
    backbone = shaken(tiny(drop_path=0.4, mask_token=True)).train()
    keys = torch.arange(2)
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(3)) < 0.4
    batches = [(images(32, 32), mask, keys), (images(16, 16), None, keys + 5)]
    for packed, (x, hidden, key) in zip(backbone.forward_packed(batches), batches):
        torch.testing.assert_close(packed.patches, backbone(x, hidden, drop_key=key).patches)
    expected = backbone(images(32, 32), mask, drop_key=keys).patches
    for checkpointing in ("elementwise", "blocks"):
        backbone.set_execution(checkpointing=checkpointing)
        torch.testing.assert_close(backbone(images(32, 32), mask, drop_key=keys).patches, expected)


def test_convolutions_run_in_channels_last_memory():
    backbone, seen = tiny(), []
    for layer in backbone.patch_embed.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    backbone(images(32, 32))
    assert len(seen) == 3 and all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_the_description_rebuilds_the_stem():
    backbone = tiny(stem_norm_layer="group", stem_kernels=(5, 2))
    again = Backbone(**backbone.spec()).double()
    again.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(again(images(32, 32)).patches, backbone(images(32, 32)).patches)
    assert backbone.patch_size == (4, 4) and tiny(patch_size=4).spec()["patch_size"] == [4, 4]


def test_weights_of_another_image_size_are_loaded(tmp_path):
    made = shaken(tiny())
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    for side in (32, 24):
        read = tiny(image_size=side, weights=tmp_path / "weights.pth")
        grid = (side // 4, side // 4)
        torch.testing.assert_close(
            read.pos_embed[:, 1:], position_table(made.pos_embed[:, 1:], (8, 8), grid, "size").float().double()
        )
        torch.testing.assert_close(read.patch_embed.state_dict(), made.patch_embed.float().double().state_dict())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"stem": "patch"}, "backbone.stem_channels belongs to a stem of convolutions: set backbone.stem=conv"),
        ({"stem_strides": None}, "backbone.stem=conv lacks stem_strides"),
        ({"stem_channels": None}, "backbone.stem=conv lacks stem_channels"),
        ({"stem_strides": (2,)}, "give each one positive number per layer"),
        ({"stem_channels": (8, 0)}, "give each one positive number per layer"),
        ({"stem_kernels": (3, 4)}, "a kernel is as wide as its stride, or wider and odd"),
        ({"stem_kernels": (1, 3)}, "a kernel is as wide as its stride, or wider and odd"),
        ({"stem_norm_layer": "local"}, "backbone.stem_norm_layer='local' is unknown: choose layer, group, batch"),
        ({"patch_size": 8}, "backbone.patch_size=8 is another than the product of stem_strides=(2, 2), 4"),
        ({"image_size": 30}, "image_size 30x30 is not a multiple of the patch 4x4"),
    ],
)
def test_wrong_stems_are_refused_in_one_line(options, words):
    with pytest.raises(UserError) as caught:
        tiny(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_image_sizes_that_do_not_divide_are_refused_for_named_hybrids():
    """MobileCLIP's stem has two positions on 40 pixels, which timm takes for a patch of 20."""
    with pytest.raises(UserError, match="image_size 40x40 is not a multiple of the patch 16x16"):
        Backbone("vit_base_mci_224", image_size=40, depth=1)


def test_wrong_patches_of_named_hybrids_are_refused():
    for name, options, words in (
        ("vit_tiny_r_s16_p8_224", {"patch_size": 6}, "give a multiple of 4"),
        ("vit_base_mci_224", {"patch_size": 32}, "its stem ends with patches of 16 pixels"),
        ("vit_tiny_r_s16_p8_224", CONV, "the stem is part of the name vit_tiny_r_s16_p8_224"),
        ("vit_small_resnet26d_224", {}, "timm cannot open it without downloading a ResNet for its stem"),
    ):
        with pytest.raises(UserError, match=words):
            Backbone(name, **options)


def test_a_stem_of_kernels_wider_than_strides_keeps_the_grid():
    """Output of every layer is input / stride: kernel 7 pads by 3, kernel 4 at stride 4 by 0."""
    stem = StemOptions.of({"stem": "conv", "stem_channels": (4, 4), "stem_strides": (4, 3), "stem_kernels": (7, 3)})
    assert stem.patch == 12 and stem.arguments(8, 3)["padding"] == (3, 0, 0)
    assert ConvStem(**stem.arguments(8, 3))(torch.zeros(1, 3, 48, 36)).shape == (1, 8, 4, 3)
