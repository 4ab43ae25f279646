"""Parts of MAP against loops: Gramian tokens, stage fusion, class attention, grouped MLP."""

import math

import pytest
import torch
import torch.nn.functional as F

from maskwise.errors import UserError
from maskwise.nn.multi_token.class_attention import ClassAttention, ClassAttentionBlock, GroupedMLP, shuffle_channels
from maskwise.nn.multi_token.gramian_tokens import GramianTokens
from maskwise.nn.multi_token.options import AttentionOptions
from maskwise.nn.multi_token.stage_fusion import MultiScale, resize_map


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gramian_entries_against_loops():
    """Compute the triangle entry by entry; check its length, norm and invariance to scale."""
    module = GramianTokens(6, 3, width=5, groups=1).double().eval()
    reduced = drawn(2, 5, 3, 4)
    entries = module.gramian_entries(reduced)
    rows = reduced.flatten(2) / 12
    for b in range(2):
        entries_by_hand = [
            sum(float(x * y) for x, y in zip(rows[b, i], rows[b, j])) for i in range(5) for j in range(i, 5)
        ]
        length = math.sqrt(sum(value**2 for value in entries_by_hand))
        torch.testing.assert_close(
            entries[b],
            torch.tensor([value / length for value in entries_by_hand], dtype=torch.float64),
            atol=1e-14,
            rtol=0,
        )
    torch.testing.assert_close(module.gramian_entries(3.7 * reduced), entries, atol=1e-14, rtol=0)
    torch.testing.assert_close(entries.norm(dim=1), torch.ones(2, dtype=torch.float64))
    for width, length in ((384, 73_920), (192, 18_528)):
        with torch.device("meta"):
            assert GramianTokens(width, 4).expand[0].in_channels == length


