import math

import pytest
import torch
import torch.nn.functional as F
from maskwise.functional.errors import UserError
from maskwise.nn.class_attention import ClassAttention, ClassAttentionBlock, GroupedMLP, shuffled
from maskwise.nn.dropout import KeyedDropout
from maskwise.nn.fusion import MultiScale, resized
from maskwise.nn.gramian import GramianTokens
from maskwise.nn.map import MAP, MAPHead
from maskwise.nn.timm_models import timm  # readied there
from maskwise.nn.token_heads import JointHead, SplitHead


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **options)


RELEASED = {"dim": 384, "groups": 4, "heads": 12}


# Parameter counts: pooling.md 3.1 (released networks), 4.2 (the paper's), 3.3 (light)


@pytest.mark.parametrize(
    "name, tokens, gram_groups, published", [("convnext_tiny", 2, 24, 47_833_760), ("convnext_small", 3, 16, 82_837_664)]
)
def test_parameters_of_the_released_convnexts(name, tokens, gram_groups, published):
    body = on_meta(name)
    with torch.device("meta"):
        head = MAPHead([96, 96, 192, 384, 768], 1000, tokens=tokens, gram_groups=gram_groups, **RELEASED)
    assert count(body) - count(body.head.norm) + count(head) == published  # MAP has no final norm before it


