"""VisionTransformer backbones: timm parity, initialization, positions, masks and errors."""

import pytest
import timm
import torch

from maskwise.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn import POOLINGS, Backbone, Encoder

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}


def tiny(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return Backbone(name, **{**TINY, **options})


def images(count=2, side=32, **options):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), **options)


def on_meta(name, **options):
    with torch.device("meta"):
        return Backbone(name, **options)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "name, teacher", [("tiny", 5_524_416), ("small", 21_665_664), ("base", 85_798_656), ("large", 303_301_632)]
)
def test_parameter_counts_match_the_dino_code(name, teacher):
    backbone = on_meta(f"vit_{name}_patch16_224", mask_token=True)
    assert parameters(backbone) == teacher + backbone.dim  # the student's mask token
    assert parameters(backbone.freeze_as_teacher_()) == teacher


def test_block_has_the_published_parameter_count():
    assert parameters(on_meta("vit_small_patch16_224", depth=1).blocks[0]) == 1_774_464


VARIANTS = {
    "plain": {},
    "no class token": {"class_token": False},
    "registers": {"reg_tokens": 3},
    "registers outside the table": {"reg_tokens": 3, "no_embed_class": True},
    "no_embed_class": {"no_embed_class": True},
    "norm_pre": {"pre_norm": True},
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_attn_norm": True},
    "LayerScale": {"init_values": 0.1},
    "no table": {"pos_embed": "none"},
}


def timm_twin(backbone, name="vit_tiny_patch16_224", **options):
    """Build the timm model with the same weights."""
    plain = {**TINY, **options}
    plain["img_size"] = plain.pop("image_size")
    twin = timm.create_model(name, num_classes=0, global_pool="", fc_norm=False, **plain).double()
    twin.load_state_dict(backbone.state_dict())
    return twin.eval()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_equals_timm_at_its_native_size(options):
    backbone = tiny(**options).double().eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in backbone.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    x = images(dtype=torch.float64)
    tokens = backbone(x, attention=True, keys=True, layers=(0, -1))
    whole = torch.cat([tokens.prefix, tokens.patches], dim=1)
    torch.testing.assert_close(backbone.norm(whole), timm_twin(backbone, **options)(x))
    assert tokens.grid == (4, 4) and tokens.patches.shape == (2, 16, 32)
    assert (tokens.cls_attention is None) == (not backbone.has_class_token)
    assert tokens.keys.shape == (2, 16, 32)
    torch.testing.assert_close(tokens.stages[1], whole)
    assert tokens.stages[0].shape == whole.shape
    smaller = backbone(images(side=24, dtype=torch.float64))
    assert smaller.grid == (3, 3) and smaller.prefix.shape == tokens.prefix.shape


def test_swiglu_models_equal_timm():
    name = "vit_giant_patch14_reg4_dinov2"  # SwiGLU, LayerScale, registers, no_embed_class
    backbone = tiny(name, mlp_ratio=2.0).double().eval()
    x = images(dtype=torch.float64)
    tokens = backbone(x)
    torch.testing.assert_close(
        backbone.norm(torch.cat([tokens.prefix, tokens.patches], 1)), timm_twin(backbone, name, mlp_ratio=2.0)(x)
    )
    assert tokens.prefix.shape[1] == 5
    gated = tiny("aimv2_large_patch14_224")
    assert type(gated.blocks[0].mlp).__name__ == "SwiGLU"
    assert gated(images()).prefix.shape[1] == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"class_token": False}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}, {"init_values": 1e-5}],
    ids=str,
)
def test_initialization_follows_the_dino_code(options):
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", depth=1, patch_size=16, **options)
    for name, value in backbone.named_parameters():
        part = name.split(".")[0]
        if part in ("cls_token", "reg_token", "pos_embed") or name.endswith(
            ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
        ):
            if part == "patch_embed":
                continue
            assert value.std().item() == pytest.approx(0.02, rel=6 / (2 * value.numel()) ** 0.5), (
                name
            )  # six standard errors
            assert abs(value.mean().item()) < 6 * 0.02 / value.numel() ** 0.5, name
        elif "norm" in name:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name
        elif "ls" in name:
            assert torch.equal(value, torch.full_like(value, 1e-5)), name
        elif part == "blocks":
            assert value.eq(0).all(), name
    bound = 1 / (3 * 16 * 16) ** 0.5
    weight = backbone.patch_embed.proj.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert backbone.patch_embed.proj.bias.abs().max() <= bound


