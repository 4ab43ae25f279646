"""The encoder: order of pooling and norm, what is computed when, transform, spec."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskwise.functional.errors import UserError
from maskwise.nn import POOLINGS, Backbone, Encoder, Features, SimPool, encoder_from_spec


def build(pooling="cls", norm="after", pool={}, **options):
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder = Encoder(Backbone("vit_tiny_patch16_224", **{**shape, **options}), POOLINGS[pooling](16, **pool), norm=norm)
    torch.nn.init.normal_(encoder.norm.weight)
    return encoder.eval()


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("pooling", ["cls", "simpool"])
@pytest.mark.parametrize("norm", ["after", "before"])
def test_order_of_pooling_and_norm(pooling, norm):
    encoder = build(pooling, norm)
    tokens = encoder.backbone(X, attention=True)
    features = encoder(X)
    assert isinstance(features, Features) and features.grid == (4, 4)
    torch.testing.assert_close(features.patches, encoder.norm(tokens.patches))
    if pooling == "cls":
        expected = encoder.norm(tokens.prefix[:, 0])
        assert torch.equal(features.attention, tokens.cls_attention)
    elif norm == "after":
        expected = encoder.norm(encoder.pooling(tokens.patches).vector)
    else:
        expected = encoder.pooling(encoder.norm(tokens.patches)).vector
    torch.testing.assert_close(features.pooled, expected)


def test_what_nobody_asks_for_is_not_there():
    features = build()(X, attention=False)
    assert features.attention is None and features.keys is None and features.layers is None
    features = build()(X, keys=True, layers=(0, 1))
    assert features.keys.shape == (2, 16, 16) and [tuple(layer.shape) for layer in features.layers] == [(2, 17, 16)] * 2
    torch.testing.assert_close(features.layers[1][:, 0], features.pooled)
    assert build("simpool")(X, attention=False).attention is None


def test_a_mask_hides():
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :8] = True
    encoder = build("simpool", mask_token=True)
    hidden, other = encoder(X, mask), X.clone()
    other[:, :, :16] = 7.0
    torch.testing.assert_close(encoder(other, mask).pooled, hidden.pooled)
    assert not torch.allclose(encoder(X).pooled, hidden.pooled)


@pytest.mark.parametrize("pooling, pool", [
    ("simpool", {"gamma": None}), ("simpool", {"gamma": 2.0, "num_heads": 2, "min_scope": "batch", "beta": True}),
    ("simpool", {"k": 2, "reduce": "concat_project", "similarity": "cosine"}), ("gem", {"gamma": 3.0, "variant": "released"}), ("otk", {"k": 2, "epsilon": 0.5}),
    ("kmeans", {"seed": 3}), ("cait", {"num_heads": 2, "blocks": 2}), *((name, {}) for name in POOLINGS),
])  # fmt: skip
def test_spec_rebuilds_the_encoder(pooling, pool):
    encoder = build(pooling, "before", pool, drop_path=0.1, mask_token=True, qk_norm=True)
    encoder.crop_pct, encoder.image_size = 1.0, (24, 24)
    spec = json.loads(json.dumps(encoder.spec()))
    twin = encoder_from_spec(spec).eval()
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(twin(X).pooled, encoder(X).pooled) and twin.spec() == spec
    assert twin.transform == encoder.transform and twin.transform.size == (24, 24)


def test_transform_takes_pil_and_uint8():
    encoder = build()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    from_pil, from_tensor = encoder.transform(Image.fromarray(pixels)), encoder.transform(tensor)
    assert torch.equal(from_pil, from_tensor) and from_pil.shape == (3, 32, 32) and from_pil.dtype == torch.float32
    resized = Image.fromarray(pixels).resize((int(37 * 70 / 50), 37), Image.BICUBIC)
    left, top = (resized.width - 32) // 2, (37 - 32) // 2
    reference = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=float)
    seen = encoder.uncoloured(tensor)
    assert seen.dtype == torch.uint8 and np.abs(seen.permute(1, 2, 0).numpy() - reference).max() <= 1
    torch.testing.assert_close(from_pil[0], (seen[0].float() / 255 - 0.485) / 0.229)
    assert encoder.transform(Image.new("L", (10, 20))).shape == (3, 32, 32)


def test_black_in_normalised_units():
    black = build().transform(torch.zeros(3, 40, 40, dtype=torch.uint8))
    assert black[:, 0, 0].tolist() == pytest.approx([-2.1179, -2.0357, -1.8044], abs=5e-5)


def test_what_does_not_fit_ends_in_one_line():
    with pytest.raises(UserError, match="cls needs a class token"):
        build(class_token=False)
    with pytest.raises(UserError, match="after or before"):
        build(norm="never")
    with pytest.raises(UserError, match="8 wide"):
        Encoder(Backbone("vit_tiny_patch16_224", image_size=32, depth=1), SimPool(8))


def test_state_dict_keys_are_plain():
    keys = set(build("simpool", mask_token=True).state_dict())
    assert {"backbone.cls_token", "backbone.mask_token", "backbone.blocks.0.attn.qkv.weight", "norm.weight", "pooling.wq.weight"} <= keys
    assert not any(key.startswith("backbone.norm.") for key in keys)


def test_pooling_in_bf16_model_runs():
    assert build("simpool").bfloat16()(X.bfloat16()).pooled.dtype == torch.bfloat16


def test_encoders_of_one_backbone_share_its_norm():
    encoder = build()
    other = Encoder(encoder.backbone, SimPool(16))
    assert other.norm is encoder.norm
    twin = copy.deepcopy(encoder)
    assert Encoder(twin.backbone, SimPool(16)).norm is twin.norm is not encoder.norm