def test_parameters_of_the_released_resnet():
    """Its body is not timm's: the stem is 64 wide throughout, the first convolution of SE has a batch norm instead of a bias."""
    body = on_meta("seresnet50", stem_type="deep", stem_width=32, channels=(64, 128, 256, 256))
    stem = (3 * 64 + 64 * 64 + 64 * 64) * 9 + 3 * 2 * 64 - count(body.conv1) - count(body.bn1)
    se = sum(2 * c - c for width, blocks in ((256, 3), (512, 4), (1024, 6), (1024, 3)) for c in [width // 16] for _ in range(blocks))
    with torch.device("meta"):
        head = MAPHead([64, 256, 512, 1024, 1024], 1000, tokens=4, gram_groups=32, talking=True, **RELEASED)
    assert count(body) + stem + se + count(head) == 42_708_288
    assert count(head.heads) == 6_160_288 and count(head.averaged_heads) == 1_543_072


@pytest.mark.parametrize(
    "name, dims, embed, light, published", [("resnet50", [64, 256, 512, 1024, 2048], 192, False, 38.0), ("resnet50", [64, 256, 512, 1024, 2048], 192, True, 35.0)]
)
def test_parameters_of_the_paper(name, dims, embed, light, published):
    """G = 2, T = 4, as tables 1 and 2 print them."""
    with torch.device("meta"):
        head = MAPHead(dims, 1000, embed=embed, light=light)
    assert round((count(on_meta(name)) + count(head)) / 1e6, 1) == published


def test_what_light_leaves_out():
    """Fact 44: G (T D C + C + 2 T D)."""
    with torch.device("meta"):
        head = MAPHead([384], 1000)
    whole = count(head)
    head.lighten()
    assert whole - count(head) == 3_080_144 == 2 * (4 * 384 * 1000 + 1000 + 2 * 4 * 384)


# Gramian tokens


def test_gramian_entries_against_loops():
    """Length, norm, order and scale of fact 38, and the triangle entry by entry."""
    module = GramianTokens(6, 3, width=5, groups=1).double().eval()
    reduced = drawn(2, 5, 3, 4)
    entries = module.entries(reduced)
    rows = reduced.flatten(2) / 12
    for b in range(2):
        found = [sum(float(x * y) for x, y in zip(rows[b, i], rows[b, j])) for i in range(5) for j in range(i, 5)]
        length = math.sqrt(sum(value**2 for value in found))
        torch.testing.assert_close(entries[b], torch.tensor([value / length for value in found], dtype=torch.float64), atol=1e-14, rtol=0)
    torch.testing.assert_close(module.entries(3.7 * reduced), entries, atol=1e-14, rtol=0)
    torch.testing.assert_close(entries.norm(dim=1), torch.ones(2, dtype=torch.float64))
    for width, length in ((384, 73_920), (192, 18_528)):
        with torch.device("meta"):
            assert GramianTokens(width, 4).expand[0].in_channels == length


def test_gramian_tokens_against_loops():
    """Dealing out, grouped convolution and the place of each token's coordinates, one number at a time."""
    torch.manual_seed(0)
    module = GramianTokens(6, 2, width=4, groups=2).double().eval()
    module.expand[1].running_mean.normal_()
    module.expand[1].running_var.uniform_(0.5, 2)
    image = drawn(2, 6, 3, 3)
    entries = module.entries(module.reduce(image)).tolist()
    weight, bn = module.expand[0].weight[:, :, 0, 0].tolist(), module.expand[1]
    tokens = module(image).detach()
    for b in range(2):
        dealt = [entries[b][i] for t in range(2) for i in range(t, 10, 2)]
        for out in range(12):
            first = 5 * (out // 6)
            value = sum(weight[out][i] * dealt[first + i] for i in range(5))
            value = (value - float(bn.running_mean[out])) / math.sqrt(float(bn.running_var[out]) + 1e-5)
            assert float(tokens[b, out % 2, out // 2]) == pytest.approx(value, abs=1e-12)


def test_gramian_sizes_that_do_not_divide_are_refused():
    for options, words in (({"tokens": 4, "width": 6}, "21 entries"), ({"tokens": 4, "groups": 7}, "gram_groups=7")):
        with pytest.raises(UserError, match=words):
            GramianTokens(8, **options)


def test_gramian_matrix_of_halves_is_full():
    module = GramianTokens(6, 3, width=5, groups=1).eval()
    reduced = drawn(2, 5, 3, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = module.entries(reduced.bfloat16())
    torch.testing.assert_close(found, module.entries(reduced.bfloat16().float()), atol=1e-6, rtol=0)


# Fusion


def test_fusion_resizes_as_the_reference_does():
    small, large = drawn(1, 2, 2, 2), drawn(1, 2, 8, 8)
    torch.testing.assert_close(resized(small, (4, 4), "released"), small.repeat_interleave(2, 2).repeat_interleave(2, 3))  # adaptive averaging repeats
    middle = large.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(resized(large, (4, 4), "released"), middle)  # bilinear by 2 is the mean of four
    far = drawn(1, 2, 16, 16)
    expected = torch.stack([far[:, :, 4 * i + 1 : 4 * i + 3, 4 * j + 1 : 4 * j + 3].mean((-1, -2)) for i in range(4) for j in range(4)], -1).reshape(1, 2, 4, 4)
    torch.testing.assert_close(resized(far, (4, 4), "released"), expected)  # by 4 it sees the inner four of sixteen only
    torch.testing.assert_close(resized(far, (4, 4), "area"), far.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)))
    torch.testing.assert_close(resized(small, (4, 4), "area"), F.interpolate(small, size=(4, 4), mode="bilinear"))


def test_fusion_joins_all_stages_on_one_grid():
    torch.manual_seed(0)
    fuse = MultiScale([2, 3, 4], 5, level=1).double().eval()
    maps = [drawn(2, 2, 8, 12), drawn(2, 3, 4, 6), drawn(2, 4, 2, 3)]
    joined = torch.cat([resized(each, (4, 6), "released") for each in maps], dim=1)
    expected = F.gelu(torch.einsum("oc,bchw->bohw", fuse.join[0].weight[:, :, 0, 0], joined) / math.sqrt(1 + 1e-5))
    torch.testing.assert_close(fuse(maps), expected, atol=1e-12, rtol=0)
    assert isinstance(MultiScale([5], 5).join, torch.nn.Identity) and isinstance(MultiScale([4], 5).join[2], torch.nn.ReLU)
    for options, words in (({"level": 3}, "level=3 of 3"), ({"level": 0, "resample": "bicubic"}, "resample")):
        with pytest.raises(UserError, match=words):
            MultiScale([2, 3, 4], 5, **options)


# Class attention


def heads_of(x, heads):
    return [x[:, h * x.shape[1] // heads : (h + 1) * x.shape[1] // heads] for h in range(heads)]


@pytest.mark.parametrize("keys", ["tokens+pixels", "pixels"])
@pytest.mark.parametrize("talking", [False, True])
def test_class_attention_against_loops(keys, talking):
    torch.manual_seed(0)
    layer = ClassAttention(6, 4, 2, talking, keys).double().eval()
    x = drawn(1, 5, 6)  # 2 tokens, 3 pixels
    seen = x[0] if keys == "tokens+pixels" else x[0, 2:]
    q, k, v = (F.linear(each, part.weight, part.bias) for part, each in ((layer.q, x[0, :2]), (layer.k, seen), (layer.v, seen)))
    logits = torch.stack([qh @ kh.T / math.sqrt(2) for qh, kh in zip(heads_of(q, 2), heads_of(k, 2))])
    if talking:
        logits = logits + torch.stack([sum(layer.before.weight[h, i] * logits[i] for i in range(2)) + layer.before.bias[h] for h in range(2)])
    attention = torch.stack([torch.stack([row.exp() / row.exp().sum() for row in head]) for head in logits])
    weights = attention
    if talking:
        weights = weights + torch.stack([sum(layer.after.weight[h, i] * weights[i] for i in range(2)) + layer.after.bias[h] for h in range(2)])
    mixed = torch.cat([weights[h] @ vh for h, vh in enumerate(heads_of(v, 2))], dim=1)
    added, columns = layer(x, 2)
    torch.testing.assert_close(added[0], F.linear(mixed, layer.proj.weight, layer.proj.bias), atol=1e-12, rtol=0)
    torch.testing.assert_close(columns[0], attention[..., -3:], atol=1e-12, rtol=0)


def test_talking_heads_of_zero_weight_are_plain_attention():
    """Fact 46."""
    torch.manual_seed(0)
    plain, talking = ClassAttention(6, 4, 2).double(), ClassAttention(6, 4, 2, talking=True).double()
    talking.load_state_dict(plain.state_dict(), strict=False)
    for part in (talking.before, talking.after):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    x = drawn(2, 7, 6)
    assert torch.equal(plain(x, 2)[0], talking(x, 2)[0])
    torch.nn.init.constant_(talking.after.bias, 0.5)  # every weight .5 more: rows sum to 1 + .5 x 7
    added = F.linear(talking.v(x).sum(1), talking.proj.weight)[:, None] * 0.5
    torch.testing.assert_close(talking(x, 2)[0], plain(x, 2)[0] + added, atol=1e-12, rtol=0)


def test_grouped_mlp_against_a_dense_one_with_zeros():
    torch.manual_seed(0)
    mlp = GroupedMLP(6, 2, groups=3).double()
    dense = [torch.zeros(12, 6, dtype=torch.float64), torch.zeros(6, 12, dtype=torch.float64)]
    for g in range(3):
        dense[0][4 * g : 4 * g + 4, 2 * g : 2 * g + 2] = mlp.fc1.weight[4 * g : 4 * g + 4, :, 0]
        dense[1][2 * g : 2 * g + 2, 4 * g : 4 * g + 4] = mlp.fc2.weight[2 * g : 2 * g + 2, :, 0]
    x = drawn(2, 3, 6)
    hidden = F.relu(x @ dense[0].T + mlp.fc1.bias)
    hidden = hidden[..., [i * 3 + g for g in range(3) for i in range(4)]]  # dealt out: block g gets channels g, g + 3, ...
    torch.testing.assert_close(mlp(x), hidden @ dense[1].T + mlp.fc2.bias, atol=1e-12, rtol=0)
    assert shuffled(torch.arange(6).view(1, 6, 1), 2).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_the_block_adds_to_tokens_and_leaves_pixels():
    torch.manual_seed(0)
    block = ClassAttentionBlock(8, 4, 2).double().eval()
    tokens, pixels = drawn(2, 3, 8), drawn(2, 5, 8, seed=1)
    normed = F.layer_norm(torch.cat([tokens, pixels], 1), (8,), eps=1e-6)
    first = tokens + block.attention(normed, 3)[0]
    out, attention = block(tokens, pixels)
    torch.testing.assert_close(out, first + block.mlp(F.layer_norm(first, (8,), eps=1e-6)))
    assert attention.shape == (2, 2, 3, 5)


# Groups and heads


def small(**options):
    torch.manual_seed(0)
    return MAPHead([4, 8], 10, dim=8, level=1, tokens=3, gram_groups=1, heads=2, **options).double()


def maps():
    return [drawn(2, 4, 6, 6), drawn(2, 8, 3, 3, seed=1)]


def test_the_averaged_token_is_the_mean_of_the_tokens():
    """Fact 39: their mean, not their sum; of one token it is that token."""
    torch.manual_seed(0)
    image = drawn(2, 8, 3, 3)
    one = MAP(8, groups=1, tokens=1, gram_groups=1, heads=2).double().eval()(image)
    torch.testing.assert_close(one.averaged, one.tokens[:, :, 0], atol=1e-12, rtol=0)
    for average in ("mean", "sum"):
        pooled = MAP(8, groups=1, tokens=3, gram_groups=1, heads=2, average=average).double().eval()
        group = pooled.groups[0]
        tokens = group.source(image)
        beside = torch.cat([tokens, tokens.sum(1, keepdim=True) / (3 if average == "mean" else 1)], dim=1)
        out, _ = group.block(beside, image.flatten(2).transpose(1, 2))
        torch.testing.assert_close(pooled(image).averaged[:, 0], out[:, 3], atol=1e-12, rtol=0)


def test_gramian_tokens_are_an_images_own_and_learned_ones_are_not():
    image = drawn(2, 8, 3, 3)
    own, shared = MAP(8, gram_groups=1).double().eval(), MAP(8, gram=False).double().eval()
    assert not torch.allclose(*own.groups[0].source(image)) and torch.equal(*shared.groups[0].source(image))
    assert torch.count_nonzero(shared.groups[0].source.token) == 0


def test_what_is_said_in_training_in_evaluation_and_when_light():
    head = small()
    said = head(maps())
    assert said.tokens.shape == said.averaged.shape == (2, 2, 10)
    head.eval()
    seen = head(maps())
    assert seen.averaged is None
    logits = head.logits(seen)
    torch.testing.assert_close(logits, sum(seen.tokens.unbind(1)) / 2)
    assert torch.equal(logits.argmax(1), seen.tokens.sum(1).argmax(1))  # fact 47
    head.lighten()
    light = head(maps())
    assert light.tokens is None and head.logits(light).shape == (2, 10)
    attended = head.map(head.fuse(maps()))
    expected = sum(linear(attended.averaged[:, g, None]) for g, linear in enumerate(head.averaged_heads)) / 2
    torch.testing.assert_close(head.logits(light), expected)
    with pytest.raises(UserError, match="leave light out"):
        small(average=None, light=True)


def test_labels_do_not_teach_the_averaged_heads_and_intra_does():
    from maskwise.functional.distillation import map_loss

    for intra, moves in ((0.0, False), (1.0, True)):
        head = small(dropout=0.0)
        said = head(maps())
        map_loss(said.tokens, said.averaged, torch.tensor([1, 2]), F.cross_entropy, intra=intra)["loss"].backward()
        grads = [parameter.grad for parameter in head.averaged_heads.parameters()]
        assert all((grad is not None and bool(grad.abs().max() > 0)) == moves for grad in grads)
        assert all(parameter.grad is not None for parameter in (*head.map.parameters(), *head.fuse.parameters(), *head.heads.parameters()))


def test_joint_head_is_a_sum_over_tokens_where_the_norm_does_nothing():
    """Fact 45."""
    torch.manual_seed(0)
    joint, split = JointHead(6, 3, 4, norm=False).double(), SplitHead(6, 3, 4, norm=False).double()
    with torch.no_grad():
        for t, linear in enumerate(split.heads):
            linear.weight.copy_(joint.head.weight[:, 6 * t : 6 * t + 6])
            linear.bias.copy_(joint.head.bias if t == 0 else torch.zeros(4))
    x = drawn(2, 3, 6)
    torch.testing.assert_close(joint(x), split(x))
    normed = JointHead(6, 3, 4).double()
    torch.testing.assert_close(normed.each(x).sum(1) + normed.head.bias, normed(x))
    plain = SplitHead(6, 3, 4).double()
    torch.testing.assert_close(plain(x), sum(F.linear(F.layer_norm(x[:, t], (6,)), h.weight, h.bias) for t, h in enumerate(plain.heads)))


def test_dropout_belongs_to_the_image():
    x = torch.ones(4, 1000, dtype=torch.float64)
    key = torch.arange(4)
    drop = KeyedDropout(0.3)
    found = drop(x, key, 1)
    assert torch.equal(found, drop(x, key, 1)) and torch.equal(found[2:], drop(x[2:], key[2:], 1)) and not torch.equal(found, drop(x, key, 2))
    assert set(found.unique().tolist()) == {0.0, 1 / 0.7} and abs(float((found == 0).double().mean()) - 0.3) < 0.03
    assert drop.eval()(x, key) is x
    head = small(dropout=0.4, token_dropout=0.4, gram=False)
    head.fuse.eval()  # batch norm would tie the images
    keys = torch.tensor([7, 9])
    both = head(maps(), keys)
    alone = head([each[1:] for each in maps()], keys[1:])
    torch.testing.assert_close(both.tokens[1:], alone.tokens)
    assert not torch.allclose(both.tokens, head(maps(), keys + 1).tokens)


def test_sizes_that_do_not_divide_are_refused():
    for options, words in (({"heads": 3}, "heads=3"), ({"mlp_groups": 3}, "mlp_groups=3"), ({"groups": 0}, "groups=0"), ({"average": "max"}, "average"), ({"keys": "x"}, "keys")):
        with pytest.raises(UserError, match=words):
            MAP(8, **{"gram": False, **options})
