"""MAP's tokens fed back to the stages of a network."""

import pytest
import torch

from maskwise.errors import UserError
from maskwise.nn import MAPNeck
from maskwise.nn.multi_token.head import MAPHead

DIMS = (6, 8, 10, 12)
SIZE = {"dim": 8, "heads": 2, "gram_groups": 1, "dropout": 0.0}


def stages(dims=DIMS, batch=3):
    generator = torch.Generator().manual_seed(1)
    sides = [16 // 2**i for i in range(len(dims))]
    return [
        torch.randn(batch, width, side, side + 1, generator=generator, dtype=torch.float64)
        for width, side in zip(dims, sides)
    ]


def built(dims=DIMS, **options):
    torch.manual_seed(0)
    neck = MAPNeck(dims, **{**SIZE, **options}).double().eval()
    with torch.no_grad():
        for layer in neck.projections or ():
            layer.weight.normal_()
            layer.bias.normal_()
    return neck


@pytest.mark.parametrize("join", ["add", "concat"])
def test_each_stage_gets_its_tokens_at_every_position(join):
    neck, maps = built(join=join, groups=2, tokens=4), stages()
    tokens = neck.map(neck.fuse(maps)).tokens  # [B, 2, 4, 8]
    out = neck(maps)
    assert [each.shape[1] for each in out] == list(neck.out_dims)
    for s, (before, after) in enumerate(zip(maps, out)):
        for b in range(3):
            mine = [tokens[b, k // 4, k % 4] for k in (2 * s, 2 * s + 1)]  # 8 tokens / 4 stages
            pair = torch.cat(mine)
            for i, j in ((0, 0), (before.shape[2] - 1, before.shape[3] - 1)):
                if join == "add":
                    layer = neck.projections[s]
                    expected = before[b, :, i, j] + layer.weight @ pair + layer.bias
                else:
                    expected = torch.cat([before[b, :, i, j], pair])
                torch.testing.assert_close(after[b, :, i, j], expected)


def test_a_new_neck_changes_no_map_and_learns():
    torch.manual_seed(0)
    neck, maps = MAPNeck(DIMS, **SIZE).double(), stages()
    out = neck(maps)
    assert neck.out_dims == DIMS and all(torch.equal(a, b) for a, b in zip(out, maps))
    sum(each.square().sum() for each in out).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in neck.projections)


def test_the_stem_is_fused_without_tokens_of_its_own():
    neck, maps = built((4, *DIMS), join="concat", fed=4), stages((4, *DIMS))
    out = neck(maps)
    assert neck.out_dims == tuple(width + 16 for width in DIMS)
    assert all(torch.equal(after[:, : before.shape[1]], before) for before, after in zip(maps[1:], out))
    changed = [maps[0] + 1, *maps[1:]]
    assert not torch.allclose(neck(changed)[0][:, DIMS[0] :], out[0][:, DIMS[0] :])


def test_a_trained_head_gives_its_tokens():
    torch.manual_seed(3)
    head, neck, maps = MAPHead(DIMS, 5, level=-2, **SIZE).double().eval(), built(join="concat"), stages()
    neck.load_head(head)
    expected = head.map(head.fuse(maps)).tokens.flatten(1, 3)
    shares = [each[:, width:, 0, 0] for each, width in zip(neck(maps), DIMS)]
    torch.testing.assert_close(torch.cat(shares, dim=1), expected)
    with pytest.raises(UserError, match="`fuse` of the head has other sizes"):
        neck.load_head(MAPHead((6, 8, 10, 14), 5, level=-2, **SIZE))


def test_wrong_arguments():
    for options, words in (
        ({"join": "mean"}, "choose add or concat"),
        ({"groups": 1, "tokens": 3, "gram_width": 3}, "1 x 3 tokens do not divide among 4 maps"),
        ({"fed": 5}, "fed=5 of 4 maps"),
    ):
        with pytest.raises(UserError, match=words):
            built(**options)
