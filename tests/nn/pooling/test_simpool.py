"""SimPool against golden vectors of the released code, loops, limits of gamma and published numbers of weights."""

import math

import pytest
import timm  # after maskwise.nn, which readies it
import torch
import torch.nn.functional as F

from maskwise.errors import UserError
from maskwise.nn import Backbone, Encoder, SimPool

GOLDEN = {
    (None, "image"): (
        [0.93549055, 0.80050145, -1.19224496, -0.54374704],
        [0.82784974, -1.05154719, -0.79476474, 1.01846219],
    ),
    (1.25, "batch"): (
        [2.45008361, 2.32477188, 0.35901169, 0.99810150],
        [2.34363367, 0.49373869, 0.75235641, 2.52978743],
    ),
    (1.25, "image"): (
        [2.45008361, 2.32477188, 0.35901169, 0.99810150],
        [2.32252864, 0.47558592, 0.73246068, 2.50863762],
    ),
    (2, "batch"): ([2.46829484, 2.37010518, 0.45302082, 1.08868179], [2.36504252, 0.57434894, 0.85573835, 2.53865007]),
    (2, "image"): ([2.46829484, 2.37010518, 0.45302082, 1.08868179], [2.34412795, 0.55765560, 0.83816247, 2.51757451]),
}


def golden(gamma, scope, **options):
    pool = SimPool(4, gamma=gamma, min_scope=scope, **options).double()
    i, k = torch.meshgrid(torch.arange(4.0, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64), indexing="ij")
    with torch.no_grad():
        pool.wq.weight.copy_(torch.cos(i + 2 * k) / 2)
        pool.wk.weight.copy_(torch.sin(2 * i + k + 1) / 2)
    return pool, torch.sin(1.7 * torch.arange(24, dtype=torch.float64) + 0.3).reshape(2, 3, 4)


def pool_of(dim=16, **options):
    torch.manual_seed(0)
    pool = SimPool(dim, **options).double()
    with torch.no_grad():
        for p in pool.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return pool


