"""ResNet, ConvNeXt, Swin and Swin V2 as backbones: timm's own forward, an explicit loop for shifted windows, masks, drop path, files."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from nn.map_networks import images, stirred
from torch import nn

import maskwise
from maskwise.functional import draws
from maskwise.functional.errors import UserError
from maskwise.nn import Backbone, Encoder, POOLINGS, SimPool, encoder_from_spec, resnet, swin, swin2
from maskwise.nn.maps import MapBackbone

import timm  # after maskwise.nn, which readies it

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
    """timm's own model with the same weights, built for images of that size."""
    name, arguments = FAMILIES[family]
    sized = {"img_size": side} if "swin" in name else {}
    model = timm.create_model(name, num_classes=0, **sized, **arguments).double().eval()
    home = next((f"{home}." for home in ("head.norm", "norm_pre", "norm") if f"{home}.weight" in model.state_dict()), "norm.")
    model.load_state_dict({home + key[5:] if key.startswith("norm.") else key: value for key, value in backbone.state_dict().items()})
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_timms_at_the_native_and_at_another_size(family):
    for side in (64, 128 if "swin" in family else 75):
        backbone = stirred(tiny(family, **({"image_size": side} if "swin" in family else {})), by=0.3)  # timm fixes a Swin's windows when it builds it
        norm, x = backbone.norm, images(side)
        tokens = backbone(x, layers=(0, 1, 2, 3, 4, -1))
        theirs = twin(backbone, family, side).forward_features(x)
        if "swin" in family:
            torch.testing.assert_close(norm(tokens.patches).unflatten(1, tokens.grid), theirs)
        elif family == "norm first":
            torch.testing.assert_close(norm(tokens.patches).transpose(1, 2).unflatten(2, tokens.grid), theirs)
        else:
            torch.testing.assert_close(tokens.stages[4], theirs, rtol=1e-12, atol=1e-12)
        assert tokens.grid == backbone.grid_for((side, side)) and tokens.patches.shape == (2, tokens.grid[0] * tokens.grid[1], backbone.dim)
        assert torch.equal(tokens.patches, tokens.stages[4].flatten(2).transpose(1, 2)) and tokens.stages[5] is tokens.stages[4]
        assert tuple(stage.shape[1] for stage in tokens.stages[:5]) == backbone.stage_dims
        assert tokens.prefix.shape == (2, 0, backbone.dim) and tokens.cls_attention is None and tokens.keys is None
    whole = backbone(images(64, width=96))
    assert whole.grid == backbone.grid_for((64, 96)) and whole.grid[0] < whole.grid[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_is_one_of_timms_intermediates(family):
    backbone = stirred(tiny(family), by=0.3)
    x = images(64)
    stages = backbone(x, layers=(1, 2, 3, 4)).stages
    theirs = twin(backbone, family, 64).forward_intermediates(x, intermediates_only=True)[-4:]
    for mine, their in zip(stages, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-11, atol=1e-11)


def test_one_name_and_one_signature_for_all_families():
    parameters = list(inspect.signature(Backbone).parameters)
    assert parameters[:2] == ["name", "image_size"] and parameters == list(inspect.signature(MapBackbone).parameters)
    assert isinstance(tiny("resnet"), Backbone) and isinstance(tiny("swin"), MapBackbone) and not isinstance(Backbone("vit_tiny_patch16_224", depth=1), MapBackbone)


def test_a_small_stem_keeps_small_images_large():
    backbone = tiny("basic", small_stem=True, image_size=32)
    assert backbone.patch_size == (8, 8) and backbone(images(32, dtype=torch.float32), layers=(0,)).stages[0].shape == (2, 64, 32, 32)
    assert backbone(images(20, dtype=torch.float32)).grid == (3, 3) == backbone.grid_for((20, 20))
    assert Backbone(**backbone.spec()).patch_size == (8, 8)
    deep = tiny("basic", small_stem=True, stem_type="deep", stem_width=4)
    assert deep.patch_size == (8, 8) and deep.stage_dims[0] == 8 and deep(images(32, dtype=torch.float32)).grid == (4, 4)
    assert tiny("basic", small_stem=False).patch_size == (32, 32)


@pytest.mark.parametrize("family", PLAIN)
def test_an_image_does_not_depend_on_its_batch(family):
    backbone, x = stirred(tiny(family), by=0.3), images(64, count=5)
    torch.testing.assert_close(backbone(x[3:4]).patches[0], backbone(x).patches[3], rtol=1e-12, atol=1e-12)


# windows


def test_local_crops_pass_with_the_middle_of_the_tables():
    """A map below the window is one window; its table is the middle of the one that was built: timm's model for that size, tables cut by hand."""
    backbone = stirred(tiny("swin"), by=0.3)
    small = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=32, **SWIN).double().eval()
    state = backbone.state_dict()
    for key, wanted in small.state_dict().items():
        if key.endswith("bias_table"):
            there, here = (int(round(len(rows) ** 0.5)) for rows in (state[key], wanted))
            cut = (there - here) // 2
            state[key] = state[key].unflatten(0, (there, there))[cut : there - cut, cut : there - cut].flatten(0, 1)
    small.load_state_dict(state)
    x = images(32)
    torch.testing.assert_close(backbone.norm(backbone(x).patches).unflatten(1, (1, 1)), small.forward_features(x))


