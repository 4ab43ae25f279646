"""Swin and Swin V2 backbones: window attention against explicit loops, masks, drop path, export."""

import pytest
import timm
import torch
import torch.nn.functional as F

import maskwise
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.nn.backbones.families.swin import SwinFamily
from maskwise.nn.backbones.families.swin_v2 import SwinV2Family
from support.map_networks import images, perturbed

SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 4}


def swin(name="swin_tiny_patch4_window7_224", **options):
    torch.manual_seed(0)
    return Backbone(name, **{"image_size": 64, **SWIN, **options})


def swin_v2(**options):
    return swin("swinv2_tiny_window8_256", **options)


def test_small_maps_use_the_middle_of_the_bias_table():
    """A map smaller than the window is one window: timm's model for that size with tables cut by hand."""
    backbone = perturbed(swin(), by=0.3)
    small = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=32, **SWIN).double().eval()
    state = backbone.state_dict()
    for key, table in small.state_dict().items():
        if key.endswith("bias_table"):
            large, side = (int(round(len(rows) ** 0.5)) for rows in (state[key], table))
            cut = (large - side) // 2
            state[key] = state[key].unflatten(0, (large, large))[cut : large - cut, cut : large - cut].flatten(0, 1)
    small.load_state_dict(state)
    x = images(32)
    torch.testing.assert_close(backbone.norm(backbone(x).patches).unflatten(1, (1, 1)), small.forward_features(x))


@pytest.mark.parametrize(
    "sides, shifted", [((8, 8), True), ((5, 6), False), ((5, 6), True), ((3, 9), True), ((2, 3), True)]
)
def test_window_attention_equals_an_explicit_loop(sides, shifted):
    torch.manual_seed(1)
    attn = perturbed(swin().layers[0].blocks[0].attn, by=0.3)  # one head of width 8
    x = torch.randn(1, *sides, 8, dtype=torch.float64)
    window = [min(4, side) for side in sides]
    step = [size // 2 if shifted and side > size else 0 for size, side in zip(window, sides)]
    whole = [-(-side // size) * size for size, side in zip(window, sides)]  # padded to whole windows
    padded = torch.zeros(*whole, 8, dtype=torch.float64)
    padded[: sides[0], : sides[1]] = x[0]
    q, k, v = attn.qkv(padded).chunk(3, dim=-1)
    table = attn.relative_position_bias_table.reshape(7, 7)
    expected = torch.zeros(*sides, 8, dtype=torch.float64)
    for i in range(sides[0]):
        for j in range(sides[1]):

            def locate(a, b):
                """Return the window of a position, its shifted coordinates, and whether the shift wraps it."""
                at = [(x - shift) % side for x, shift, side in zip((a, b), step, whole)]
                return [x // size for x, size in zip(at, window)], at, [x < shift for x, shift in zip((a, b), step)]

            window_q, at_q, wrapped_q = locate(i, j)
            logits, values = [], []
            for a in range(whole[0]):
                for b in range(whole[1]):
                    window_k, at_k, wrapped_k = locate(a, b)
                    if window_k == window_q and wrapped_k == wrapped_q:
                        offset = table[at_q[0] - at_k[0] + 3, at_q[1] - at_k[1] + 3]
                        logits.append((q[i, j] @ k[a, b]) * attn.scale + offset)
                        values.append(v[a, b])
            expected[i, j] = torch.stack(logits).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(SwinFamily().attend(attn, x, shifted, {})[0], attn.proj(expected))


@pytest.mark.parametrize("side, sizes", [(64, 4), (32, 1)])
def test_swin_v2_uses_the_middle_of_its_table_for_smaller_maps(side, sizes):
    """Explicit cosines, factor and table; coordinates are those of the built windows, which timm would stretch."""
    backbone = perturbed(swin_v2(), by=0.3)
    attn, x = backbone.layers[0].blocks[0].attn, torch.randn(2, 2, 3, 8, dtype=torch.float64)
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table[0]))  # [7, 7, 1]
    q, k, v = (
        part.flatten(1, 2)
        for part in torch.cat(
            [F.linear(x, w, b) for w, b in zip(attn.qkv.weight.chunk(3), (attn.q_bias, None, attn.v_bias))], -1
        ).chunk(3, -1)
    )
    logits = (
        F.normalize(q, dim=-1)
        @ F.normalize(k, dim=-1).transpose(1, 2)
        * attn.logit_scale.clamp(max=4.605170185988092).exp()[0]
    )
    positions = [(i, j) for i in range(2) for j in range(3)]
    bias = torch.stack(
        [torch.stack([table[a[0] - b[0] + 3, a[1] - b[1] + 3, 0] for b in positions]) for a in positions]
    )
    expected = attn.proj((logits + bias).softmax(-1) @ v).unflatten(1, (2, 3))
    torch.testing.assert_close(SwinV2Family().attend(attn, x, True, {}), expected)
    assert backbone(images(side)).patches.shape == (2, sizes, 64)


def test_swin_v2_scales_its_branches_after_their_norms(monkeypatch):
    backbone, x = perturbed(swin_v2(drop_path=0.5), by=0.3), images(64)
    factors = torch.rand(backbone.depth, 2, 2, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(backbone.drop_path, "forward", lambda batch, like, key: factors)
    expected, at = backbone.patch_embed(x), 0
    for stage in backbone.layers:
        expected = stage.downsample(expected)
        for block in stage.blocks:
            first, second = factors[at].unsqueeze(-1)
            expected = expected + first * block.norm1(block._attn(expected))
            expected, at = expected + second * block.norm2(block.mlp(expected)), at + 1
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], expected.permute(0, 3, 1, 2))


def test_swin_masks_and_its_token_is_in_every_training_graph():
    backbone = swin(mask_token=True).train()
    x = images(64, dtype=torch.float32)
    assert backbone.mask_token.shape == (1, 8) and backbone.mask_token.eq(0).all()
    backbone(x).patches.sum().backward()
    assert backbone.mask_token.grad.eq(0).all()
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 1] = True
    backbone.eval()
    assert torch.equal(backbone(x, torch.zeros_like(mask)).patches, backbone(x).patches)
    changed = backbone(x, mask).patches
    assert not torch.equal(changed[0], backbone(x).patches[0]) and torch.equal(changed[1], backbone(x).patches[1])
    teacher = swin(mask_token=True).freeze_as_teacher_()
    torch.testing.assert_close(teacher.train()(x, mask).patches, swin()(x, mask).patches)  # zeros, as a new token


@pytest.mark.slow
def test_exported_swin_v2_loads_in_every_library(tmp_path):
    """Export verifies the folder in timm and transformers; loading it is bit-exact."""
    backbone = swin_v2()
    encoder = perturbed(Encoder(backbone, POOLINGS["gap"](backbone.dim), norm="before"), by=0.3).float()
    maskwise.export(encoder, tmp_path / "out", say=None)
    loaded, x = maskwise.load(tmp_path / "out"), images(64, dtype=torch.float32)
    assert loaded.spec() == encoder.spec() and torch.equal(loaded(x).pooled, encoder(x).pooled)
