"""Algorithm 1: every row of Table 1 put together from the framework's parts equals its own module."""

import pytest
import torch

from maskwise.nn import POOLINGS, Tokens
from maskwise.nn.pooling import framework
from maskwise.nn.pooling.landscape import LANDSCAPE, composed

DIM, GRID = 8, (5, 7)
ROWS = [
    ("gap", {}), ("max", {}), ("gap_max", {}), ("gem", {}), ("lse", {}), ("how", {"variant": "paper"}), ("how", {"variant": "released"}), ("otk", {}),
    ("otk", {"variant": "released"}), ("otk", {"anchors": 5}), ("otk", {"anchors": 8, "variant": "released"}), ("kmeans", {"tolerance": 0.0}), ("kmeans", {"k": 6, "tolerance": 0.0, "iterations": 3}), ("slot", {}), ("slot", {"k": 5, "iterations": 2}),
    ("se", {"variant": "paper"}), ("se", {"variant": "released"}), ("cbam", {"variant": "paper"}), ("cbam", {"variant": "released"}), ("ge", {"variant": "paper"}),
    ("ge", {"variant": "released"}), ("vit", {"variant": "paper"}), ("vit", {"variant": "released"}), ("vit", {"num_heads": 1}), ("cait", {}), ("cait", {"blocks": 3}),
    ("simpool", {}), ("simpool", {"gamma": None}), ("simpool", {"gamma": 2.0, "num_heads": 4}), ("simpool", {"min_scope": "batch"}),
]  # fmt: skip


def pooling_and_patches(name, options):
    torch.manual_seed(0)
    pooling = POOLINGS[name](DIM, **options).double().eval()
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return pooling, torch.randn(3, 35, DIM, dtype=torch.float64)


@pytest.mark.parametrize("name, options", ROWS, ids=str)
def test_composed_equals_direct(name, options):
    pooling, x = pooling_and_patches(name, options)
    direct = pooling(Tokens(x, x[:, :0], GRID))
    u, attention = framework.pool(x, *composed(pooling, GRID))
    torch.testing.assert_close(u.mean(1), direct.vector, atol=1e-10, rtol=1e-10)
    if direct.vectors is not None:
        torch.testing.assert_close(u, direct.vectors, atol=1e-10, rtol=1e-10)
    if direct.attention is not None:
        held = attention[..., attention.shape[-1] - 35 :]  # without the query itself, where that is among the keys
        held = held / held.sum(-1, keepdim=True) if name == "how" else held
        torch.testing.assert_close(held, direct.attention, atol=1e-10, rtol=1e-10)


def test_every_row_of_the_table_is_an_instance():
    assert {type(row(DIM)).__name__ for name, row in POOLINGS.items() if name not in ("cls", "map")} == set(LANDSCAPE) == {POOLINGS[name].__name__ for name, _ in ROWS}


def by_hand(x, init, wq, wk, *, similarity="dot", normalise="softmax", iterations=1, gamma=None):
    """SimPool's loop on one image, with explicit sums."""
    h = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    u = init
    for _ in range(iterations):
        q, k, s = wq @ u, h @ wk.T, []
        for row in k:
            s.append({"dot": row @ q, "euclidean": -((row - q) ** 2).sum(), "cosine": row @ q / row.norm() / q.norm()}[similarity])
        s = torch.stack(s) / (1 if similarity == "cosine" else x.shape[-1] ** 0.5)
        a = s.softmax(0) if normalise == "softmax" else s.sigmoid() / s.sigmoid().sum()
        v = h - h.min() + 1e-6
        u = a @ h if gamma is None else (a @ v**gamma) ** (1 / gamma)
    return u, a