def test_swiglu_gates_are_initialized_like_other_linears():
    fc = tiny("aimv2_large_patch14_224").blocks[0].mlp
    for layer in (fc.fc1_g, fc.fc1_x, fc.fc2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_local_crops_run_through_a_model_of_another_size():
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", depth=1)
    tokens = backbone(images(side=96), attention=True)
    assert tokens.grid == (6, 6) and tokens.cls_attention.shape == (2, 3, 36)
    assert backbone(torch.randn(1, 3, 80, 112)).grid == (5, 7)


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"reg_tokens": 2}, {"no_embed_class": True, "reg_tokens": 2}], ids=str
)
def test_cls_attention_equals_an_explicit_softmax_with_fused_attention_on(options):
    backbone = tiny(**options).eval()
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.weight.mul_(20)  # sharp attention
    assert all(block.attn.fused_attn for block in backbone.blocks)
    x = images()
    tokens = backbone(x, attention=True, layers=(0,))
    attn = backbone.blocks[-1].attn
    with torch.no_grad():
        q, k, _ = attn.qkv(backbone.blocks[-1].norm1(tokens.stages[0])).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        whole = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) / 4).softmax(-1)
    torch.testing.assert_close(tokens.cls_attention, whole[:, :, 0, backbone.num_prefix :], atol=1e-6, rtol=0)
    assert tokens.cls_attention.sum(-1).max() < 1  # the share of the class token itself is left out
    torch.testing.assert_close(
        backbone(x).patches, tokens.patches, atol=0, rtol=0
    )  # requesting the row changes nothing
    assert backbone(x).cls_attention is None


def test_cls_attention_is_float32_under_bf16_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        tokens = tiny()(images(), attention=True)
    assert tokens.cls_attention.dtype == torch.float32
    assert tokens.patches.dtype == torch.float32  # the residual stream


@pytest.mark.parametrize("options", [{}, {"class_token": False}, {"reg_tokens": 2, "no_embed_class": True}], ids=str)
@pytest.mark.parametrize(
    "position, expected",
    [("offset", (0.433330, 0.721462, -0.817902, -0.304783)), ("size", (0.448185, 0.675463, -0.766352, -0.484048))],
)
def test_position_goldens_reach_the_tokens(options, position, expected):
    backbone = Backbone("vit_tiny_patch16_224", embed_dim=8, num_heads=2, depth=1, position=position, **options).eval()
    a, b = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    with torch.no_grad():
        backbone.patch_embed.proj.weight.zero_()
        backbone.patch_embed.proj.bias.zero_()
        backbone.pos_embed[:, backbone.table_prefix :] = torch.sin(0.3 * a + 0.5 * b).reshape(1, 196, 1)
    x = backbone._embed(torch.zeros(1, 3, 96, 96), None, (6, 6))[:, backbone.num_prefix :, 0].reshape(6, 6)
    assert [round(x[i, j].item(), 6) for i, j in ((0, 0), (1, 1), (2, 3), (5, 5))] == pytest.approx(
        expected, abs=1.5e-6
    )
    native = backbone._embed(torch.zeros(1, 3, 224, 224), None, (14, 14))[:, backbone.num_prefix :, 0]
    assert torch.equal(native[0], torch.sin(0.3 * a + 0.5 * b).flatten())  # an equal grid leaves the table untouched


def test_offset_always_resamples_at_the_native_size():
    backbone = tiny(position="offset_always", class_token=False, image_size=112)
    table = backbone.pos_embed
    resampled = backbone._embed(torch.zeros(1, 3, 112, 112), None, (14, 14)) - backbone.patch_embed.proj.bias
    torch.testing.assert_close(resampled, position_table(table, (14, 14), (14, 14), "offset_always"), atol=1e-6, rtol=0)
    assert 0.05 < (resampled - table).norm() / table.norm() < 0.12


def test_masked_patches_are_mask_token_plus_position():
    backbone = tiny(mask_token=True).eval()
    assert backbone.mask_token.shape == (1, 32) and backbone.mask_token.eq(0).all()
    with torch.no_grad():
        backbone.mask_token.normal_()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [3, 9]] = True
    x = backbone._embed(images(), mask, (4, 4))
    rows = backbone.pos_embed[0, 1:]
    torch.testing.assert_close(x[0, 1:][[3, 9]], rows[[3, 9]] + backbone.mask_token)
    assert not torch.equal(x[0, 4], x[0, 10])
    assert torch.equal(x[1], backbone._embed(images(), None, (4, 4))[1])
    assert not torch.equal(backbone(images(), mask).patches, backbone(images()).patches)


def test_an_empty_mask_changes_nothing():
    backbone = tiny(mask_token=True).train()
    empty = torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(backbone(images(), empty).prefix, backbone(images()).prefix)
    assert torch.equal(backbone(images(), empty).prefix, backbone.eval()(images()).prefix)