def tokens(batch=3, count=7, dim=16):
    return torch.randn(batch, count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("gamma, scope", GOLDEN)
def test_golden_vectors(gamma, scope):
    pool, x = golden(gamma, scope)
    out = pool(x)
    expected = torch.tensor([[0.3467069, 0.3465929, 0.3067003], [0.3998966, 0.3370130, 0.2630904]], dtype=torch.float64)
    torch.testing.assert_close(out.attention[:, 0], expected, atol=5e-8, rtol=0)
    torch.testing.assert_close(out.vector, torch.tensor(GOLDEN[gamma, scope], dtype=torch.float64), atol=5e-9, rtol=0)


def by_hand(pool, x):
    """Pool by loops over images, heads and channels, in the order of the paper."""
    rows, width = [], pool.dim // pool.num_heads
    for image in x:
        h = F.layer_norm(image, (pool.dim,), pool.norm_patches.weight, pool.norm_patches.bias, 1e-6)
        q, k, v = pool.wq.weight @ image.mean(0), h @ pool.wk.weight.T, h - h.min() + 1e-6
        parts = []
        for start in range(0, pool.dim, width):
            part = slice(start, start + width)
            a = (k[:, part] @ q[part] / math.sqrt(width)).softmax(0)
            parts.append(a @ h[:, part] if pool.gamma is None else (a @ v[:, part] ** pool.gamma) ** (1 / pool.gamma))
        rows.append(torch.cat(parts))
    return torch.stack(rows) + (0 if pool.beta is None else pool.beta)


@pytest.mark.parametrize("gamma", [None, 0.5, 1, 1.25, 2, 5])
@pytest.mark.parametrize("heads", [1, 4])
def test_equals_the_paper_by_hand(gamma, heads):
    pool = pool_of(gamma=gamma, num_heads=heads, beta=True)
    torch.testing.assert_close(pool(tokens()).vector, by_hand(pool, tokens()), atol=1e-10, rtol=1e-10)
    ours = torch.autograd.grad(pool(tokens()).vector.sin().sum(), list(pool.parameters()))
    theirs = torch.autograd.grad(by_hand(pool, tokens()).sin().sum(), list(pool.parameters()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("weight", ["wq", "wk"])
def test_without_query_or_key_the_attention_is_uniform(weight):
    x = tokens()
    for gamma in (None, 1.25):
        pool = pool_of(gamma=gamma)
        torch.nn.init.zeros_(getattr(pool, weight).weight)
        out = pool(x)
        torch.testing.assert_close(out.attention, torch.full_like(out.attention, 1 / 7))
        h = pool.norm_patches(x)
        low = h.amin((1, 2), keepdim=True)
        mean = h.mean(1) if gamma is None else ((h - low + 1e-6) ** gamma).mean(1) ** (1 / gamma)
        torch.testing.assert_close(out.vector, mean, atol=1e-6, rtol=0)


def test_gamma_one_is_the_mean_shifted_by_a_constant():
    power, plain = pool_of(gamma=1.0), pool_of(gamma=None)
    plain.load_state_dict(power.state_dict())
    gap = power(tokens()).vector - plain(tokens()).vector
    low = power.norm_patches(tokens()).flatten(1).min(1).values
    torch.testing.assert_close(gap, (1e-6 - low)[:, None].expand_as(gap))
    normalized = [F.layer_norm(pool(tokens()).vector, (16,)) for pool in (power, plain)]
    torch.testing.assert_close(*normalized)


def test_beta_vanishes_under_a_layer_norm():
    pool = pool_of(beta=True)
    with torch.no_grad():
        pool.beta.fill_(3.7)
    shifted = F.layer_norm(pool(tokens()).vector, (16,))
    (shifted * torch.arange(16)).sum().backward()
    assert pool.beta.grad.abs() < 1e-10
    with torch.no_grad():
        pool.beta.zero_()
    torch.testing.assert_close(F.layer_norm(pool(tokens()).vector, (16,)), shifted, atol=1e-5, rtol=0)
    assert pool_of().beta is None and pool.beta.shape == (1,)


def test_order_of_tokens_does_not_matter():
    pool, perm = pool_of(), torch.randperm(7)
    out, moved = pool(tokens()), pool(tokens()[:, perm])
    torch.testing.assert_close(moved.vector, out.vector)
    torch.testing.assert_close(moved.attention, out.attention[:, :, perm])


def test_maps_are_flattened_row_by_row():
    x = tokens(2, 35)
    out, flat = pool_of()(x.transpose(1, 2).reshape(2, 16, 5, 7)), pool_of()(x)
    assert torch.equal(out.vector, flat.vector) and torch.equal(out.attention, flat.attention)


@pytest.mark.parametrize(
    "gamma, scope, alone", [(1.25, "image", True), (1.25, "batch", False), (None, "batch", True), (None, "image", True)]
)
def test_batch_mates(gamma, scope, alone):
    pool, x = pool_of(gamma=gamma, min_scope=scope), tokens()
    gap = max((pool(x[i : i + 1]).vector[0] - pool(x).vector[i]).abs().max().item() for i in range(3))
    assert (gap < 1e-12) == alone


@pytest.mark.parametrize("dim, count", [(384, 295_680), (512, 525_312), (768, 1_181_184), (2048, 8_392_704)])
def test_parameters_added(dim, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in SimPool(dim).parameters()) == count == 2 * dim**2 + 2 * dim
        assert sum(p.numel() for p in SimPool(dim, beta=True).parameters()) == count + 1


def test_totals_of_published_networks():
    def total(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        for name, dim, count in (
            ("resnet18", 512, 12_214_824),
            ("resnet50", 2048, 33_949_736),
            ("convnext_small", 768, 51_404_872),
        ):
            assert total(timm.create_model(name)) + total(SimPool(dim)) == count
        headless = Encoder(Backbone("vit_small_patch16_224", class_token=False), SimPool(384))
        assert total(headless) == 21_960_576
        assert total(headless) + 385 * 1000 == 22_345_576
        for depth, count in ((11, 20_571_112), (10, 18_796_648), (9, 17_022_184)):
            assert (
                total(Encoder(Backbone("vit_small_patch16_224", class_token=False, depth=depth), SimPool(384)))
                + 385_000
                == count
            )
        for depth, count in ((13, 23_825_128), (14, 25_599_592), (15, 27_374_056), (16, 29_148_520), (17, 30_922_984)):
            assert total(Backbone("vit_small_patch16_224", depth=depth)) + 385_000 == count
        for name, dim, count in (("base", 768, 87_747_305), ("tiny", 192, 5_791_145)):
            encoder = Encoder(Backbone(f"vit_{name}_patch16_224", class_token=False), SimPool(dim, beta=True))
            assert total(encoder) + (dim + 1) * 1000 == count
        lost = total(Backbone("vit_small_patch16_224")) - total(Backbone("vit_small_patch16_224", class_token=False))
        assert lost == 768


def test_default_initial_weights():
    torch.manual_seed(0)
    pool = SimPool(384)
    for layer in (pool.wq, pool.wk):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and layer.bias is None
    assert pool.norm_patches.eps == 1e-6


def test_scaling_the_tokens_sharpens_the_attention():
    pool = pool_of()
    assert (pool(tokens()).attention - pool(10 * tokens()).attention).abs().max() > 0.05
    torch.testing.assert_close(pool.norm_patches(10 * tokens()), pool.norm_patches(tokens()), atol=1e-5, rtol=0)


def test_equal_tokens_give_their_own_value():
    pool, x = pool_of(), tokens(2, 1).expand(2, 7, 16)
    out, h = pool(x), pool.norm_patches(x)
    torch.testing.assert_close(out.attention, torch.full_like(out.attention, 1 / 7))
    torch.testing.assert_close(out.vector, (h - h.amin((1, 2), keepdim=True) + 1e-6)[:, 0])


def test_limits_of_gamma():
    x = tokens()
    h = pool_of().norm_patches(x)
    v = h - h.amin((1, 2), keepdim=True) + 1e-6
    torch.testing.assert_close(pool_of(gamma=2000.0)(x).vector, v.amax(1), rtol=5e-3, atol=0)
    out = pool_of(gamma=1e-3)(x)
    geometric = (out.attention[:, 0, :, None] * v.log()).sum(1).exp()
    torch.testing.assert_close(out.vector, geometric, rtol=2e-2, atol=0)


@pytest.mark.parametrize("gamma", [1.25, 2.0])
def test_the_shift_saves_the_gradient_of_an_empty_channel(gamma):
    a = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def gradient(eps):
        v = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        ((a @ (v + eps) ** gamma) ** (1 / gamma)).backward()
        return v.grad

    assert gradient(0.0).isnan().any()
    torch.testing.assert_close(gradient(1e-6), a)


def test_half_precision_cannot_hold_the_powers():
    assert torch.tensor(1e-6).pow(2).half() == 0 and torch.tensor(90.5).pow(3).half().isinf()
    pool, x = pool_of(64, gamma=2.0).float(), tokens(2, 9, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pool(x).vector, by_hand(pool.double(), x.double()).float(), atol=1e-5, rtol=1e-5)


def test_attention_of_an_untrained_network_is_near_uniform():
    torch.manual_seed(0)
    encoder = Encoder(Backbone("vit_small_patch16_224", class_token=False), SimPool(384)).eval()
    with torch.no_grad():
        attention = encoder(torch.randn(1, 3, 224, 224)).attention
    assert attention.shape == (1, 1, 196) and attention.ge(0).all()
    assert attention.sum(-1).item() == pytest.approx(1, abs=1e-5)
    assert (196 * attention).min() >= 0.90 and (196 * attention).max() <= 1.10


@pytest.mark.parametrize(
    "options, words",
    [({"gamma": 0}, "above 0"), ({"num_heads": 3}, "does not divide"), ({"min_scope": "world"}, "image or batch")],
)
def test_wrong_arguments(options, words):
    with pytest.raises(UserError, match=words):
        SimPool(16, **options)
