"""The landscape: weights and facts 22-37 and 50 of pooling.md, against libraries, loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskwise.functional import masks
from maskwise.nn import POOLINGS, SimPool
from maskwise.nn.pooling.kmeans import lloyd, places
from maskwise.nn.pooling.otk import sinkhorn

from timm.layers.cbam import CbamModule  # after maskwise.nn, which readies timm
from timm.layers.gather_excite import GatherExcite
from timm.layers.mlp import ConvMlp
from timm.layers.squeeze_excite import SEModule
from timm.models.cait import LayerScaleBlockClassAttn


def patches(batch=3, count=49, dim=16, seed=0):
    return torch.randn(batch, count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(name, dim=16, **options):
    torch.manual_seed(0)
    pooling = POOLINGS[name](dim, **options).double().eval()
    with torch.no_grad():
        for parameter in pooling.parameters():
            if name not in ("gem", "lse"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return pooling


def map_of(x):
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).unflatten(2, (side, side))


@pytest.mark.parametrize("name, count, options", [
    ("gap", 0, {}), ("max", 0, {}), ("gap_max", 0, {}), ("kmeans", 0, {}), ("lse", 1, {}), ("gem", 1, {}), ("gem", 0, {"variant": "released"}), ("otk", 3 * 512, {}),
    ("cbam", 32_868, {}), ("se", 33_312, {}), ("ge", 38_944, {}), ("how", 262_656, {}), ("simpool", 525_312, {}), ("vit", 788_480, {}), ("slot", 2_893_312, {}),
    ("cait", 3_154_944, {}), ("cait", 6_308_352, {"blocks": 2}),
])  # fmt: skip
def test_weights_of_the_benchmark(name, count, options):
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in POOLINGS[name](512, **options).parameters())
    assert found == count


@pytest.mark.parametrize("dim", [384, 512, 768, 2048])
def test_weights_as_formulas(dim):
    with torch.device("meta"):
        counts = {name: sum(parameter.numel() for parameter in POOLINGS[name](dim).parameters()) for name in ("slot", "cait", "vit", "simpool")}
    assert counts == {"slot": 11 * dim**2 + 19 * dim, "cait": 12 * dim**2 + 18 * dim, "vit": 3 * (dim**2 + dim) + dim, "simpool": 2 * dim**2 + 2 * dim}


def test_simple_means():
    x = patches()
    torch.testing.assert_close(made("gap")(x).vector, x.mean(1))
    assert torch.equal(made("max")(x).vector, x.amax(1))
    torch.testing.assert_close(made("gap_max")(x).vector, (x.mean(1) + x.amax(1)) / 2)
    torch.testing.assert_close(made("lse")(x).vector, torch.log(torch.exp(10 * x).mean(1)) / 10)
    assert math.log(49) / 10 == pytest.approx(0.3892, abs=5e-5)
    assert (x.amax(1) - made("lse")(x).vector).max() <= math.log(49) / 10


def test_gap_minimises_the_squared_distances():
    x = patches(1)
    u = x.mean(1).requires_grad_()
    (gradient,) = torch.autograd.grad(((x - u) ** 2).sum(), u)
    assert gradient.abs().max() < 1e-12


def test_mean_pooling_commutes_with_a_linear_value_map():
    x, w, a = patches(1)[0], torch.randn(16, 16, dtype=torch.float64), torch.rand(49, dtype=torch.float64).softmax(0)
    torch.testing.assert_close(a @ (x @ w.T), w @ (a @ x))
    assert not torch.allclose((a @ (x @ w.T).relu() ** 2) ** 0.5, w @ (a @ x.relu() ** 2) ** 0.5)


def test_released_gem_is_a_power_sum():
    x = patches().abs()
    true = (x**2).mean(1).sqrt()
    torch.testing.assert_close(made("gem")(x).vector, true)
    released = made("gem", variant="released")
    torch.testing.assert_close(released(x).vector, 7 * true)
    torch.testing.assert_close(released(x).vector, F.lp_pool2d(map_of(x), 2, 7).flatten(1))
    large = patches(count=196).abs()
    windows = F.lp_pool2d(map_of(large), 2, 7)
    assert windows.shape[2:] == (2, 2)
    torch.testing.assert_close(released(large).vector, windows.mean((2, 3)))


def test_how_is_a_unit_vector_that_ignores_scale():
    x = patches()
    pooling = made("how")
    with torch.no_grad():
        pooling.fc.bias.zero_()
    out = pooling(x)
    torch.testing.assert_close(out.vector.norm(dim=-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(pooling(7 * x).vector, out.vector, atol=1e-9, rtol=0)
    near = F.avg_pool2d(map_of(x), 3, 1, 1, count_include_pad=False)
    mapped = F.conv2d(near, pooling.fc.weight[:, :, None, None])
    torch.testing.assert_close(out.vector, F.normalize((mapped * map_of(x).norm(dim=1, keepdim=True)).sum((2, 3)), dim=1))
    torch.testing.assert_close(out.attention[:, 0], x.norm(dim=-1) / x.norm(dim=-1).sum(1, keepdim=True))


def test_how_whitens_when_told():
    descriptors = patches(1, 500)[0] @ torch.randn(16, 16, dtype=torch.float64) + 3
    pooling = POOLINGS["how"](16, variant="paper").double()
    assert not any(parameter.requires_grad for parameter in pooling.parameters()) and torch.equal(pooling.fc.weight, torch.eye(16, dtype=torch.float64))
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
    out = made("otk", k=1)(x)
    torch.testing.assert_close(out.vector, x.mean(1))
    torch.testing.assert_close(out.attention, torch.full_like(out.attention, 1 / 49))
    released = made("otk", k=1, variant="released")
    torch.testing.assert_close(released(x).attention[:, 0], (x @ released.references[0] / 25).softmax(1))


def test_kmeans_with_one_centroid_is_the_average():
    torch.testing.assert_close(made("kmeans", k=1)(patches()).vector, patches().mean(1))


def distortion(x, u):
    return torch.cdist(x, u).square().amin(-1).sum(-1)


def test_kmeans_is_lloyds_algorithm():
    x = patches()
    before = None
    for iterations in range(1, 8):
        attention = lloyd(x, 4, iterations, 0.0, 0)
        assert ((attention > 0).sum(1) == 1).all() and ((attention == 0) | (attention > 0)).all()  # every patch belongs to one cluster
        now = distortion(x, attention @ x)
        assert before is None or (now <= before + 1e-9).all()
        before = now
    for image, found in zip(x, lloyd(x, 4, 5, 0.0, 0)):
        u = image[list(places(0, 49, 4))]
        for _ in range(5):
            owner = torch.cdist(image, u).argmin(1)
            u = torch.stack([image[owner == j].mean(0) if (owner == j).any() else u[j] for j in range(4)])
        torch.testing.assert_close(found @ image, u)


def test_kmeans_stands_still_once_it_moves_less_than_the_tolerance():
    x = patches()
    assert not torch.equal(lloyd(x, 4, 1, 0.0, 0), lloyd(x, 4, 20, 0.0, 0))
    assert torch.equal(lloyd(x, 4, 20, 1e9, 0), lloyd(x, 4, 1, 0.0, 0))


def test_kmeans_ties_and_empty_clusters():
    x = torch.zeros(1, 4, 2, dtype=torch.float64)
    x[0, 2:] = 1.0
    attention = lloyd(x, 3, 5, 0.01, 0)  # two distinct patches, three centroids: two begin at the same place
    start = places(0, 4, 3)
    assert len(set(start)) == 3 and places(0, 1, 3) == (0, 0, 0)
    twins = [i for i in range(3) if (x[0, start[i]] == x[0, start[(i + 1) % 3]]).all() or (x[0, start[i]] == x[0, start[i - 1]]).all()]
    kept = attention[0, max(twins)]
    assert torch.equal(kept, F.one_hot(torch.tensor(start[max(twins)]), 4).double())  # the lower index has the members, the other stays where it began
    assert attention[0, min(twins)].max() == 0.5
    torch.testing.assert_close(attention.sum(2), torch.ones(1, 3, dtype=torch.float64))


def test_kmeans_gradient_is_that_of_the_last_averages():
    x = patches(1).requires_grad_()
    pooling = made("kmeans")
    out = pooling(x)
    (gradient,) = torch.autograd.grad(out.vectors[0, 1].sum(), x)
    torch.testing.assert_close(gradient[0], out.attention[0, 1][:, None].expand(-1, 16))


def test_slots_compete():
    x, pooling = patches(), made("slot", iterations=1)
    h = pooling.norm_patches(x)
    u = pooling.mu + pooling.log_sigma.exp() * pooling.noise
    claims = (h @ pooling.wk.weight.T + pooling.wk.bias) @ (pooling.wq(pooling.norm_slots(u))).transpose(1, 2) / 4
    shares = claims.softmax(-1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 49, dtype=torch.float64))
    out = pooling(x)
    torch.testing.assert_close(out.attention, (shares / shares.sum(1, keepdim=True)).transpose(1, 2), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.attention.sum(-1), torch.ones(3, 3, dtype=torch.float64))


def test_slots_noise_is_a_function_of_the_seed():
    first, same, other = (POOLINGS["slot"](16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.noise, same.noise) and not torch.equal(first.noise, other.noise)
    wide = POOLINGS["slot"](512, k=4).noise
    assert wide.mean().abs() < 0.1 and wide.std() == pytest.approx(1, abs=0.05)
    x, drawn = patches(), made("slot", resample=True)
    assert torch.equal(drawn(x).vector, drawn(x).vector)
    assert not torch.equal(drawn.train()(x).vector, drawn(x).vector)
    assert torch.equal(made("slot").train()(x).vector, made("slot").train()(x).vector)


def timm_gate(ours, theirs, *names):
    with torch.no_grad():
        for layer, name in zip((ours.mlp[0], ours.mlp[2]), names):
            there = theirs.get_submodule(name)
            there.weight.copy_(layer.weight[:, :, None, None])
            if layer.bias is not None:
                there.bias.copy_(layer.bias)


def test_squeeze_and_excitation_is_timms_and_then_averaged():
    x, ours = patches(dim=128), made("se", 128)
    theirs = SEModule(128).double()
    timm_gate(ours, theirs, "fc1", "fc2")
    torch.testing.assert_close(ours(x).vector, theirs(map_of(x)).mean((2, 3)))
    released = made("se", 128, variant="released")
    released.load_state_dict(ours.state_dict())
    torch.testing.assert_close(released(x).vector, F.relu(map_of(x) + theirs(map_of(x))).mean((2, 3)))
    positive = x.abs()
    q = torch.sigmoid(ours.mlp(positive.mean(1)))
    torch.testing.assert_close(released(positive).vector, (1 + q) * positive.mean(1))


@pytest.mark.parametrize("side", [7, 6, 1])
def test_gather_excite_is_timms_and_then_averaged(side):
    x, ours = patches(dim=128, count=side**2), made("ge", 128)
    theirs = GatherExcite(128, extent=2, use_mlp=False)  # timm 1.0.31 cannot build its own learned gather: its parts are put in here
    theirs.gather, theirs.mlp = nn.Sequential(nn.Conv2d(128, 128, 3, 2, 1, groups=128, bias=False), nn.BatchNorm2d(128)), ConvMlp(128, 8)
    theirs = theirs.double().eval()
    with torch.no_grad():
        theirs.gather[0].weight.copy_(ours.conv.weight)
        theirs.gather[1].load_state_dict(ours.norm.state_dict())
    timm_gate(ours, theirs, "mlp.fc1", "mlp.fc2")
    torch.testing.assert_close(ours(x).vector, theirs(map_of(x)).mean((2, 3)))
    released = made("ge", 128, variant="released")
    released.load_state_dict(ours.state_dict())
    torch.testing.assert_close(released(x).vector, F.relu(map_of(x) + theirs(map_of(x))).mean((2, 3)))


def test_cbam_is_timms_and_then_averaged():
    x, ours = patches(dim=128), made("cbam", 128)
    theirs = CbamModule(128, rd_ratio=1 / 16).double().eval()
    timm_gate(ours, theirs, "channel.fc1", "channel.fc2")
    with torch.no_grad():
        theirs.spatial.conv.conv.weight.copy_(ours.conv.weight)
    theirs.spatial.conv.bn.load_state_dict(ours.norm.state_dict())
    torch.testing.assert_close(ours(x).vector, theirs(map_of(x)).mean((2, 3)))


def test_class_attention_is_timms():
    x, ours = patches(dim=32), made("cait", 32)
    theirs = LayerScaleBlockClassAttn(32, num_heads=4, qkv_bias=True, norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=1e-6)).double().eval()
    layer = ours.layers[0]
    names = {"wq": "attn.q", "wk": "attn.k", "wv": "attn.v", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2"}
    state = {f"{there}.{key}": value for here, there in names.items() for key, value in getattr(layer, here).state_dict().items()}
    theirs.load_state_dict({**state, "gamma_1": layer.gamma_1, "gamma_2": layer.gamma_2})
    token = theirs(x, ours.cls_token.expand(3, -1, -1))
    torch.testing.assert_close(ours(x).vector, ours.norm(token)[:, 0])
    torch.testing.assert_close(ours.norm(torch.cat([token, x], 1))[:, 0], ours.norm(token)[:, 0])  # with or without the patches in the last norm


def test_vit_is_one_attention_of_the_class_token():
    x, ours = patches(dim=32), made("vit", 32)
    tokens = torch.cat([ours.query.expand(3, -1, -1), x], 1)
    q, k, v = (layer(tokens).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (ours.wq, ours.wk, ours.wv))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours(x).vector, mixed[:, 0])
    assert torch.equal(POOLINGS["vit"](32).query, torch.zeros(1, 1, 32))


@pytest.mark.parametrize("name, options", [("otk", {}), ("kmeans", {}), ("slot", {}), ("simpool", {"k": 3})])
def test_reductions_of_several_vectors(name, options):
    x = patches()
    vectors = made(name, **options)(x).vectors
    assert vectors.shape == (3, 3, 16)
    torch.testing.assert_close(made(name, **options, reduce="max_feature")(x).vector, vectors.amax(1))
    torch.testing.assert_close(made(name, **options, reduce="mean")(x).vector, vectors.mean(1))
    joined = made(name, **options, reduce="concat_project")
    joined.load_state_dict(made(name, **options).state_dict(), strict=False)
    torch.testing.assert_close(joined(x).vector, vectors.flatten(1) @ joined.project.weight.T + joined.project.bias)


@pytest.mark.parametrize("dim, start, std", [(384, "normal", 0.02), (2048, "uniform", 0.01276)])
def test_first_weights_of_simpool_by_family(dim, start, std):
    torch.manual_seed(0)
    pooling = SimPool(dim, weight_start=start)
    assert pooling.wq.weight.std().item() == pytest.approx(std, rel=0.01) and pooling.wk.weight.std().item() == pytest.approx(std, rel=0.01)


def test_attmask_ranks_by_logits_as_by_probabilities():
    pooling, x = made("simpool", gamma=None), patches()
    keys = pooling.norm_patches(x) @ pooling.wk.weight.T
    logits = (keys @ (x.mean(1) @ pooling.wq.weight.T).unsqueeze(-1))[..., 0]
    for mode in ("high", "low"):
        assert torch.equal(masks.attention_mask(pooling(x).attention[:, 0], 0.3, mode), masks.attention_mask(logits, 0.3, mode))


@pytest.mark.parametrize("name", [name for name in POOLINGS if name != "cls"])
def test_a_channel_of_zeros_gives_finite_gradients_in_every_precision(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = patches().relu()
        x[..., 3] = 0
        x = x.to(dtype).requires_grad_()
        pooling = made(name).to(dtype)
        pooling(x).vector.square().sum().backward()
        assert x.grad.isfinite().all() and all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in pooling.parameters())