def test_mask_token_is_in_every_training_graph():
    backbone = tiny(mask_token=True).train()
    backbone(images()).patches.sum().backward()
    assert backbone.mask_token.grad is not None and backbone.mask_token.grad.eq(0).all()


def test_a_teacher_has_no_mask_token_no_drop_path_and_no_gradient():
    backbone = tiny(mask_token=True, drop_path=0.5)
    names = set(dict(backbone.named_parameters()))
    teacher = backbone.freeze_as_teacher_().train()
    assert set(dict(teacher.named_parameters())) == names - {"mask_token"}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(images()).patches, teacher(images()).patches)


def test_without_a_mask_token_masked_patches_are_zeros():
    backbone = tiny().eval()
    mask = torch.ones(2, 16, dtype=torch.bool)
    assert torch.equal(backbone(images(), mask).patches[0], backbone(images(), mask).patches[1])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_an_image_does_not_depend_on_its_batch(dtype, tolerance):
    backbone = tiny().to(dtype).eval()
    x = images(5, dtype=dtype)
    whole = backbone(x, attention=True)
    alone = backbone(x[3:4], attention=True)
    torch.testing.assert_close(alone.patches[0], whole.patches[3], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(alone.cls_attention[0], whole.cls_attention[3], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "name, words",
    [
        ("vit_smal_patch16_224", ["no model 'vit_smal_patch16_224'", "vit_small_patch16_224"]),
        ("qqqq", ["no model 'qqqq'", "vit_small_patch16_224"]),
        ("vit_small_resnet26d_224", ["without downloading a ResNet for its stem", "nearest is vit_"]),
    ],
)
def test_unsupported_models_are_refused_in_one_line(name, words):
    with pytest.raises(UserError) as caught:
        Backbone(name)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"global_pool": "avg"}, "backbone.global_pool cannot be set"),
        ({"proj_drop_rate": 0.1}, "only drop_path is keyed by sample"),
        ({"nonsense": 3}, "nonsense"),
        ({"embed_dim": 33}, "timm cannot build"),
        ({"image_size": 33}, "not a multiple of the patch 8x8"),
        ({"small_stem": True}, "small_stem"),
        ({"position": "wild"}, "choose offset, size or offset_always"),
        ({"drop_path": 1.0}, "out of range: choose a rate"),
        ({"weights": "nowhere.pth"}, "no weights file nowhere.pth"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options, words):
    with pytest.raises(UserError) as caught:
        tiny(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_image_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="30x32 pixels do not divide into patches of 8x8"):
        tiny()(torch.randn(1, 3, 30, 32))


def test_every_parameter_gets_a_gradient():
    for options in VARIANTS.values():
        for pooling in ("cls", "simpool"):
            backbone = tiny(mask_token=True, drop_path=0.1, **options).train()
            if pooling == "cls" and not backbone.has_class_token:
                continue
            features = Encoder(backbone, POOLINGS[pooling](32)).train()(images())
            (features.pooled.sum() + features.patches.square().sum()).backward()
            assert all(p.grad is not None for p in backbone.parameters()), options


def test_class_attention_of_every_block_against_a_loop():
    backbone = tiny(reg_tokens=1, depth=3).double().eval()
    pictures = images(dtype=torch.float64)
    with torch.no_grad():
        found = backbone.class_attention(pictures)
        tokens = backbone(pictures, attention=True, layers=(0, 1, 2))
        before, _ = backbone._tokens(pictures, None)
        for i, (block, after) in enumerate(zip(backbone.blocks, tokens.stages)):
            weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
            q, k, _ = (block.norm1(before) @ weight.T + bias).split(32, dim=-1)
            for b in range(2):
                for head in range(2):
                    part = slice(16 * head, 16 * head + 16)
                    row = torch.stack([q[b, 0, part] @ k[b, j, part] / 4 for j in range(18)]).softmax(0)
                    torch.testing.assert_close(found[b, i, head], row[2:])  # without class token and register
            before = after
    torch.testing.assert_close(found[:, -1], tokens.cls_attention)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_class_attention_of_rotary_transformers_ends_in_the_last_blocks(name):
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 32, "patch_size": 8}
    backbone = Backbone(name, **options).double().eval()
    pictures = images(dtype=torch.float64)
    with torch.no_grad():
        found = backbone.class_attention(pictures)
        torch.testing.assert_close(found[:, -1], backbone(pictures, attention=True).cls_attention)
    assert found.shape == (2, 2, 2, 16) and not torch.allclose(found[:, 0], found[:, 1])


def test_class_attention_needs_a_class_token():
    with pytest.raises(UserError, match="no class token here"):
        tiny(class_token=False).class_attention(images())
