"""Feature-map backbones (ResNet, ConvNeXt, Swin, Swin V2): timm parity, masks, drop path, encoders, files."""

import inspect

import pytest
import timm
import torch
from torch import nn

from maskwise.errors import UserError
from maskwise.functional import keyed_random
from maskwise.nn import POOLINGS, Backbone, BackboneBase, Encoder, SimPool, encoder_from_spec
from maskwise.nn.backbones.feature_maps import FeatureMapBackbone, mask_patches
from support.map_networks import images, perturbed

RES = {"layers": (1, 2, 1, 1), "channels": (8, 8, 16, 16)}
CNX = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24)}
SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 4}
FAMILIES = {
    "basic": ("resnet18", RES),
    "bottleneck": ("resnet50", RES),
    "deep stem, average pooling": ("resnet50d", RES),
    "squeeze and excitation": ("seresnet50", RES),
    "blurred": ("resnetblur50", RES),
    "dilated": ("resnet50", {**RES, "output_stride": 8}),
    "convnext": ("convnext_tiny", CNX),
    "convolutional MLP": ("convnext_tiny", {**CNX, "conv_mlp": True}),
    "norm first": ("convnext_tiny", {**CNX, "head_norm_first": True}),
    "overlapping stem": ("convnext_tiny", {**CNX, "stem_type": "overlap"}),
    "convnext v2": ("convnextv2_tiny", CNX),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin v2": ("swinv2_tiny_window8_256", SWIN),
}
PLAIN = {"resnet": FAMILIES["bottleneck"], "convnext": FAMILIES["convnext"], "swin": FAMILIES["swin"]}


def tiny(family, **options):
    name, arguments = FAMILIES.get(family) or PLAIN[family]
    torch.manual_seed(0)
    return Backbone(name, **{"image_size": 64, **arguments, **options})


