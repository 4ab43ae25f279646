"""MAP, its heads and their numbers of weights, as published (MAP, tables 1 and 2)."""

import pytest
import torch
import torch.nn.functional as F

from maskwise.errors import UserError
from maskwise.functional.map_losses import map_loss
from maskwise.nn.backbones.timm_registry import timm
from maskwise.nn.dropout import KeyedDropout
from maskwise.nn.multi_token.head import MAP, MAPHead
from maskwise.nn.multi_token.token_heads import JointHead, SplitHead


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **options)


RELEASED = {"dim": 384, "groups": 4, "heads": 12}


@pytest.mark.parametrize(
    "name, tokens, gram_groups, published",
    [("convnext_tiny", 2, 24, 47_833_760), ("convnext_small", 3, 16, 82_837_664)],
)
def test_parameters_of_the_released_convnexts(name, tokens, gram_groups, published):
    body = on_meta(name)
    with torch.device("meta"):
        head = MAPHead([96, 96, 192, 384, 768], 1000, tokens=tokens, gram_groups=gram_groups, **RELEASED)
    assert count(body) - count(body.head.norm) + count(head) == published  # MAP has no final norm before it


def test_parameters_of_the_released_resnet():
    """Correct timm's count for the stem, 64 wide throughout, and SE's batch norm in place of a bias."""
    body = on_meta("seresnet50", stem_type="deep", stem_width=32, channels=(64, 128, 256, 256))
    stem = (3 * 64 + 64 * 64 + 64 * 64) * 9 + 3 * 2 * 64 - count(body.conv1) - count(body.bn1)
    se = sum(
        2 * c - c
        for width, blocks in ((256, 3), (512, 4), (1024, 6), (1024, 3))
        for c in [width // 16]
        for _ in range(blocks)
    )
    with torch.device("meta"):
        head = MAPHead([64, 256, 512, 1024, 1024], 1000, tokens=4, gram_groups=32, talking=True, **RELEASED)
    assert count(body) + stem + se + count(head) == 42_708_288
    assert count(head.heads) == 6_160_288 and count(head.averaged_heads) == 1_543_072


@pytest.mark.parametrize(
    "name, dims, embed, light, published",
    [
        ("resnet50", [64, 256, 512, 1024, 2048], 192, False, 38.0),
        ("resnet50", [64, 256, 512, 1024, 2048], 192, True, 35.0),
    ],
)
def test_parameters_of_the_paper(name, dims, embed, light, published):
    """Tables 1 and 2 of the MAP paper, with G = 2 and T = 4."""
    with torch.device("meta"):
        head = MAPHead(dims, 1000, embed=embed, light=light)
    assert round((count(on_meta(name)) + count(head)) / 1e6, 1) == published


def test_weights_removed_by_light():
    """MAP-light has G (T D C + C + 2 T D) weights fewer."""
    with torch.device("meta"):
        head = MAPHead([384], 1000)
    full = count(head)
    head.drop_token_heads()
    assert full - count(head) == 3_080_144 == 2 * (4 * 384 * 1000 + 1000 + 2 * 4 * 384)


def small(**options):
    torch.manual_seed(0)
    return MAPHead([4, 8], 10, dim=8, level=1, tokens=3, gram_groups=1, heads=2, **options).double()


def maps():
    return [drawn(2, 4, 6, 6), drawn(2, 8, 3, 3, seed=1)]


def test_the_averaged_token_is_the_mean_of_the_tokens():
    """Compare the mean, and the sum, with the tokens; of a single token it is that token."""
    torch.manual_seed(0)
    image = drawn(2, 8, 3, 3)
    single = MAP(8, groups=1, tokens=1, gram_groups=1, heads=2).double().eval()(image)
    torch.testing.assert_close(single.averaged, single.tokens[:, :, 0], atol=1e-12, rtol=0)
    for average in ("mean", "sum"):
        pooled = MAP(8, groups=1, tokens=3, gram_groups=1, heads=2, average=average).double().eval()
        group = pooled.groups[0]
        tokens = group.source(image)
        with_average = torch.cat([tokens, tokens.sum(1, keepdim=True) / (3 if average == "mean" else 1)], dim=1)
        out, _ = group.block(with_average, image.flatten(2).transpose(1, 2))
        torch.testing.assert_close(pooled(image).averaged[:, 0], out[:, 3], atol=1e-12, rtol=0)


def test_gramian_tokens_depend_on_the_image_and_learned_tokens_do_not():
    image = drawn(2, 8, 3, 3)
    own, shared = MAP(8, gram_groups=1).double().eval(), MAP(8, gram=False).double().eval()
    assert not torch.allclose(*own.groups[0].source(image)) and torch.equal(*shared.groups[0].source(image))
    assert torch.count_nonzero(shared.groups[0].source.token) == 0


def test_group_logits_in_training_evaluation_and_light():
    head = small()
    training = head(maps())
    assert training.tokens.shape == training.averaged.shape == (2, 2, 10)
    head.eval()
    evaluation = head(maps())
    assert evaluation.averaged is None
    logits = head.logits(evaluation)
    torch.testing.assert_close(logits, sum(evaluation.tokens.unbind(1)) / 2)
    assert torch.equal(logits.argmax(1), evaluation.tokens.sum(1).argmax(1))  # as of the paper's sum
    head.drop_token_heads()
    light = head(maps())
    assert light.tokens is None and head.logits(light).shape == (2, 10)
    attended = head.map(head.fuse(maps()))
    expected = sum(linear(attended.averaged[:, g, None]) for g, linear in enumerate(head.averaged_heads)) / 2
    torch.testing.assert_close(head.logits(light), expected)
    with pytest.raises(UserError, match="leave light out"):
        small(average=None, light=True)


def test_averaged_heads_learn_from_intra_group_distillation_only():
    for intra, moves in ((0.0, False), (1.0, True)):
        head = small(dropout=0.0)
        groups = head(maps())
        map_loss(groups.tokens, groups.averaged, torch.tensor([1, 2]), F.cross_entropy, intra=intra)["loss"].backward()
        grads = [parameter.grad for parameter in head.averaged_heads.parameters()]
        assert all((grad is not None and bool(grad.abs().max() > 0)) == moves for grad in grads)
        assert all(
            parameter.grad is not None
            for parameter in (*head.map.parameters(), *head.fuse.parameters(), *head.heads.parameters())
        )


def test_joint_head_is_a_sum_over_tokens_where_the_norm_does_nothing():
    torch.manual_seed(0)
    joint, split = JointHead(6, 3, 4, norm=False).double(), SplitHead(6, 3, 4, norm=False).double()
    with torch.no_grad():
        for t, linear in enumerate(split.heads):
            linear.weight.copy_(joint.head.weight[:, 6 * t : 6 * t + 6])
            linear.bias.copy_(joint.head.bias if t == 0 else torch.zeros(4))
    x = drawn(2, 3, 6)
    torch.testing.assert_close(joint(x), split(x))
    normed = JointHead(6, 3, 4).double()
    torch.testing.assert_close(normed.token_logits(x).sum(1) + normed.head.bias, normed(x))
    plain = SplitHead(6, 3, 4).double()
    torch.testing.assert_close(
        plain(x), sum(F.linear(F.layer_norm(x[:, t], (6,)), h.weight, h.bias) for t, h in enumerate(plain.heads))
    )


def test_dropout_is_a_function_of_the_images_key():
    x = torch.ones(4, 1000, dtype=torch.float64)
    key = torch.arange(4)
    drop = KeyedDropout(0.3)
    dropped = drop(x, key, 1)
    assert (
        torch.equal(dropped, drop(x, key, 1))
        and torch.equal(dropped[2:], drop(x[2:], key[2:], 1))
        and not torch.equal(dropped, drop(x, key, 2))
    )
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.7} and abs(float((dropped == 0).double().mean()) - 0.3) < 0.03
    assert drop.eval()(x, key) is x
    head = small(dropout=0.4, token_dropout=0.4, gram=False)
    head.fuse.eval()  # batch norm would couple the images
    keys = torch.tensor([7, 9])
    both = head(maps(), keys)
    alone = head([stage[1:] for stage in maps()], keys[1:])
    torch.testing.assert_close(both.tokens[1:], alone.tokens)
    assert not torch.allclose(both.tokens, head(maps(), keys + 1).tokens)


def test_wrong_arguments():
    for options, words in (
        ({"heads": 3}, "heads=3"),
        ({"mlp_groups": 3}, "mlp_groups=3"),
        ({"groups": 0}, "groups=0"),
        ({"average": "max"}, "average"),
        ({"keys": "x"}, "keys"),
    ):
        with pytest.raises(UserError, match=words):
            MAP(8, **{"gram": False, **options})
