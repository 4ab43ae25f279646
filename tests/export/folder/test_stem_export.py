"""Exports of convolutional stems: opened by the model card's own lines, in timm and maskwise, and refused elsewhere."""

import functools
import re

import pytest
import timm
import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer_hybrid import ConvStem

import maskwise
from maskwise.errors import UserError
from maskwise.export import convert, write
from maskwise.nn import POOLINGS, Backbone, Encoder

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
CONV = {"stem": "conv", "stem_channels": (8, 12), "stem_strides": (2, 2)}
CASES = {
    "class token": ("cls", CONV),
    "simpool": ("simpool", {**CONV, "class_token": False}),
    "batch norm": ("cls", {**CONV, "stem_norm_layer": "batch"}),
    "group norm, patches apart": ("gap", {**CONV, "stem_norm_layer": "group", "stem_kernels": (2, 2)}),
    "oblong": ("cls", {**CONV, "image_size": (32, 16)}),
    "five channels": ("cls", {**CONV, "mean": (0.5,) * 5, "std": (0.2,) * 5}),
    "mask token": ("cls", {**CONV, "mask_token": True}),
}


def build(pooling, name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    shape = {"image_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4}
    backbone = Backbone(name, **{**shape, **options})
    encoder = Encoder(backbone, POOLINGS[pooling](64)).eval()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
        for key, value in encoder.state_dict().items():
            if "running" in key:
                value.copy_(torch.rand_like(value) + 0.5)
    return encoder


@pytest.mark.parametrize("pooling, options", CASES.values(), ids=CASES)
def test_the_model_cards_lines_open_the_stem_in_timm(pooling, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder, lines = build(pooling, **options), []
    write.write(encoder, "FOLDER", say=lines.append)
    assert lines[-1] == "  transformers           builds no stem of given convolutions, not tried"
    code = re.search(r"```python\n(.*?)```", (tmp_path / "FOLDER" / "README.md").read_text(), re.DOTALL)[1]
    code = code[code.index("import timm") :]
    assert "transformers" not in code and "maskwise" not in code.replace("only maskwise has the pooling", "")
    names: dict = {}
    exec(code, names)
    model, x = names["model"].eval(), torch.randn(2, len(encoder.mean), *encoder.image_size)
    expected = encoder(x)
    with torch.no_grad():
        patches = model.forward_features(x)[:, model.num_prefix_tokens :]
        torch.testing.assert_close(patches, expected.patches, rtol=0, atol=1e-5)
        if pooling == "cls":
            torch.testing.assert_close(model(x), expected.pooled, rtol=0, atol=1e-5)
        assert model(torch.randn(1, len(encoder.mean), 48, 32)).shape == (1, 64)
    back = maskwise.load(tmp_path / "FOLDER")
    assert back.spec() == encoder.spec()
    assert torch.equal(back(x).pooled, expected.pooled) and torch.equal(back(x).patches, expected.patches)


def test_without_its_stem_timm_refuses_the_weights(tmp_path):
    write.write(build("cls", **CONV), tmp_path / "out")
    with pytest.raises((RuntimeError, AttributeError), match="patch_embed|backbone"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


def test_a_named_hybrid_opens_by_its_folder_alone(tmp_path):
    encoder = build("simpool", "vit_tiny_r_s16_p8_224", patch_size=8, class_token=False)
    write.write(encoder, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(X), encoder(X).patches, rtol=0, atol=1e-5)
    assert maskwise.load(tmp_path / "out").backbone.patch_size == (8, 8)


def test_a_file_in_timms_layout_says_how_the_stem_is_built(tmp_path):
    write.write(build("cls", **CONV), tmp_path / "out")
    lines = convert.convert(tmp_path / "out", to=tmp_path / "weights.pth", layout="timm")
    note = next(line for line in lines if "embed_layer=partial(HybridEmbed, backbone=ConvStem(" in line)
    names = dict(timm=timm, partial=functools.partial, HybridEmbed=HybridEmbed, ConvStem=ConvStem)
    model = eval(note[note.index("timm.create_model") :], names).eval()
    model.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(model(X), build("cls", **CONV)(X).pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["dino", "dinov2"])
def test_layouts_without_such_a_stem_refuse_it(layout, tmp_path):
    write.write(build("cls", **CONV), tmp_path / "out")
    with pytest.raises(UserError) as caught:
        convert.convert(tmp_path / "out", to=tmp_path / "weights.pth", layout=layout)
    assert "cannot be written as" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "weights.pth").exists()