@pytest.mark.parametrize("sides, shifted", [((8, 8), True), ((5, 6), False), ((5, 6), True), ((3, 9), True), ((2, 3), True)])
def test_windows_are_those_of_an_explicit_loop(sides, shifted):
    torch.manual_seed(1)
    attn = stirred(tiny("swin").layers[0].blocks[0].attn, by=0.3)  # two heads' worth is one head of width 8
    x = torch.randn(1, *sides, 8, dtype=torch.float64)
    window = [min(4, side) for side in sides]
    step = [size // 2 if shifted and side > size else 0 for size, side in zip(window, sides)]
    whole = [-(-side // size) * size for size, side in zip(window, sides)]
    padded = torch.zeros(*whole, 8, dtype=torch.float64)
    padded[: sides[0], : sides[1]] = x[0]
    q, k, v = attn.qkv(padded).chunk(3, dim=-1)
    table = attn.relative_position_bias_table.reshape(7, 7)
    expected = torch.zeros(*sides, 8, dtype=torch.float64)
    for i in range(sides[0]):
        for j in range(sides[1]):
            def place(a, b):
                """Window, place inside it and whether a place went round the edge."""
                at = [(one - by) % side for one, by, side in zip((a, b), step, whole)]
                return [one // size for one, size in zip(at, window)], at, [one < by for one, by in zip((a, b), step)]

            home, mine, wrapped = place(i, j)
            logits, values = [], []
            for a in range(whole[0]):
                for b in range(whole[1]):
                    there, at, round_ = place(a, b)
                    if there == home and round_ == wrapped:
                        offset = table[mine[0] - at[0] + 3, mine[1] - at[1] + 3]
                        logits.append((q[i, j] @ k[a, b]) * attn.scale + offset)
                        values.append(v[a, b])
            expected[i, j] = torch.stack(logits).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(swin.attend(attn, x, shifted, {})[0], attn.proj(expected))


@pytest.mark.parametrize("side, sizes", [(64, 4), (32, 1)])
def test_the_second_swin_takes_smaller_maps_with_the_middle_of_its_table(side, sizes):
    """Cosines, factor and table written out; coordinates stay those of the built windows, which timm would stretch."""
    backbone = stirred(tiny("swin v2"), by=0.3)
    attn, x = backbone.layers[0].blocks[0].attn, torch.randn(2, 2, 3, 8, dtype=torch.float64)
    table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table[0]))  # [7, 7, 1]
    q, k, v = (part.flatten(1, 2) for part in torch.cat([F.linear(x, w, b) for w, b in zip(attn.qkv.weight.chunk(3), (attn.q_bias, None, attn.v_bias))], -1).chunk(3, -1))
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2) * attn.logit_scale.clamp(max=4.605170185988092).exp()[0]
    places = [(i, j) for i in range(2) for j in range(3)]
    bias = torch.stack([torch.stack([table[a[0] - b[0] + 3, a[1] - b[1] + 3, 0] for b in places]) for a in places])
    expected = attn.proj((logits + bias).softmax(-1) @ v).unflatten(1, (2, 3))
    torch.testing.assert_close(swin.attend(attn, x, True, {}, swin2.COSINE), expected)
    assert backbone(images(side)).patches.shape == (2, sizes, 64)


def test_a_dropped_branch_of_the_second_swin_leaves_the_shortcut(monkeypatch):
    backbone, x = stirred(tiny("swin v2", drop_path=0.5), by=0.3), images(64)
    drawn = torch.rand(backbone.depth, 2, 2, 1, 1, dtype=torch.float64)
    monkeypatch.setattr(backbone.drop_path, "forward", lambda batch, like, key: drawn)
    expected, at = backbone.patch_embed(x), 0
    for stage in backbone.layers:
        expected = stage.downsample(expected)
        for block in stage.blocks:
            first, second = drawn[at].unsqueeze(-1)
            expected = expected + first * block.norm1(block._attn(expected))
            expected, at = expected + second * block.norm2(block.mlp(expected)), at + 1
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], expected.permute(0, 3, 1, 2))


