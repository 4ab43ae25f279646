"""Eva backbones (DINOv3, EVA02, PE): timm parity, closed forms of the rotary tables, masks and training."""

import math

import pytest
import timm
import torch

from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn import POOLINGS, Backbone, Encoder, ProjectionHead, encoder_from_spec
from maskwise.nn.backbones.families.eva import EvaFamily, rotate

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
DINOV3 = "vit_small_patch16_dinov3"
FAMILIES = {
    DINOV3: {"num_reg_tokens": 2},  # fused q, k, v, half rotation, registers, no position table
    "vit_huge_plus_patch16_dinov3": {},  # another SwiGLU
    "eva02_small_patch14_224": {},  # fused q, k, v with biases, a table and a rotation
    "eva02_base_patch14_224": {},  # split q, k, v, an inner norm in the MLP
    "eva02_enormous_patch14_clip_224": {},  # norms after the branches, no rotation
    "eva_giant_patch14_224": {},
    "vit_base_patch16_rope_reg1_gap_256": {},  # no class token, one register
    "vit_base_patch16_rope_ape_224": {},  # a table without rows for the prefix
    "vit_base_patch16_rope_mixed_224": {},  # frequencies learned per block and head
    "vit_pe_core_base_patch16_224": {},
    "vit_base_patch16_sapiens2": {"num_kv_heads": 1},  # heads share keys and values; q and k are normalized
}


def tiny(name=DINOV3, **options):
    torch.manual_seed(0)
    return Backbone(name, **{**TINY, **options})


def images(count=2, height=32, width=None, **options):
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(1), **options)


