"""Maps of one image: sizes of any aspect, attention of every block and head, masks at every ratio, boxes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskwise.evaluation.discovery import dino_seg_box, lost_box
from maskwise.evaluation.look.maps import DRAWN, RATIOS, maps_of, masks_of, whole_size
from maskwise.evaluation.suite.attention_sheets import normalized
from maskwise.imaging.resize import resize_image
from maskwise.methods.masking import MASKINGS
from maskwise.nn import POOLINGS, Backbone, Encoder
from support.looked import image, vit


@pytest.fixture(scope="module")
def seen():
    """An encoder with a class token, an oblong image, and its maps at 64 x 64 pixels."""
    encoder, picture = vit(), image(48, 80)
    return encoder, picture, maps_of(encoder, picture, "a.png", 5, side=64)


def test_sizes_keep_aspect_and_area_in_whole_patches():
    encoder = vit(patch=8, size=32)
    for height, width, side in ((480, 854, 96), (2000, 3000, 896), (3000, 200, 64), (5, 4000, 64), (50, 50, None)):
        tall, wide = whole_size(encoder, (height, width), side)
        assert tall % 8 == 0 and wide % 8 == 0 and tall > 0
        area = (side or 32) ** 2
        scale = (area / (height * width)) ** 0.5
        assert abs(tall - height * scale) <= 8 and abs(wide - width * scale) <= 8
    assert whole_size(encoder, (300, 600), 128) == (88, 184)  # 90.5 and 181 in patches of 8


def test_attention_is_that_of_the_forward_pass_block_by_block(seen):
    encoder, picture, maps = seen
    assert maps.grid == (6, 10) and maps.image.shape == (48, 80, 3) and maps.original == (48, 80)
    inputs = normalized(encoder, resize_image(picture, (48, 80))[None])
    rows = []

    def row_of(block):
        """The class token's softmax row by hand, from the input of the block."""

        def record(module, arguments):
            x = block.norm1(arguments[0])[0]
            q, k, _ = block.attn.qkv(x).unflatten(1, (3, 2, -1)).permute(1, 2, 0, 3)
            rows.append((q[:, 0:1] @ k.transpose(1, 2) * block.attn.scale).softmax(dim=-1)[:, 0, 1:])

        return record

    with torch.no_grad():
        x, _ = encoder.backbone._tokens(inputs, None)
        for block in encoder.backbone.blocks:
            row_of(block)(None, (x,))
            x = block(x)
        features = encoder(inputs)
    assert [layer.title for layer in maps.layers] == ["block 1", "block 2", "block 3"]
    for layer, row in zip(maps.layers, rows):
        torch.testing.assert_close(layer.heads, row)
        torch.testing.assert_close(layer.merged, row.mean(dim=0))
    assert float(rows[0].std() / rows[0].mean()) > 0.3, "attention of this network tells blocks apart"
    torch.testing.assert_close(maps.guide, features.attention[0].mean(dim=0))
    torch.testing.assert_close(maps.tokens, F.normalize(features.patches[0], dim=1))


def test_masks_are_those_of_the_maskings_at_each_ratio(seen):
    _, _, maps = seen
    attention, count = maps.guide.numpy(), 60
    falling = sorted(range(count), key=lambda i: (-attention[i], i))
    rising = sorted(range(count), key=lambda i: (attention[i], i))
    assert tuple(maps.masks) == DRAWN
    for step in (0, 10, 37, 50, 100):
        most = int(RATIOS[step] * count)
        assert set(maps.masks["attmask_high"][step].nonzero()[:, 0].tolist()) == set(falling[:most])
        assert set(maps.masks["attmask_low"][step].nonzero()[:, 0].tolist()) == set(rising[:most])
        hints = set(falling[:most]) - set(maps.masks["attmask_hint"][step].nonzero()[:, 0].tolist())
        assert hints <= set(falling[: int(0.1 * count)]) and len(hints) <= int(count * 0.1 * RATIOS[step])
        assert int(maps.masks["random"][step].sum()) == most and int(maps.masks["block"][step].sum()) <= most
        for name in DRAWN:
            masking = MASKINGS[name](ratio=RATIOS[step], var=0.0, prob=1.0)
            alone = masking(maps.guide[None, None], maps.grid, step=0, sample_ids=torch.tensor([5]), views=1)[0]
            assert torch.equal(maps.masks[name][step], alone), (name, step)
    assert set(masks_of(None, (4, 4), 0)) == {"block", "random"}


def test_boxes_are_those_of_the_discovery_methods(seen):
    pytest.importorskip("scipy")
    encoder, picture, maps = seen
    with torch.no_grad():
        features = encoder(normalized(encoder, picture[None]), keys=True)
    assert maps.boxes["LOST"] == tuple(lost_box(features.keys[0], (6, 10), 8, (48, 80)).box.tolist())
    assert maps.boxes["DINO-seg"] == tuple(dino_seg_box(features.attention[0].mean(dim=0), (6, 10), 8).tolist())


@pytest.mark.parametrize(
    "pooling, class_token, titles",
    [
        ("simpool", False, ["SimPool"]),
        ("simpool", True, ["block 1", "block 2", "block 3", "SimPool"]),
        ("slot", False, ["slot"]),
        ("gap", True, []),
    ],
)
def test_any_pooling_is_shown_and_one_without_attention_has_masks_alone(pooling, class_token, titles):
    encoder = vit(pooling, class_token=class_token)
    maps = maps_of(encoder, image(48, 40))
    assert [layer.title for layer in maps.layers] == titles
    with torch.no_grad():
        features = encoder(normalized(encoder, torch.from_numpy(maps.image).permute(2, 0, 1)[None]))
    torch.testing.assert_close(maps.tokens, F.normalize(features.patches[0], dim=1))
    if not titles:
        assert maps.guide is None and set(maps.masks) == {"block", "random"} and "DINO-seg" not in maps.boxes
        return
    heads = features.attention[0]
    torch.testing.assert_close(maps.layers[-1].heads, heads)
    merged = heads.amax(dim=0) if encoder.pooling.k > 1 else heads.mean(dim=0)
    torch.testing.assert_close(maps.guide, merged)


def test_convolutional_networks_and_floats_are_seen_whole():
    backbone = Backbone("resnet10t", image_size=64)
    encoder = Encoder(backbone, POOLINGS["simpool"](backbone.dim)).eval()
    maps = maps_of(encoder, image(64, 90).float() / 255, side=96)
    assert maps.image.shape[0] % 32 == 0 and maps.grid == tuple(side // 32 for side in maps.image.shape[:2])
    assert len(maps.layers[-1].merged) == len(maps.tokens) == np.prod(maps.grid)