# masks


@pytest.mark.parametrize("sides, grid", [((56, 56), (7, 7)), ((24, 24), (3, 3)), ((18, 20), (3, 3))])
def test_a_hidden_place_hides_all_of_its_patches(sides, grid):
    """attmask.md fact 52: the mask's grid is the coarsest one."""
    mask = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)) < 0.4
    seen = swin.hide(torch.ones(2, *sides, 3), mask, torch.tensor([[7.0, 8.0, 9.0]]), grid, 8)
    for b in range(2):
        for i in range(sides[0]):
            for j in range(sides[1]):
                hidden = mask[b, (i // 8) * grid[1] + j // 8]
                assert seen[b, i, j].tolist() == ([7, 8, 9] if hidden else [1, 1, 1])


def test_swin_hides_and_its_token_is_in_every_training_graph():
    backbone = tiny("swin", mask_token=True).train()
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
    teacher = tiny("swin", mask_token=True).freeze_as_teacher_()
    torch.testing.assert_close(teacher.train()(x, mask).patches, tiny("swin")(x, mask).patches)  # zeros, a fresh token's value


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_a_convolution_has_nothing_to_hide(family):
    with pytest.raises(UserError, match="has no patch tokens to hide: choose a Vision Transformer or a Swin, or masking none"):
        tiny(family, mask_token=True)
    with pytest.raises(UserError, match="has no patch tokens to hide"):
        tiny(family)(images(64, dtype=torch.float32), torch.zeros(2, 4, dtype=torch.bool))


# drop path


@pytest.mark.parametrize("family", ["convnext", "swin", "swin v2"])
def test_drop_path_belongs_to_the_sample(family):
    backbone = stirred(tiny(family, drop_path=0.5), by=0.3).train()
    x, keys = images(64, 6), draws.mix(1, torch.arange(6))
    whole = backbone(x, drop_key=keys).patches
    parts = torch.cat([backbone(x[:2], drop_key=keys[:2]).patches, backbone(x[2:], drop_key=keys[2:]).patches])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    assert (whole != backbone(x, drop_key=keys + 1).patches).flatten(1).any(1).sum() >= 4
    assert torch.equal(backbone.eval()(x, drop_key=keys).patches, backbone(x).patches)
    assert torch.equal(backbone.freeze_as_teacher_().train()(x, drop_key=keys).patches, backbone.eval()(x).patches)


@pytest.mark.parametrize("family", PLAIN)
def test_a_dropped_branch_leaves_the_shortcut(family, monkeypatch):
    backbone = stirred(tiny(family, drop_path=0.5), by=0.3)
    monkeypatch.setattr(backbone.drop_path, "forward", lambda batch, like, key: torch.zeros(backbone.depth, 2, batch, 1, 1, dtype=like.dtype))
    x = images(64)
    if family == "resnet":
        expected = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(x))))
        for block in resnet.blocks(backbone):
            expected = (block.downsample or nn.Identity())(expected).relu()
    elif family == "convnext":
        expected = nn.Sequential(backbone.stem, *(stage.downsample for stage in backbone.stages))(x)
    else:
        expected = nn.Sequential(*(stage.downsample for stage in backbone.layers))(backbone.patch_embed(x)).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone(x, layers=(-1,)).stages[0], expected)


def test_rates_rise_over_all_stages_as_timms():
    ours = tiny("convnext", drop_path=0.4).drop_path.rates
    theirs = timm.create_model("convnext_tiny", drop_path_rate=0.4, **CNX)
    assert ours == pytest.approx([getattr(block.drop_path, "drop_prob", 0.0) for stage in theirs.stages for block in stage.blocks])


# encoders


@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("family", PLAIN)
def test_an_encoder_and_its_description(family, norm):
    backbone = tiny(family, drop_path=0.1)
    encoder = stirred(Encoder(backbone, SimPool(backbone.dim, gamma=2.0), norm=norm), by=0.3)
    last = {"resnet": nn.Identity, "convnext": nn.LayerNorm, "swin": nn.LayerNorm}[family]
    assert isinstance(encoder.norm, last) and (family != "convnext" or encoder.norm.eps == 1e-6)
    x = images(96)
    features = encoder(x, layers=(0, 4))
    raw = backbone(x)
    expected = encoder.norm(encoder.pooling(raw).vector) if norm == "after" else encoder.pooling(encoder.norm(raw.patches)).vector
    torch.testing.assert_close(features.pooled, expected)
    torch.testing.assert_close(features.patches, encoder.norm(raw.patches))
    assert features.attention.shape == (2, 1, 9) and features.grid == (3, 3) and features.layers[1].shape == (2, encoder.dim, 3, 3)
    again = encoder_from_spec(encoder.spec()).double().eval()
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(x).pooled, features.pooled) and again.spec() == encoder.spec()


