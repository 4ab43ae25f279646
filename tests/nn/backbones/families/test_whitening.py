"""Whitening as a first layer: its place in both families, fixed filters, exports and refusals."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import maskwise
from maskwise.errors import UserError
from maskwise.export import write
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.nn.backbones.families.whitening import Whitening

VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "image_size": 32}
VIT |= {"stem": "conv", "stem_channels": (8, 12), "stem_strides": (2, 2)}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16), "image_size": 32, "small_stem": True}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(kind, **options):
    torch.manual_seed(0)
    name, arguments = ("resnet18", RESNET) if kind == "resnet" else ("vit_tiny_patch16_224", VIT)
    backbone = Backbone(name, **{**arguments, **options})
    for layer in backbone.modules():
        if isinstance(layer, Whitening):
            size = layer.in_channels * layer.kernel_size[0] ** 2
            layer.set_filters(torch.randn(size, size, generator=torch.Generator().manual_seed(2)))
    return backbone


def whitened(x, kernel, signs):
    """Responses of the same filters, each a sum over a patch of the padded image."""
    size = 3 * kernel * kernel
    filters = torch.randn(size, size, generator=torch.Generator().manual_seed(2))
    before = (kernel - 1) // 2  # pixels of zeros to the left, the rest to the right
    padded = F.pad(x, (before, kernel - 1 - before) * 2)
    responses = (filters @ F.unfold(padded, kernel)).unflatten(2, x.shape[-2:])
    return torch.cat([responses.clamp_min(0), (-responses).clamp_min(0)], 1) if signs else responses


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("signs", [False, True])
def test_a_resnets_stem_sees_the_whitened_patches(kernel, signs):
    backbone = build("resnet", whiten=kernel, whiten_signs=signs).eval()
    assert backbone.conv1.in_channels == 3 * kernel * kernel * (2 if signs else 1)
    stem = backbone(X, layers=(0,)).stages[0]
    expected = backbone.act1(backbone.bn1(backbone.conv1(whitened(X, kernel, signs))))
    torch.testing.assert_close(stem, expected, rtol=1e-4, atol=1e-4)
    assert backbone(X).grid == build("resnet")(X).grid


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("signs", [False, True])
def test_a_stem_of_convolutions_sees_the_whitened_patches(kernel, signs):
    backbone = build("vit", whiten=kernel, whiten_signs=signs)
    stem = backbone.patch_embed.backbone
    expected = stem.stem(whitened(X, kernel, signs)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(backbone.patch_embed(X), expected, rtol=1e-4, atol=1e-4)
    assert backbone.grid_for((32, 32)) == (8, 8)


def test_a_deep_stem_and_one_channel():
    deep = build("resnet", whiten=3, stem_type="deep", stem_width=4)
    assert isinstance(deep.conv1, nn.Sequential) and deep.conv1[0].in_channels == 27
    gray = build("resnet", whiten=3, mean=(0.5,), std=(0.2,))
    assert gray.whiten.in_channels == 1 and gray(X[:, :1]).patches.isfinite().all()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_filters_are_no_parameters_and_are_kept(kind):
    backbone = build(kind, whiten=3)
    names = [name for name, _ in backbone.named_parameters() if "whiten" in name]
    assert not names and sum("whiten.weight" in key for key in backbone.state_dict()) == 1
    again = Backbone(**backbone.spec())
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again.eval()(X).patches, backbone.eval()(X).patches)


def test_filters_begin_as_single_pixels():
    """Response p of an image is its pixel p of the patch, so that nothing is lost before filters are learned."""
    layer = Whitening(3, 3)
    torch.testing.assert_close(layer(X), F.unfold(F.pad(X, (1, 1, 1, 1)), 3).unflatten(2, (32, 32)))


@pytest.mark.parametrize("signs", [False, True])
def test_a_whitened_stem_opens_in_timm(signs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = build("vit", whiten=3, whiten_signs=signs)
    encoder = Encoder(backbone, POOLINGS["cls"](32)).eval()
    write.write(encoder, "FOLDER")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "FOLDER" / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(code[code.index("import timm") :], names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(X), encoder(X).pooled, rtol=0, atol=1e-4)
    assert torch.equal(maskwise.load(tmp_path / "FOLDER")(X).pooled, encoder(X).pooled)


def test_a_whitened_resnet_does_not_exist_in_timm(tmp_path):
    encoder = Encoder(build("resnet", whiten=3, small_stem=False), POOLINGS["gap"](16))
    with pytest.raises(UserError, match="timm's resnet18 has no whitening of patches: use the run folder"):
        write.write(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("resnet", {"whiten_signs": True}, "backbone.whiten_signs belongs to a whitening: set backbone.whiten"),
        ("vit", {"whiten_signs": True}, "backbone.whiten_signs belongs to a whitening: set backbone.whiten"),
        ("vit", {"stem": "patch", "stem_channels": None, "stem_strides": None, "whiten": 3}, "set backbone.stem=conv"),
    ],
)
def test_wrong_options_are_refused_in_one_line(kind, options, words):
    with pytest.raises(UserError) as caught:
        build(kind, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
