"""SimPool's ablations (Table 10 of its paper) against loops and matrix products written out."""

import pytest
import torch

from maskwise.nn import POOLINGS, Backbone, Encoder, SimPool
from maskwise.nn.encoder import encoder_from_spec
from maskwise.nn.pooling.simpool_ablations import Ablation

DIM = 8


def pooling_and_patches(**options):
    torch.manual_seed(0)
    pooling = SimPool(DIM, **options).double().eval()
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return pooling, torch.randn(3, 35, DIM, dtype=torch.float64)


def by_hand(x, init, wq, wk, *, similarity="dot", normalize="softmax", iterations=1, gamma=None):
    """Pool one image with explicit sums."""
    h = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    u = init
    for _ in range(iterations):
        q, k, s = wq @ u, h @ wk.T, []
        for row in k:
            s.append(
                {"dot": row @ q, "euclidean": -((row - q) ** 2).sum(), "cosine": row @ q / row.norm() / q.norm()}[
                    similarity
                ]
            )
        s = torch.stack(s) / (1 if similarity == "cosine" else x.shape[-1] ** 0.5)
        a = s.softmax(0) if normalize == "softmax" else s.sigmoid() / s.sigmoid().sum()
        v = h - h.min() + 1e-6
        u = a @ h if gamma is None else (a @ v**gamma) ** (1 / gamma)
    return u, a


@pytest.mark.parametrize(
    "options",
    [
        {"similarity": "euclidean"},
        {"similarity": "cosine"},
        {"normalize": "sigmoid"},
        {"iterations": 3},
        {"init": "energy"},
        {"init": "learned"},
        {"shared": True},
        {"gamma": 2.0, "iterations": 2},
    ],
    ids=str,
)
def test_ablations_by_hand(options):
    pooling, x = pooling_and_patches(**{"gamma": None, **options})
    torch.nn.init.ones_(pooling.norm_patches.weight), torch.nn.init.zeros_(pooling.norm_patches.bias)
    out, ablation = pooling(x), pooling.ablation
    wq = pooling.wq.weight
    wk = wq if ablation.shared else pooling.wk.weight
    for image, vector, attention in zip(x, out.vector, out.attention):
        energy = (image**2).sum(-1)
        query_init = {
            "gap": image.mean(0),
            "energy": (energy / energy.sum()) @ image,
            "learned": pooling.start[0, 0] if ablation.init == "learned" else None,
        }[ablation.init]
        u, a = by_hand(
            image,
            query_init,
            wq,
            wk,
            similarity=ablation.similarity,
            normalize=ablation.normalize,
            iterations=ablation.iterations,
            gamma=pooling.gamma,
        )
        torch.testing.assert_close(vector, u, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(attention[0], a, atol=1e-10, rtol=1e-10)


def test_layers_are_iterations_with_projections_of_their_own():
    layered, x = pooling_and_patches(layers=3)
    repeated = SimPool(DIM, iterations=3).double()
    repeated.load_state_dict(layered.state_dict(), strict=False)
    assert not torch.allclose(layered(x).vector, repeated(x).vector)
    for layer in layered.further:
        layer.load_state_dict({"wq.weight": layered.wq.weight, "wk.weight": layered.wk.weight})
    torch.testing.assert_close(layered(x).vector, repeated(x).vector)


@pytest.mark.parametrize("linear", ["", "q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("layer_norm", ["", "q", "v", "kv", "qkv"])
def test_subsets_of_projections_and_norms(linear, layer_norm):
    pooling, x = pooling_and_patches(gamma=None, linear=linear, layer_norm=layer_norm)
    count = len(linear) * DIM**2 + (2 * DIM if layer_norm else 0)
    assert sum(parameter.numel() for parameter in pooling.parameters()) == count

    def mapped(name, tokens):
        tokens = pooling.norm_patches(tokens) if name in layer_norm else tokens
        return getattr(pooling, f"w{name}")(tokens) if name in linear else tokens

    attention = (mapped("k", x) @ mapped("q", x.mean(1)).unsqueeze(-1) / DIM**0.5).softmax(1)
    torch.testing.assert_close(pooling(x).vector, (attention * mapped("v", x)).sum(1), atol=1e-10, rtol=1e-10)


def test_number_of_weights():
    def count(**options):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in SimPool(512, **options).parameters())

    default = 2 * 512**2 + 2 * 512
    for options in ({"num_heads": 4}, {"iterations": 5}, {"init": "energy"}, {"similarity": "cosine"}, {"k": 5}):
        assert count(**options) == default, options
    assert count(shared=True) == default - 512**2
    assert count(layers=3) == default + 4 * 512**2
    assert count(init="learned") == default + 512
    assert count(k=5, reduce="concat_project") == default + 5 * 512**2 + 512


def test_names_of_the_weights_are_stable():
    with torch.device("meta"):
        default = list(SimPool(8, beta=True).state_dict())
        ablated = list(SimPool(8, init="learned", layers=2, k=1).state_dict())
    assert default == ["beta", "norm_patches.weight", "norm_patches.bias", "wq.weight", "wk.weight"]
    assert ablated == ["start", *default[1:], "further.0.wq.weight", "further.0.wk.weight"]


def test_options_are_keywords_or_one_dataclass():
    torch.manual_seed(0)
    flat = SimPool(DIM, iterations=2, similarity="cosine", learn_gamma=True)
    torch.manual_seed(0)
    grouped = SimPool(DIM, ablation=Ablation(iterations=2, similarity="cosine"), learn_gamma=True)
    assert flat.arguments() == grouped.arguments() and flat.ablation == grouped.ablation
    assert flat.arguments()["iterations"] == 2 and flat.arguments()["learn_gamma"]
    rebuilt = POOLINGS["simpool"](**flat.arguments())
    assert rebuilt.arguments() == flat.arguments() and list(rebuilt.state_dict()) == list(flat.state_dict())
    with pytest.raises(TypeError, match="iteration"):
        SimPool(DIM, iteration=2)


def test_exports_with_earlier_names_of_options():
    shape = {"image_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3, "class_token": False}
    encoder = Encoder(Backbone("vit_tiny_patch16_224", **shape), SimPool(12, weight_init="normal", normalize="sigmoid"))
    spec = encoder.spec()
    earlier = {"weight_init": "weight_start", "normalize": "normalise"}
    spec["pooling"] = {earlier.get(key, key): value for key, value in spec["pooling"].items()}
    assert encoder_from_spec(spec).pooling.arguments() == encoder.pooling.arguments()