def test_gramian_tokens_against_loops():
    """Compute interleaving, grouped convolution and each token's coordinates number by number."""
    torch.manual_seed(0)
    module = GramianTokens(6, 2, width=4, groups=2).double().eval()
    module.expand[1].running_mean.normal_()
    module.expand[1].running_var.uniform_(0.5, 2)
    image = drawn(2, 6, 3, 3)
    entries = module.gramian_entries(module.reduce(image)).tolist()
    weight, bn = module.expand[0].weight[:, :, 0, 0].tolist(), module.expand[1]
    tokens = module(image).detach()
    for b in range(2):
        interleaved = [entries[b][i] for t in range(2) for i in range(t, 10, 2)]
        for out in range(12):
            first = 5 * (out // 6)
            value = sum(weight[out][i] * interleaved[first + i] for i in range(5))
            value = (value - float(bn.running_mean[out])) / math.sqrt(float(bn.running_var[out]) + 1e-5)
            assert float(tokens[b, out % 2, out // 2]) == pytest.approx(value, abs=1e-12)


def test_gramian_sizes_must_divide():
    for options, words in (({"tokens": 4, "width": 6}, "21 entries"), ({"tokens": 4, "groups": 7}, "gram_groups=7")):
        with pytest.raises(UserError, match=words):
            GramianTokens(8, **options)


def test_gramian_matrix_of_half_precision_inputs_is_float32():
    module = GramianTokens(6, 3, width=5, groups=1).eval()
    reduced = drawn(2, 5, 3, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = module.gramian_entries(reduced.bfloat16())
    torch.testing.assert_close(half, module.gramian_entries(reduced.bfloat16().float()), atol=1e-6, rtol=0)


def test_resizing_of_the_released_code():
    small, large = drawn(1, 2, 2, 2), drawn(1, 2, 8, 8)
    torch.testing.assert_close(
        resize_map(small, (4, 4), "released"), small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )  # adaptive averaging repeats
    middle = large.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(resize_map(large, (4, 4), "released"), middle)  # bilinear by 2 is the mean of four
    far = drawn(1, 2, 16, 16)
    expected = torch.stack(
        [far[:, :, 4 * i + 1 : 4 * i + 3, 4 * j + 1 : 4 * j + 3].mean((-1, -2)) for i in range(4) for j in range(4)], -1
    ).reshape(1, 2, 4, 4)
    torch.testing.assert_close(
        resize_map(far, (4, 4), "released"), expected
    )  # by 4 it reads the inner four of sixteen only
    torch.testing.assert_close(resize_map(far, (4, 4), "area"), far.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)))
    torch.testing.assert_close(resize_map(small, (4, 4), "area"), F.interpolate(small, size=(4, 4), mode="bilinear"))


def test_fusion_of_all_stages_on_one_grid():
    torch.manual_seed(0)
    fuse = MultiScale([2, 3, 4], 5, level=1).double().eval()
    maps = [drawn(2, 2, 8, 12), drawn(2, 3, 4, 6), drawn(2, 4, 2, 3)]
    joined = torch.cat([resize_map(stage, (4, 6), "released") for stage in maps], dim=1)
    expected = F.gelu(torch.einsum("oc,bchw->bohw", fuse.join[0].weight[:, :, 0, 0], joined) / math.sqrt(1 + 1e-5))
    torch.testing.assert_close(fuse(maps), expected, atol=1e-12, rtol=0)
    assert isinstance(MultiScale([5], 5).join, torch.nn.Identity) and isinstance(
        MultiScale([4], 5).join[2], torch.nn.ReLU
    )
    for options, words in (({"level": 3}, "level=3 of 3"), ({"level": 0, "resample": "bicubic"}, "resample")):
        with pytest.raises(UserError, match=words):
            MultiScale([2, 3, 4], 5, **options)


def heads_of(x, heads):
    return [x[:, h * x.shape[1] // heads : (h + 1) * x.shape[1] // heads] for h in range(heads)]


@pytest.mark.parametrize("keys", ["tokens+pixels", "pixels"])
@pytest.mark.parametrize("talking", [False, True])
def test_class_attention_against_loops(keys, talking):
    torch.manual_seed(0)
    layer = ClassAttention(6, 4, 2, talking, keys).double().eval()
    x = drawn(1, 5, 6)  # 2 tokens, 3 pixels
    sources = x[0] if keys == "tokens+pixels" else x[0, 2:]
    q, k, v = (
        F.linear(source, part.weight, part.bias)
        for part, source in ((layer.q, x[0, :2]), (layer.k, sources), (layer.v, sources))
    )
    logits = torch.stack([qh @ kh.T / math.sqrt(2) for qh, kh in zip(heads_of(q, 2), heads_of(k, 2))])
    if talking:
        logits = logits + torch.stack(
            [sum(layer.before.weight[h, i] * logits[i] for i in range(2)) + layer.before.bias[h] for h in range(2)]
        )
    attention = torch.stack([torch.stack([row.exp() / row.exp().sum() for row in head]) for head in logits])
    weights = attention
    if talking:
        weights = weights + torch.stack(
            [sum(layer.after.weight[h, i] * weights[i] for i in range(2)) + layer.after.bias[h] for h in range(2)]
        )
    mixed = torch.cat([weights[h] @ vh for h, vh in enumerate(heads_of(v, 2))], dim=1)
    added, columns = layer(x, 2)
    torch.testing.assert_close(added[0], F.linear(mixed, layer.proj.weight, layer.proj.bias), atol=1e-12, rtol=0)
    torch.testing.assert_close(columns[0], attention[..., -3:], atol=1e-12, rtol=0)


def test_talking_heads_of_zero_weight_are_plain_attention():
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
    hidden = hidden[
        ..., [i * 3 + g for g in range(3) for i in range(4)]
    ]  # interleaved: block g gets channels g, g + 3, ...
    torch.testing.assert_close(mlp(x), hidden @ dense[1].T + mlp.fc2.bias, atol=1e-12, rtol=0)
    assert shuffle_channels(torch.arange(6).view(1, 6, 1), 2).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_block_updates_tokens_by_residuals():
    torch.manual_seed(0)
    block = ClassAttentionBlock(8, 2, options=AttentionOptions(embed=4)).double().eval()
    tokens, pixels = drawn(2, 3, 8), drawn(2, 5, 8, seed=1)
    normed = F.layer_norm(torch.cat([tokens, pixels], 1), (8,), eps=1e-6)
    first = tokens + block.attention(normed, 3)[0]
    out, attention = block(tokens, pixels)
    torch.testing.assert_close(out, first + block.mlp(F.layer_norm(first, (8,), eps=1e-6)))
    assert attention.shape == (2, 2, 3, 5)
