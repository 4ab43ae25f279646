"""Encoder: order of pooling and norm, optional outputs, transform, spec."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from maskwise.errors import UserError
from maskwise.nn import POOLINGS, Backbone, Encoder, Features, SimPool, encoder_from_spec


def build(pooling="cls", norm="after", pool=None, **options):
    pool = pool or {}
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder = Encoder(
        Backbone("vit_tiny_patch16_224", **{**shape, **options}), POOLINGS[pooling](16, **pool), norm=norm
    )
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


def test_optional_outputs_are_absent_unless_requested():
    features = build()(X, attention=False)
    assert features.attention is None and features.keys is None and features.layers is None
    features = build()(X, keys=True, layers=(0, 1))
    assert features.keys.shape == (2, 16, 16) and [tuple(layer.shape) for layer in features.layers] == [(2, 17, 16)] * 2
    torch.testing.assert_close(features.layers[1][:, 0], features.pooled)
    assert build("simpool")(X, attention=False).attention is None


def test_masked_patches_do_not_affect_the_features():
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :8] = True
    encoder = build("simpool", mask_token=True)
    masked, other = encoder(X, mask), X.clone()
    other[:, :, :16] = 7.0
    torch.testing.assert_close(encoder(other, mask).pooled, masked.pooled)
    assert not torch.allclose(encoder(X).pooled, masked.pooled)


@pytest.mark.parametrize(
    "pooling, pool",
    [
        ("simpool", {"gamma": None}),
        ("simpool", {"gamma": 2.0, "num_heads": 2, "min_scope": "batch", "beta": True}),
        ("simpool", {"k": 2, "reduce": "concat_project", "similarity": "cosine"}),
        ("gem", {"gamma": 3.0, "variant": "released"}),
        ("otk", {"k": 2, "epsilon": 0.5}),
        ("kmeans", {"seed": 3}),
        ("cait", {"num_heads": 2, "blocks": 2}),
        *((name, {}) for name in POOLINGS),
    ],
)
def test_spec_rebuilds_the_encoder(pooling, pool):
    encoder = build(pooling, "before", pool, drop_path=0.1, mask_token=True, qk_norm=True)
    encoder.crop_pct, encoder.image_size = 1.0, (24, 24)
    spec = json.loads(json.dumps(encoder.spec()))
    twin = encoder_from_spec(spec).eval()
    twin.load_state_dict(encoder.state_dict())
    assert torch.equal(twin(X).pooled, encoder(X).pooled) and twin.spec() == spec
    assert twin.transform == encoder.transform and twin.transform.size == (24, 24)


def test_poolings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="cls needs a class token"):
        build(class_token=False)
    with pytest.raises(UserError, match="after or before"):
        build(norm="never")
    with pytest.raises(UserError, match="width 8"):
        Encoder(Backbone("vit_tiny_patch16_224", image_size=32, depth=1), SimPool(8))


def test_state_dict_keys_are_plain():
    keys = set(build("simpool", mask_token=True).state_dict())
    assert {
        "backbone.cls_token",
        "backbone.mask_token",
        "backbone.blocks.0.attn.qkv.weight",
        "norm.weight",
        "pooling.wq.weight",
    } <= keys
    assert not any(key.startswith("backbone.norm.") for key in keys)


def test_bf16_encoder_runs():
    assert build("simpool").bfloat16()(X.bfloat16()).pooled.dtype == torch.bfloat16


def test_encoders_of_one_backbone_share_its_norm():
    encoder = build()
    other = Encoder(encoder.backbone, SimPool(16))
    assert other.norm is encoder.norm
    twin = copy.deepcopy(encoder)
    assert Encoder(twin.backbone, SimPool(16)).norm is twin.norm is not encoder.norm


@pytest.mark.parametrize(
    "images, words",
    [
        (
            torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
            r"normalized floats \[B, 3, H, W\]; this is torch.uint8: give enc",
        ),
        (torch.zeros(3, 32, 32), r"this is \[3, 32, 32\]: add the batch axis, images\[None\]"),
        (torch.zeros(32, 32), r"this is \[32, 32\]: give torch.stack of encoder.transform"),
        (torch.zeros(2, 2, 32, 32), r"this is \[2, 2, 32, 32\]: give encoder.transform"),
        (torch.zeros(2, 32, 32, 3), r"this is \[2, 32, 32, 3\]: give images.permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.float64), "float64 and the weights torch.float32: give images.to"),
        ([torch.zeros(3, 32, 32)], r"this is a list: give encoder.transform\(image\)\[None\]"),
        (torch.zeros(2, 3, 32, 32, device="meta"), "the images are on meta and the encoder on cpu"),
    ],
)
def test_images_of_another_kind_are_refused_in_one_line(images, words):
    with pytest.raises(UserError, match=words) as caught:
        build()(images)
    assert "\n" not in str(caught.value)


def test_masks_and_layers_of_another_kind_are_refused():
    encoder = build()
    for mask in (torch.zeros(2, 15, dtype=torch.bool), torch.zeros(1, 16, dtype=torch.bool), torch.zeros(2, 16)):
        with pytest.raises(UserError, match=r"a mask is bool \[B, N\], here \[2, 16\]"):
            encoder(X, mask)
    for layer in (2, -3):
        with pytest.raises(UserError, match=r"has blocks 0 to 1 \(or -2 to -1\)"):
            encoder(X, layers=(layer,))
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(X.double().float()).pooled.shape == (2, 16)


NETWORKS = {
    "vit": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "rotary": {"name": "vit_small_patch16_dinov3", "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 1},
    "resnet": {"name": "resnet10t"},
    "swin": {"name": "swin_tiny_patch4_window7_224", "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 24},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_copies_and_pickles_are_equal_and_independent(kind):
    torch.manual_seed(0)
    backbone = Backbone(**{"image_size": 64, **NETWORKS[kind]})
    encoder = Encoder(backbone, POOLINGS["simpool"](backbone.dim)).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = encoder(x)  # fills the caches, which are copied too
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(twin(x).pooled, expected.pooled) and torch.equal(twin(x).attention, expected.attention)
        assert twin.spec() == encoder.spec() and twin.transform == encoder.transform
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(encoder(x).pooled, expected.pooled)


class Encoded(torch.utils.data.Dataset):
    """Pooled vectors of images, computed in the data workers."""

    def __init__(self, encoder, images):
        self.encoder, self.images = encoder, images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.encoder(self.encoder.transform(self.images[index])[None]).pooled[0]


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_encoders_run_in_data_workers(start):
    encoder = build("simpool")
    images = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8) for i in range(4)]
    loader = torch.utils.data.DataLoader(Encoded(encoder, images), 2, num_workers=1, multiprocessing_context=start)
    expected = encoder(torch.stack([encoder.transform(image) for image in images])).pooled
    torch.testing.assert_close(torch.cat(list(loader)), expected.detach())