def twin(backbone, family, side):
    """Build the timm model with the same weights for images of that size."""
    name, arguments = FAMILIES[family]
    sized = {"img_size": side} if "swin" in name else {}
    model = timm.create_model(name, num_classes=0, **sized, **arguments).double().eval()
    names = ("head.norm", "norm_pre", "norm")
    prefix = next((f"{name}." for name in names if f"{name}.weight" in model.state_dict()), "norm.")
    model.load_state_dict(
        {prefix + key[5:] if key.startswith("norm.") else key: value for key, value in backbone.state_dict().items()}
    )
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_timm_at_the_native_and_another_size(family):
    for side in (64, 128 if "swin" in family else 75):
        backbone = perturbed(
            tiny(family, **({"image_size": side} if "swin" in family else {})), by=0.3
        )  # timm fixes a Swin's windows at construction
        norm, x = backbone.norm, images(side)
        tokens = backbone(x, layers=(0, 1, 2, 3, 4, -1))
        theirs = twin(backbone, family, side).forward_features(x)
        if "swin" in family:
            torch.testing.assert_close(norm(tokens.patches).unflatten(1, tokens.grid), theirs)
        elif family == "norm first":
            torch.testing.assert_close(norm(tokens.patches).transpose(1, 2).unflatten(2, tokens.grid), theirs)
        else:
            torch.testing.assert_close(tokens.stages[4], theirs, rtol=1e-12, atol=1e-12)
        assert tokens.grid == backbone.grid_for((side, side)) and tokens.patches.shape == (
            2,
            tokens.grid[0] * tokens.grid[1],
            backbone.dim,
        )
        assert (
            torch.equal(tokens.patches, tokens.stages[4].flatten(2).transpose(1, 2))
            and tokens.stages[5] is tokens.stages[4]
        )
        assert tuple(stage.shape[1] for stage in tokens.stages[:5]) == backbone.stage_dims
        assert tokens.prefix.shape == (2, 0, backbone.dim) and tokens.cls_attention is None and tokens.keys is None
    oblong = backbone(images(64, width=96))
    assert oblong.grid == backbone.grid_for((64, 96)) and oblong.grid[0] < oblong.grid[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_equals_timms_intermediate(family):
    backbone = perturbed(tiny(family), by=0.3)
    x = images(64)
    stages = backbone(x, layers=(1, 2, 3, 4)).stages
    model = twin(backbone, family, 64)
    if backbone.channels_last:  # another layout has other kernels, which round otherwise
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    theirs = model.forward_intermediates(x, intermediates_only=True)[-4:]
    for stage, intermediate in zip(stages, theirs, strict=True):
        torch.testing.assert_close(stage, intermediate, rtol=1e-11, atol=1e-11)


def test_one_name_and_one_signature_for_all_families():
    parameters = list(inspect.signature(Backbone).parameters)
    assert parameters == [
        "name",
        "image_size",
        "patch_size",
        "class_token",
        "position",
        "drop_path",
        "mask_token",
        "weights",
        "mean",
        "std",
        "timm_args",
    ]
    assert isinstance(tiny("resnet"), BackboneBase) and isinstance(tiny("swin"), FeatureMapBackbone)
    transformer = Backbone("vit_tiny_patch16_224", depth=1)
    assert isinstance(transformer, BackboneBase) and not isinstance(transformer, FeatureMapBackbone)


def test_small_stem_keeps_the_resolution_of_small_images():
    backbone = tiny("basic", small_stem=True, image_size=32)
    assert backbone.patch_size == (8, 8) and backbone(images(32, dtype=torch.float32), layers=(0,)).stages[0].shape == (
        2,
        64,
        32,
        32,
    )
    assert backbone(images(20, dtype=torch.float32)).grid == (3, 3) == backbone.grid_for((20, 20))
    assert Backbone(**backbone.spec()).patch_size == (8, 8)
    deep = tiny("basic", small_stem=True, stem_type="deep", stem_width=4)
    assert (
        deep.patch_size == (8, 8) and deep.stage_dims[0] == 8 and deep(images(32, dtype=torch.float32)).grid == (4, 4)
    )
    assert tiny("basic", small_stem=False).patch_size == (32, 32)


@pytest.mark.parametrize("family", PLAIN)
def test_an_image_does_not_depend_on_its_batch(family):
    backbone, x = perturbed(tiny(family), by=0.3), images(64, count=5)
    torch.testing.assert_close(backbone(x[3:4]).patches[0], backbone(x).patches[3], rtol=1e-12, atol=1e-12)


# masks


@pytest.mark.parametrize("sides, grid", [((56, 56), (7, 7)), ((24, 24), (3, 3)), ((18, 20), (3, 3))])
def test_a_masked_position_covers_all_of_its_stem_patches(sides, grid):
    """The mask's grid is that of the last map."""
    mask = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.4
    masked = mask_patches(torch.ones(2, *sides, 3), mask, torch.tensor([[7.0, 8.0, 9.0]]), grid, 8)
    for b in range(2):
        for i in range(sides[0]):
            for j in range(sides[1]):
                covered = mask[b, (i // 8) * grid[1] + j // 8]
                assert masked[b, i, j].tolist() == ([7, 8, 9] if covered else [1, 1, 1])


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_convolutional_networks_refuse_masks(family):
    with pytest.raises(
        UserError, match="has no patch tokens to mask: choose a Vision Transformer or a Swin, or masking none"
    ):
        tiny(family, mask_token=True)
    with pytest.raises(UserError, match="has no patch tokens to mask"):
        tiny(family)(images(64, dtype=torch.float32), torch.zeros(2, 4, dtype=torch.bool))


# drop path


@pytest.mark.parametrize("family", ["convnext", "swin", "swin v2"])
def test_drop_path_is_keyed_by_sample(family):
    backbone = perturbed(tiny(family, drop_path=0.5), by=0.3).train()
    x, keys = images(64, 6), keyed_random.make_key(1, torch.arange(6))
    whole = backbone(x, drop_key=keys).patches
    parts = torch.cat([backbone(x[:2], drop_key=keys[:2]).patches, backbone(x[2:], drop_key=keys[2:]).patches])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    assert (whole != backbone(x, drop_key=keys + 1).patches).flatten(1).any(1).sum() >= 4
    assert torch.equal(backbone.eval()(x, drop_key=keys).patches, backbone(x).patches)
    assert torch.equal(backbone.freeze_as_teacher_().train()(x, drop_key=keys).patches, backbone.eval()(x).patches)


@pytest.mark.parametrize("family", PLAIN)
def test_dropped_branches_leave_the_shortcut(family, monkeypatch):
    backbone = perturbed(tiny(family, drop_path=0.5), by=0.3)
    monkeypatch.setattr(
        backbone.drop_path,
        "forward",
        lambda batch, like, key: torch.zeros(backbone.depth, 2, batch, 1, 1, dtype=like.dtype),
    )
    x = images(64)
    if family == "resnet":
        expected = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(x))))
        for block in backbone.family.blocks(backbone):
            expected = (block.downsample or nn.Identity())(expected).relu()
    elif family == "convnext":
        expected = nn.Sequential(backbone.stem, *(stage.downsample for stage in backbone.stages))(x)
    else:
        expected = nn.Sequential(*(stage.downsample for stage in backbone.layers))(backbone.patch_embed(x)).permute(
            0, 3, 1, 2
        )
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], expected)


def test_drop_rates_grow_over_all_stages_as_in_timm():
    ours = tiny("convnext", drop_path=0.4).drop_path.rates
    theirs = timm.create_model("convnext_tiny", drop_path_rate=0.4, **CNX)
    assert ours == pytest.approx(
        [getattr(block.drop_path, "drop_prob", 0.0) for stage in theirs.stages for block in stage.blocks]
    )


# encoders