def test_a_class_token_is_refused_in_one_line():
    with pytest.raises(UserError, match="needs a class token and resnet50 has none: choose pooling simpool"):
        Encoder(tiny("resnet"), POOLINGS["cls"](64))


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("resnet", {"patch_size": 8}, "backbone.patch_size=8 is not to be set: resnet50 has none"),
        ("resnet", {"class_token": True}, "backbone.class_token=True is not to be set"),
        ("swin", {"position": "size"}, "has no position table"),
        ("resnet", {"drop_block_rate": 0.1}, "only drop_path is drawn by key"),
        ("swin", {"drop_path_rate": 0.1}, "say drop_path"),
        ("convnext", {"image_size": 24}, "24x24 pixels are smaller than the stride 32 of convnext_tiny"),
        ("swin", {"image_size": 66}, "66x66 pixels do not divide into patches of 4x4"),
        ("convnext", {"norm_layer": "batchnorm2d", "conv_mlp": True}, "as a last norm is not supported"),
        ("resnet", {"layers": (1, 1), "nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_arguments_end_in_one_line(family, options, words):
    with pytest.raises(UserError) as caught:
        tiny(family, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_average_pooling_against_aliasing_wants_multiples():
    backbone = Backbone("resnetaa50", **RES)
    with pytest.raises(UserError, match="75x75 pixels do not divide into patches of 32x32"):
        backbone(images(75, dtype=torch.float32))
    assert backbone(images(96, dtype=torch.float32)).grid == (3, 3)


# first weights and files


def test_first_weights_are_the_references():
    torch.manual_seed(0)
    resnet = Backbone("resnet50", layers=(1, 1, 1, 1))
    conv = resnet.layer3[0].conv2.weight
    assert conv.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)  # He, by fan out
    assert resnet.layer4[0].bn3.weight.eq(0).all() and resnet.layer4[0].bn2.weight.eq(1).all()
    assert Backbone("resnet50", zero_init_last=False, **RES).layer1[0].bn3.weight.eq(1).all()
    convnext = Backbone("convnext_tiny", depths=(1, 1, 1, 1))
    for weight in (convnext.stem[0].weight, convnext.stages[3].blocks[0].mlp.fc1.weight, convnext.stages[2].downsample[1].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(convnext.stages[0].blocks[0].gamma, torch.full((96,), 1e-6))
    model = Backbone("swin_tiny_patch4_window7_224", depths=(2, 1, 1, 1))
    for weight in (model.layers[3].blocks[0].attn.relative_position_bias_table, model.layers[3].blocks[0].attn.qkv.weight, model.layers[1].downsample.reduction.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("family", ["resnet", "convnext", "convnext v2", "swin", "swin v2"])
def test_pretrained_weights_from_a_file(family, tmp_path):
    name, arguments = FAMILIES.get(family) or PLAIN[family]
    sized = {"img_size": 64} if "swin" in family else {}
    donor = timm.create_model(name, **sized, **arguments).eval()
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "timm.pth")
    backbone = tiny(family, weights=tmp_path / "timm.pth").eval()
    x = images(64, dtype=torch.float32)
    mine = backbone(x, layers=(-1,)).stages[0]
    theirs = donor.forward_features(x)
    torch.testing.assert_close(backbone.norm(mine.permute(0, 2, 3, 1)) if "swin" in family else mine, theirs)
    with pytest.raises(UserError, match="does not fit this backbone|timm does not know this layout"):
        tiny(family, weights=tmp_path / "timm.pth", **({"layers": (1, 2, 2, 1)} if family == "resnet" else {"depths": (1, 1, 1, 1)}))


@pytest.mark.slow
def test_an_export_of_the_second_swin_opens_everywhere(tmp_path):
    """The folder is compared in timm and transformers while it is written, and comes back bit for bit."""
    backbone = tiny("swin v2")
    encoder = stirred(Encoder(backbone, POOLINGS["gap"](backbone.dim), norm="before"), by=0.3).float()
    maskwise.export(encoder, tmp_path / "out", say=None)
    back, x = maskwise.load(tmp_path / "out"), images(64, dtype=torch.float32)
    assert back.spec() == encoder.spec() and torch.equal(back(x).pooled, encoder(x).pooled)