def perturbed(backbone):
    """Add noise to all weights, so that every part matters."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return backbone


def timm_twin(backbone, name, **options):
    plain = {**TINY, **options}
    plain["img_size"] = plain.pop("image_size")
    twin = timm.create_model(
        name, num_classes=0, global_pool="", use_fc_norm=False, dynamic_img_size=True, **plain
    ).double()
    twin.load_state_dict(backbone.state_dict())
    return twin.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_variant_equals_timm(name):
    options = FAMILIES[name]
    backbone = perturbed(tiny(name, **options)).double().eval()
    x = images(dtype=torch.float64)
    tokens = backbone(x, attention=True, keys=True, layers=(0, -1))
    whole = torch.cat([tokens.prefix, tokens.patches], dim=1)
    twin = timm_twin(backbone, name, **options)
    torch.testing.assert_close(backbone.norm(whole), twin.forward_features(x))
    assert tokens.grid == (4, 4) and tokens.patches.shape == (2, 16, 32) and tokens.keys.shape == (2, 16, 32)
    assert (tokens.cls_attention is None) == (not backbone.has_class_token)
    torch.testing.assert_close(tokens.stages[1], whole)
    if backbone.pos_embed is None:  # timm resamples a position table differently
        y = images(height=24, width=40, dtype=torch.float64)
        other = backbone(y)
        torch.testing.assert_close(backbone.norm(torch.cat([other.prefix, other.patches], 1)), twin.forward_features(y))
        assert other.grid == (3, 5)


@pytest.mark.parametrize("name", FAMILIES)
def test_local_crops_and_oblong_images_run(name):
    backbone = tiny(name, image_size=64, patch_size=16, **FAMILIES[name])
    assert backbone(images(3, 96)).patches.shape == (3, 36, 32)
    assert backbone(images(2, 224, 160)).grid == (14, 10)
    with pytest.raises(UserError, match="do not divide into patches"):
        backbone(images(1, 90))


@pytest.mark.parametrize("name", [name for name in FAMILIES if "reg1_gap" not in name])
def test_cls_attention_equals_an_explicit_softmax_with_fused_attention_on(name):
    backbone = perturbed(tiny(name, **FAMILIES[name])).eval()
    assert all(block.attn.fused_attn for block in backbone.blocks)
    outputs = {}
    explicit = timm_twin(backbone.double(), name, **FAMILIES[name])
    explicit.blocks[-1].attn.fused_attn = False
    explicit.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, args, out: outputs.update(attention=out))
    explicit.forward_features(images().double())
    backbone.float()
    tokens = backbone(images(), attention=True)
    torch.testing.assert_close(
        tokens.cls_attention, outputs["attention"][:, :, 0, backbone.num_prefix :].float(), atol=1e-6, rtol=0
    )
    assert tokens.cls_attention.sum(-1).max() < 1
    torch.testing.assert_close(backbone(images()).patches, tokens.patches, atol=0, rtol=0)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 6)])
def test_dinov3_coordinates_are_patch_centers_in_minus_one_to_one(grid):
    backbone = tiny()
    table = EvaFamily().rope(backbone.rope, {}, grid, 0).double()
    sin, cos = table.chunk(2, dim=-1)
    quarter = 16 // 4
    periods = 100 ** (2 * torch.arange(quarter, dtype=torch.float64) / (16 // 2))
    expected = torch.stack(
        [
            torch.cat(
                [
                    2 * math.pi * (2 * (i + 0.5) / grid[0] - 1) / periods,
                    2 * math.pi * (2 * (j + 0.5) / grid[1] - 1) / periods,
                ]
            )
            for i in range(grid[0])
            for j in range(grid[1])
        ]
    )
    torch.testing.assert_close(sin, expected.sin().repeat(1, 2), atol=2e-6, rtol=0)
    torch.testing.assert_close(cos, expected.cos().repeat(1, 2), atol=2e-6, rtol=0)


def test_eva02_coordinates_are_stretched_over_the_pretraining_grid():
    backbone = tiny("eva02_small_patch14_224")  # pretrained on 16 x 16 patches
    table = EvaFamily().rope(backbone.rope, {}, (4, 8), 0).double()
    bands = 10000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    i, j = 3, 5
    angles = torch.cat([i / 4 * 16 * bands, j / 8 * 16 * bands]).repeat_interleave(2)
    torch.testing.assert_close(table[i * 8 + j], torch.cat([angles.sin(), angles.cos()]), atol=2e-5, rtol=0)


def test_rotation_preserves_norms_and_depends_on_differences_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    angles = torch.tensor([0.3, 1.1, -0.4, 2.0], dtype=torch.float64)

    def rotated(x, shift, half):
        wide = (angles + shift).repeat(2) if half else (angles + shift).repeat_interleave(2)
        return rotate(x, torch.cat([wide.sin(), wide.cos()])[None], half)

    for half in (True, False):
        assert rotated(q, 0.7, half).norm().item() == pytest.approx(q.norm().item())
        dots = [(rotated(q, shift, half) * rotated(k, shift + 0.5, half)).sum().item() for shift in (0.0, 1.3)]
        assert dots[0] == pytest.approx(dots[1]) and dots[0] != pytest.approx((q * k).sum().item())


def test_prefix_tokens_are_not_rotated():
    table = EvaFamily().rope(tiny(num_reg_tokens=2).rope, {}, (4, 4), 3)
    x = torch.randn(1, 2, 19, 16)
    assert torch.equal(rotate(x, table, True)[:, :, :3], x[:, :, :3])
    assert not torch.equal(rotate(x, table, True)[:, :, 3:], x[:, :, 3:])


def test_a_table_cached_in_inference_mode_works_in_training():
    backbone = tiny()
    with torch.inference_mode():
        backbone(images())
    backbone.train()(images()).patches.sum().backward()  # an inference tensor would raise here
    assert len(backbone._rope_cache) == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_initialization_follows_the_dino_code(name):
    backbone = tiny(name, **{**FAMILIES[name], "embed_dim": 96, "mlp_ratio": 4.0, "depth": 1})
    for key, value in backbone.named_parameters():
        if key.startswith("patch_embed") or "norm" in key or "rope" in key or "gamma" in key:
            continue
        if value.ndim >= 2 and value.numel() > 90:
            assert value.std().item() == pytest.approx(0.02, rel=6 / (2 * value.numel()) ** 0.5), key
        elif key.endswith("bias"):
            assert value.eq(0).all(), key


def test_every_parameter_gets_a_gradient():
    for name, options in FAMILIES.items():
        for pooling in ("cls", "simpool"):
            backbone = tiny(name, mask_token=True, drop_path=0.1, **options).train()
            if pooling == "cls" and not backbone.has_class_token:
                continue
            features = Encoder(backbone, POOLINGS[pooling](32)).train()(images())
            (features.pooled.square().sum() + features.patches.square().sum()).backward()
            assert all(p.grad is not None for p in backbone.parameters()), name


def test_masked_patches_and_keyed_drop_path():
    backbone = tiny(mask_token=True, drop_path=0.5).eval()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = True
    plain = backbone(images())
    masked = backbone(images(), mask)
    assert torch.equal(masked.patches[1], plain.patches[1]) and not torch.equal(masked.patches[0], plain.patches[0])
    backbone.train()
    keys = keyed_random.make_key(keyed_random.DROP_PATH, torch.arange(6))
    x = images(6)
    whole, part = backbone(x, drop_key=keys), backbone(x[4:], drop_key=keys[4:])
    torch.testing.assert_close(whole.patches[4:], part.patches)
    assert not torch.equal(whole.patches, backbone(x, drop_key=keys + 1).patches)


def test_spec_rebuilds_the_encoder():
    backbone = perturbed(tiny(num_reg_tokens=2))
    encoder = Encoder(backbone, POOLINGS["cls"](32)).eval()
    rebuilt = encoder_from_spec(encoder.spec()).eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(images()).pooled, encoder(images()).pooled)


def test_pretrained_weights_from_a_file(tmp_path):
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    for name in (DINOV3, "eva02_small_patch14_224"):
        donor = timm.create_model(name, **shape)
        torch.save(donor.state_dict(), tmp_path / "weights.pth")
        backbone = tiny(name, weights=tmp_path / "weights.pth").eval()
        x = images()
        tokens = backbone(x)
        normalized = backbone.norm(torch.cat([tokens.prefix, tokens.patches], 1))
        twin = timm.create_model(
            name, num_classes=0, global_pool="", use_fc_norm=False, dynamic_img_size=True, **shape
        ).eval()
        twin.load_state_dict(donor.state_dict(), strict=False)
        if isinstance(donor.fc_norm, torch.nn.LayerNorm):  # average-pooled models have their norm there
            twin.norm.load_state_dict(donor.fc_norm.state_dict())
        torch.testing.assert_close(normalized, twin.forward_features(x))


def test_random_coordinate_arguments_are_refused():
    with pytest.raises(UserError, match="rope_jitter_coords cannot be set: crops scale"):
        tiny(rope_jitter_coords=1.2)


@pytest.mark.parametrize(
    "name, pooling",
    [(DINOV3, "cls"), ("eva02_small_patch14_224", "cls"), ("vit_base_patch16_rope_reg1_gap_256", "simpool")],
)
def test_attmask_trains_two_steps(name, pooling):
    from maskwise.methods.ibot import IBOT
    from maskwise.methods.masking import MASKINGS

    encoder = Encoder(tiny(name, mask_token=True, drop_path=0.1), POOLINGS[pooling](32))
    method = IBOT(
        encoder,
        ProjectionHead(32, 16, hidden=32, bottleneck=8),
        MASKINGS["attmask_high"](ratio=0.5, var=0.1, prob=1.0),
        seed=0,
    ).train()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    crops = images(4, 32), images(8, 16)
    before = {key: value.clone() for key, value in method.student.state_dict().items()}
    for step in range(2):
        losses = method(*crops, step=step, epoch=0, sample_ids=torch.arange(2))
        assert losses["loss"].isfinite() and losses["mask_share"] > 0.3
        optimizer.zero_grad()
        losses["loss"].backward()
        assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
        optimizer.step()
        method.update_teacher(0.9)
    assert any(not torch.equal(before[key], value) for key, value in method.student.state_dict().items())
