"""Poolings against closed forms, loops and the numbers of weights in the SimPool paper."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F

from maskwise.functional import masks
from maskwise.nn import POOLINGS, SimPool
from maskwise.nn.pooling.dft import low_magnitudes
from maskwise.nn.pooling.kmeans import initial_indices, lloyd
from maskwise.nn.pooling.otk import sinkhorn
from support.poolings import build, map_of, patches


@pytest.mark.parametrize(
    "name, count, options",
    [
        ("gap", 0, {}),
        ("max", 0, {}),
        ("gap_max", 0, {}),
        ("kmeans", 0, {}),
        ("lse", 1, {}),
        ("gem", 1, {}),
        ("gem", 0, {"variant": "released"}),
        ("otk", 3 * 512, {}),
        ("cbam", 32_868, {}),
        ("se", 33_312, {}),
        ("ge", 38_944, {}),
        ("how", 262_656, {}),
        ("simpool", 525_312, {}),
        ("vit", 788_480, {}),
        ("slot", 2_893_312, {}),
        ("cait", 3_154_944, {}),
        ("cait", 6_308_352, {"blocks": 2}),
        ("vgg", 50 * 512**2 + 2 * 512, {}),
        ("dft", 16 * 512**2 + 512, {}),
    ],
)
def test_number_of_weights(name, count, options):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in POOLINGS[name](512, **options).parameters()) == count


@pytest.mark.parametrize("dim", [384, 512, 768, 2048])
def test_number_of_weights_by_formula(dim):
    with torch.device("meta"):
        counts = {
            name: sum(parameter.numel() for parameter in POOLINGS[name](dim).parameters())
            for name in ("slot", "cait", "vit", "simpool")
        }
    assert counts == {
        "slot": 11 * dim**2 + 19 * dim,
        "cait": 12 * dim**2 + 18 * dim,
        "vit": 3 * (dim**2 + dim) + dim,
        "simpool": 2 * dim**2 + 2 * dim,
    }


def test_simple_means():
    x = patches()
    torch.testing.assert_close(build("gap")(x).vector, x.mean(1))
    assert torch.equal(build("max")(x).vector, x.amax(1))
    torch.testing.assert_close(build("gap_max")(x).vector, (x.mean(1) + x.amax(1)) / 2)
    torch.testing.assert_close(build("lse")(x).vector, torch.log(torch.exp(10 * x).mean(1)) / 10)
    assert math.log(49) / 10 == pytest.approx(0.3892, abs=5e-5)
    assert (x.amax(1) - build("lse")(x).vector).max() <= math.log(49) / 10


def test_gap_minimizes_the_squared_distances():
    x = patches(1)
    u = x.mean(1).requires_grad_()
    (gradient,) = torch.autograd.grad(((x - u) ** 2).sum(), u)
    assert gradient.abs().max() < 1e-12


def test_mean_pooling_commutes_with_a_linear_value_map():
    x, w, a = patches(1)[0], torch.randn(16, 16, dtype=torch.float64), torch.rand(49, dtype=torch.float64).softmax(0)
    torch.testing.assert_close(a @ (x @ w.T), w @ (a @ x))
    assert not torch.allclose((a @ (x @ w.T).relu() ** 2) ** 0.5, w @ (a @ x.relu() ** 2) ** 0.5)


def test_gem_clamps_negative_values():
    """(1e-6^2 + 1 + 4 + 1e-6^2) / 4 under the root, for values -3, 1, 2 and -1."""
    x = torch.tensor([-3.0, 1.0, 2.0, -1.0], dtype=torch.float64).view(1, 4, 1)
    pooled = POOLINGS["gem"](1, gamma=2.0).double().pool(x, (2, 2)).vector
    assert pooled.item() == pytest.approx((5 / 4) ** 0.5, rel=1e-9)


def test_released_gem_is_a_power_sum():
    x = patches().abs()
    true = (x**2).mean(1).sqrt()
    torch.testing.assert_close(build("gem")(x).vector, true)
    released = build("gem", variant="released")
    torch.testing.assert_close(released(x).vector, 7 * true)
    torch.testing.assert_close(released(x).vector, F.lp_pool2d(map_of(x), 2, 7).flatten(1))
    large = patches(count=196).abs()
    windows = F.lp_pool2d(map_of(large), 2, 7)
    assert windows.shape[2:] == (2, 2)
    torch.testing.assert_close(released(large).vector, windows.mean((2, 3)))


def test_how_is_a_unit_vector_that_ignores_scale():
    x = patches()
    pooling = build("how")
    with torch.no_grad():
        pooling.fc.bias.zero_()
    out = pooling(x)
    torch.testing.assert_close(out.vector.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(pooling(7 * x).vector, out.vector, atol=1e-9, rtol=0)
    near = F.avg_pool2d(map_of(x), 3, 1, 1, count_include_pad=False)
    mapped = F.conv2d(near, pooling.fc.weight[:, :, None, None])
    torch.testing.assert_close(
        out.vector, F.normalize((mapped * map_of(x).norm(dim=1, keepdim=True)).sum((2, 3)), dim=1)
    )
    torch.testing.assert_close(out.attention[:, 0], x.norm(dim=-1) / x.norm(dim=-1).sum(1, keepdim=True))


def test_how_whitens():
    descriptors = patches(1, 500)[0] @ torch.randn(16, 16, dtype=torch.float64) + 3
    pooling = POOLINGS["how"](16, variant="paper").double()
    assert not any(parameter.requires_grad for parameter in pooling.parameters()) and torch.equal(
        pooling.fc.weight, torch.eye(16, dtype=torch.float64)
    )
    white = pooling.whiten_(descriptors).fc(descriptors)
    assert white.mean(0).abs().max() < 1e-9
    torch.testing.assert_close(torch.cov(white.T), torch.eye(16, dtype=torch.float64), atol=1e-4, rtol=0)


def test_sinkhorn_scales_rows_and_columns():
    logits = torch.randn(2, 3, 49, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plan = sinkhorn(logits, 200)
    torch.testing.assert_close(plan.sum(2), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((2, 49), 3 / 49, dtype=torch.float64))
    kernel, v = logits[0].exp().T, torch.ones(3, dtype=torch.float64)  # u = (k / p) / K v, v = 1 / K^T u, as upstream
    for _ in range(3):
        u = (3 / 49) / (kernel @ v)
        v = 1 / (kernel.T @ u)
    torch.testing.assert_close(sinkhorn(logits, 3)[0], (u[:, None] * kernel * v).T)


def test_transport_to_one_reference_is_the_average():
    x = patches()
    out = build("otk", k=1)(x)
    torch.testing.assert_close(out.vector, x.mean(1))
    torch.testing.assert_close(out.attention, torch.full_like(out.attention, 1 / 49))
    released = build("otk", k=1, variant="released")
    torch.testing.assert_close(released(x).attention[:, 0], (x @ released.references[0] / 25).softmax(1))


def test_kmeans_with_one_centroid_is_the_average():
    torch.testing.assert_close(build("kmeans", k=1)(patches()).vector, patches().mean(1))


def distortion(x, u):
    return torch.cdist(x, u).square().amin(-1).sum(-1)


def test_kmeans_is_lloyds_algorithm():
    x = patches()
    before = None
    for iterations in range(1, 8):
        attention = lloyd(x, 4, iterations, 0.0, 0)
        assert ((attention > 0).sum(1) == 1).all() and (
            (attention == 0) | (attention > 0)
        ).all()  # every patch belongs to one cluster
        now = distortion(x, attention @ x)
        assert before is None or (now <= before + 1e-9).all()
        before = now
    for image, assignment in zip(x, lloyd(x, 4, 5, 0.0, 0)):
        u = image[list(initial_indices(0, 49, 4))]
        for _ in range(5):
            owner = torch.cdist(image, u).argmin(1)
            u = torch.stack([image[owner == j].mean(0) if (owner == j).any() else u[j] for j in range(4)])
        torch.testing.assert_close(assignment @ image, u)


def test_kmeans_stops_below_the_tolerance():
    x = patches()
    assert not torch.equal(lloyd(x, 4, 1, 0.0, 0), lloyd(x, 4, 20, 0.0, 0))
    assert torch.equal(lloyd(x, 4, 20, 1e9, 0), lloyd(x, 4, 1, 0.0, 0))


def test_kmeans_ties_and_empty_clusters():
    x = torch.zeros(1, 4, 2, dtype=torch.float64)
    x[0, 2:] = 1.0
    attention = lloyd(x, 3, 5, 0.01, 0)  # two distinct patches, three centroids: two begin at the same place
    start = initial_indices(0, 4, 3)
    assert len(set(start)) == 3 and initial_indices(0, 1, 3) == (0, 0, 0)
    twins = [
        i
        for i in range(3)
        if (x[0, start[i]] == x[0, start[(i + 1) % 3]]).all() or (x[0, start[i]] == x[0, start[i - 1]]).all()
    ]
    of_twin = attention[0, max(twins)]
    assert torch.equal(
        of_twin, F.one_hot(torch.tensor(start[max(twins)]), 4).double()
    )  # the lower index has the members, the other keeps its initial patch
    assert attention[0, min(twins)].max() == 0.5
    torch.testing.assert_close(attention.sum(2), torch.ones(1, 3, dtype=torch.float64))


def test_kmeans_gradient_is_that_of_the_last_averages():
    x = patches(1).requires_grad_()
    pooling = build("kmeans")
    out = pooling(x)
    (gradient,) = torch.autograd.grad(out.vectors[0, 1].sum(), x)
    torch.testing.assert_close(gradient[0], out.attention[0, 1][:, None].expand(-1, 16))


def test_slots_compete():
    x, pooling = patches(), build("slot", iterations=1)
    h = pooling.norm_patches(x)
    u = pooling.mu + pooling.log_sigma.exp() * pooling.noise
    claims = (h @ pooling.wk.weight.T + pooling.wk.bias) @ (pooling.wq(pooling.norm_slots(u))).transpose(1, 2) / 4
    shares = claims.softmax(-1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 49, dtype=torch.float64))
    out = pooling(x)
    torch.testing.assert_close(
        out.attention, (shares / shares.sum(1, keepdim=True)).transpose(1, 2), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(out.attention.sum(-1), torch.ones(3, 3, dtype=torch.float64))


def test_noise_of_slots_is_a_function_of_the_seed():
    first, same, other = (POOLINGS["slot"](16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.noise, same.noise) and not torch.equal(first.noise, other.noise)
    wide = POOLINGS["slot"](512, k=4).noise
    assert wide.mean().abs() < 0.1 and wide.std() == pytest.approx(1, abs=0.05)
    x, drawn = patches(), build("slot", resample=True)
    assert torch.equal(drawn(x).vector, drawn(x).vector)
    assert not torch.equal(drawn.train()(x).vector, drawn(x).vector)
    assert torch.equal(build("slot").train()(x).vector, build("slot").train()(x).vector)


@pytest.mark.parametrize("name, options", [("otk", {}), ("kmeans", {}), ("slot", {}), ("simpool", {"k": 3})])
def test_reductions_of_k_vectors(name, options):
    x = patches()
    vectors = build(name, **options)(x).vectors
    assert vectors.shape == (3, 3, 16)
    torch.testing.assert_close(build(name, **options, reduce="max_feature")(x).vector, vectors.amax(1))
    torch.testing.assert_close(build(name, **options, reduce="mean")(x).vector, vectors.mean(1))
    joined = build(name, **options, reduce="concat_project")
    joined.load_state_dict(build(name, **options).state_dict(), strict=False)
    torch.testing.assert_close(joined(x).vector, vectors.flatten(1) @ joined.project.weight.T + joined.project.bias)


@pytest.mark.parametrize("dim, weight_init, std", [(384, "normal", 0.02), (2048, "uniform", 0.01276)])
def test_initial_weights_of_simpool(dim, weight_init, std):
    torch.manual_seed(0)
    pooling = SimPool(dim, weight_init=weight_init)
    assert pooling.wq.weight.std().item() == pytest.approx(
        std, rel=0.01
    ) and pooling.wk.weight.std().item() == pytest.approx(std, rel=0.01)


def test_attmask_ranks_logits_like_probabilities():
    pooling, x = build("simpool", gamma=None), patches()
    keys = pooling.norm_patches(x) @ pooling.wk.weight.T
    logits = (keys @ (x.mean(1) @ pooling.wq.weight.T).unsqueeze(-1))[..., 0]
    for mode in ("high", "low"):
        assert torch.equal(
            masks.attention_mask(pooling(x).attention[:, 0], 0.3, mode), masks.attention_mask(logits, 0.3, mode)
        )


@pytest.mark.parametrize("name", [name for name in POOLINGS if name != "cls"])
def test_a_channel_of_zeros_gives_finite_gradients_in_every_precision(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = patches().relu()
        x[..., 3] = 0
        x = x.to(dtype).requires_grad_()
        pooling = build(name).to(dtype)
        pooling(x).vector.square().sum().backward()
        assert x.grad.isfinite().all() and all(
            parameter.grad is None or parameter.grad.isfinite().all() for parameter in pooling.parameters()
        )


def test_dft_equals_a_loop_over_frequencies_and_the_fft():
    x = patches(2, 35, 3)
    maps = x.transpose(1, 2).unflatten(2, (5, 7))
    found = low_magnitudes(maps, 4)
    for u in range(4):
        for v in range(4):
            waves = [[cmath.exp(-2j * math.pi * (u * i / 5 + v * j / 7)) for j in range(7)] for i in range(5)]
            for b in range(2):
                for c in range(3):
                    total = sum(maps[b, c, i, j].item() * waves[i][j] for i in range(5) for j in range(7))
                    assert found[b, c, u, v].item() == pytest.approx(abs(total) / 35, abs=1e-12)
    torch.testing.assert_close(found, torch.fft.fft2(maps).abs()[..., :4, :4] / 35)
    torch.testing.assert_close(found[..., 0, 0], x.mean(1).abs())


def test_dft_pooling_is_one_layer_on_the_magnitudes_and_ignores_shifts():
    pooling, x = build("dft"), patches()
    maps = map_of(x)
    features = torch.fft.fft2(maps).abs()[..., :4, :4] / 49
    expected = F.relu(
        torch.einsum("bduv,eduv->be", features, pooling.fc.weight.unflatten(1, (16, 4, 4))) + pooling.fc.bias
    )
    assert expected.gt(0).any() and expected.eq(0).any()
    torch.testing.assert_close(pooling(x).vector, expected)
    torch.testing.assert_close(pooling(maps.roll((2, -3), dims=(2, 3))).vector, expected)
    assert not torch.allclose(pooling(maps.flip(2).transpose(2, 3)).vector, expected)


def test_vgg_pooling_is_two_layers_on_the_flattened_map():
    pooling, x = build("vgg"), patches()
    first = torch.einsum("bdhw,edhw->be", map_of(x), pooling.fc1.weight.unflatten(1, (16, 7, 7))) + pooling.fc1.bias
    second = F.relu(first) @ pooling.fc2.weight.T + pooling.fc2.bias
    assert second.gt(0).any() and second.lt(0).any()
    torch.testing.assert_close(pooling(x).vector, F.relu(second))
    fine = map_of(x).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # 14 x 14
    torch.testing.assert_close(pooling(fine).vector, F.relu(second))