@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("family", PLAIN)
def test_encoder_and_its_spec(family, norm):
    backbone = tiny(family, drop_path=0.1)
    encoder = perturbed(Encoder(backbone, SimPool(backbone.dim, gamma=2.0), norm=norm), by=0.3)
    last = {"resnet": nn.Identity, "convnext": nn.LayerNorm, "swin": nn.LayerNorm}[family]
    assert isinstance(encoder.norm, last) and (family != "convnext" or encoder.norm.eps == 1e-6)
    x = images(96)
    features = encoder(x, layers=(0, 4))
    raw = backbone(x)
    expected = (
        encoder.norm(encoder.pooling(raw).vector)
        if norm == "after"
        else encoder.pooling(encoder.norm(raw.patches)).vector
    )
    torch.testing.assert_close(features.pooled, expected)
    torch.testing.assert_close(features.patches, encoder.norm(raw.patches))
    assert (
        features.attention.shape == (2, 1, 9)
        and features.grid == (3, 3)
        and features.layers[1].shape == (2, encoder.dim, 3, 3)
    )
    rebuilt = encoder_from_spec(encoder.spec()).double().eval()
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt(x).pooled, features.pooled) and rebuilt.spec() == encoder.spec()


def test_cls_pooling_is_refused_in_one_line():
    with pytest.raises(UserError, match="needs a class token and resnet50 has none: choose pooling simpool"):
        Encoder(tiny("resnet"), POOLINGS["cls"](64))


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("resnet", {"patch_size": 8}, "backbone.patch_size=8 cannot be set: resnet50 has no patch size"),
        ("resnet", {"class_token": True}, "backbone.class_token=True cannot be set"),
        ("swin", {"position": "size"}, "has no position table"),
        ("resnet", {"drop_block_rate": 0.1}, "only drop_path is keyed by sample"),
        ("swin", {"drop_path_rate": 0.1}, "use drop_path"),
        ("convnext", {"image_size": 24}, "24x24 pixels are smaller than the stride 32 of convnext_tiny"),
        ("swin", {"image_size": 66}, "66x66 pixels do not divide into patches of 4x4"),
        ("convnext", {"norm_layer": "batchnorm2d", "conv_mlp": True}, "BatchNorm2d is not supported as the last norm"),
        ("resnet", {"layers": (1, 1), "nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(family, options, words):
    with pytest.raises(UserError) as caught:
        tiny(family, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_anti_aliasing_average_pooling_needs_multiples():
    backbone = Backbone("resnetaa50", **RES)
    with pytest.raises(UserError, match="75x75 pixels do not divide into patches of 32x32"):
        backbone(images(75, dtype=torch.float32))
    assert backbone(images(96, dtype=torch.float32)).grid == (3, 3)


# initial weights and files


def test_initial_weights_follow_the_papers():
    torch.manual_seed(0)
    resnet = Backbone("resnet50", layers=(1, 1, 1, 1))
    conv = resnet.layer3[0].conv2.weight
    assert conv.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)  # He, by fan out
    assert resnet.layer4[0].bn3.weight.eq(0).all() and resnet.layer4[0].bn2.weight.eq(1).all()
    assert Backbone("resnet50", zero_init_last=False, **RES).layer1[0].bn3.weight.eq(1).all()
    convnext = Backbone("convnext_tiny", depths=(1, 1, 1, 1))
    for weight in (
        convnext.stem[0].weight,
        convnext.stages[3].blocks[0].mlp.fc1.weight,
        convnext.stages[2].downsample[1].weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(convnext.stages[0].blocks[0].gamma, torch.full((96,), 1e-6))
    model = Backbone("swin_tiny_patch4_window7_224", depths=(2, 1, 1, 1))
    for weight in (
        model.layers[3].blocks[0].attn.relative_position_bias_table,
        model.layers[3].blocks[0].attn.qkv.weight,
        model.layers[1].downsample.reduction.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("family", ["resnet", "convnext", "convnext v2", "swin", "swin v2"])
def test_pretrained_weights_from_a_file(family, tmp_path):
    name, arguments = FAMILIES.get(family) or PLAIN[family]
    sized = {"img_size": 64} if "swin" in family else {}
    donor = timm.create_model(name, **sized, **arguments).eval()
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "timm.pth")
    backbone = tiny(family, weights=tmp_path / "timm.pth").eval()
    x = images(64, dtype=torch.float32)
    stage = backbone(x, layers=(-1,)).stages[0]
    theirs = donor.forward_features(x)
    torch.testing.assert_close(backbone.norm(stage.permute(0, 2, 3, 1)) if "swin" in family else stage, theirs)
    with pytest.raises(UserError, match="does not fit this backbone|timm does not know this layout"):
        tiny(
            family,
            weights=tmp_path / "timm.pth",
            **({"layers": (1, 2, 2, 1)} if family == "resnet" else {"depths": (1, 1, 1, 1)}),
        )