@pytest.mark.parametrize("options", [
    {"similarity": "euclidean"}, {"similarity": "cosine"}, {"normalise": "sigmoid"}, {"iterations": 3}, {"init": "energy"}, {"init": "learned"}, {"shared": True}, {"gamma": 2.0, "iterations": 2},
], ids=str)  # fmt: skip
def test_ablations_of_simpool_by_hand(options):
    pooling, x = pooling_and_patches("simpool", {"gamma": None, **options})
    torch.nn.init.ones_(pooling.norm_patches.weight), torch.nn.init.zeros_(pooling.norm_patches.bias)
    out = pooling(x)
    wq = pooling.wq.weight
    wk = wq if pooling.shared else pooling.wk.weight
    for image, vector, attention in zip(x, out.vector, out.attention):
        energy = (image**2).sum(-1)
        start = {"gap": image.mean(0), "energy": (energy / energy.sum()) @ image, "learned": pooling.start[0, 0] if pooling.init == "learned" else None}[pooling.init]
        u, a = by_hand(image, start, wq, wk, similarity=pooling.similarity, normalise=pooling.normalise, iterations=pooling.iterations, gamma=pooling.gamma)
        torch.testing.assert_close(vector, u, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(attention[0], a, atol=1e-10, rtol=1e-10)


def test_layers_are_iterations_with_maps_of_their_own():
    layered, x = pooling_and_patches("simpool", {"layers": 3})
    repeated = POOLINGS["simpool"](DIM, iterations=3).double()
    repeated.load_state_dict(layered.state_dict(), strict=False)
    assert not torch.allclose(layered(x).vector, repeated(x).vector)
    for further in layered.further:
        further.load_state_dict({"wq.weight": layered.wq.weight, "wk.weight": layered.wk.weight})
    torch.testing.assert_close(layered(x).vector, repeated(x).vector)


@pytest.mark.parametrize("linear", ["", "q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("layer_norm", ["", "q", "v", "kv", "qkv"])
def test_places_of_linear_and_norm(linear, layer_norm):
    pooling, x = pooling_and_patches("simpool", {"gamma": None, "linear": linear, "layer_norm": layer_norm})
    count = len(linear) * DIM**2 + (2 * DIM if layer_norm else 0)
    assert sum(parameter.numel() for parameter in pooling.parameters()) == count

    def mapped(name, tokens):
        tokens = pooling.norm_patches(tokens) if name in layer_norm else tokens
        return getattr(pooling, f"w{name}")(tokens) if name in linear else tokens

    attention = (mapped("k", x) @ mapped("q", x.mean(1)).unsqueeze(-1) / DIM**0.5).softmax(1)
    torch.testing.assert_close(pooling(x).vector, (attention * mapped("v", x)).sum(1), atol=1e-10, rtol=1e-10)


def test_weights_of_the_ablations():
    def count(**options):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in POOLINGS["simpool"](512, **options).parameters())

    default = 2 * 512**2 + 2 * 512
    assert count(num_heads=4) == count(iterations=5) == count(init="energy") == count(similarity="cosine") == count(k=5) == default
    assert count(shared=True) == default - 512**2 and count(layers=3) == default + 4 * 512**2 and count(init="learned") == default + 512
    assert count(k=5, reduce="concat_project") == default + 5 * 512**2 + 512


def test_default_keeps_the_names_of_its_weights():
    with torch.device("meta"):
        assert list(POOLINGS["simpool"](8, beta=True).state_dict()) == ["beta", "norm_patches.weight", "norm_patches.bias", "wq.weight", "wk.weight"]


def test_heads_are_queries_on_a_block_diagonal():
    """eq. B49: m heads are m queries of width D that are zero outside their block."""
    spread, gather = framework.split(4)
    q = torch.arange(1.0, 9.0).view(1, 1, 8)
    assert torch.equal(spread(q)[0], torch.tensor([[1, 2, 0, 0, 0, 0, 0, 0], [0, 0, 3, 4, 0, 0, 0, 0], [0, 0, 0, 0, 5, 6, 0, 0], [0, 0, 0, 0, 0, 0, 7, 8.0]]))
    z = torch.arange(32.0).view(1, 4, 8)
    assert torch.equal(gather(z), torch.tensor([[[0, 1, 10, 11, 20, 21, 30, 31.0]]]))
