"""Contract of every row of POOLINGS: shapes, attention, gradients, precision, independence of batch-mates."""

from pathlib import Path

import pytest
import torch

from maskwise.errors import UserError
from maskwise.nn import CLS, POOLINGS, Pooled, Tokens
from maskwise.nn.pooling import Pooling

ROWS = [
    *((name, {}) for name in POOLINGS),
    *(
        (name, {"variant": variant})
        for name in POOLINGS
        for variant in ("paper", "released")
        if "variant" in POOLINGS[name](8).arguments()
    ),
    *(
        (name, {"reduce": reduce})
        for name in ("otk", "kmeans", "slot")
        for reduce in ("concat_project", "max_feature", "mean")
    ),
    ("simpool", {"gamma": None}),
    ("simpool", {"gamma": 2.0, "num_heads": 2, "beta": True}),
    ("simpool", {"gamma": 5.0}),
    ("simpool", {"iterations": 3}),
    ("simpool", {"layers": 3, "num_heads": 2}),
    ("simpool", {"init": "learned"}),
    ("simpool", {"init": "energy"}),
    ("simpool", {"similarity": "euclidean"}),
    ("simpool", {"similarity": "cosine", "normalize": "sigmoid"}),
    ("simpool", {"shared": True}),
    ("simpool", {"linear": "", "layer_norm": "", "gamma": None}),
    ("simpool", {"linear": "qkv", "layer_norm": "qkv"}),
    ("simpool", {"k": 2}),
    ("simpool", {"k": 3, "reduce": "concat_project"}),
    ("cait", {"blocks": 2}),
    ("gem", {"gamma": 3.0}),
    ("otk", {"anchors": 5}),
    ("otk", {"anchors": 8, "sigma": 0.7, "reduce": "mean"}),
    ("otk", {"anchors": 12, "variant": "released"}),
    ("simpool", {"learn_gamma": True, "gamma_max": 5.0}),
    ("map", {"keys": "pixels", "reduce": "max_logit"}),
    ("map", {"gram": False}),
    ("map", {"talking": True, "num_heads": 2}),
    ("map", {"groups": 1, "tokens": 1, "embed": 4}),
    ("vgg", {"size": 3}),
    ("dft", {"size": 7}),
]
DIM, HEADS = 8, 2
BELOW_ONE = (
    "cls",
    "vit",
    "cait",
    "cbam",
    "map",
)  # the rest of the attention went to the prefix, to the query itself, or is lost in a gate


def build(name, options):
    return POOLINGS[name](DIM, **options)


def make_tokens(batch, grid, dtype=torch.float64, zero=False):
    generator = torch.Generator().manual_seed(3)
    count = grid[0] * grid[1]

    def draw(*shape):
        return (
            torch.zeros(shape, dtype=dtype)
            if zero
            else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        )

    row = draw(batch, HEADS, count + 1).softmax(-1)[..., 1:]
    return Tokens(draw(batch, count, DIM).requires_grad_(), draw(batch, 1, DIM).requires_grad_(), grid, row)


def image_tokens(tokens, i):
    return Tokens(tokens.patches[i : i + 1], tokens.prefix[i : i + 1], tokens.grid, tokens.cls_attention[i : i + 1])


@pytest.mark.parametrize("name, options", ROWS, ids=str)
def test_contract(name, options):
    for grid in ((1, 1), (6, 6), (5, 7), (14, 14)):
        assert_contract(name, options, grid)


def assert_contract(name, options, grid, batch=5):
    torch.manual_seed(0)
    pooling = build(name, options).double().eval()
    tokens = make_tokens(batch, grid)
    out = pooling(tokens)
    count = grid[0] * grid[1]
    assert isinstance(out, Pooled) and out.vector.shape == (batch, DIM)
    assert (out.attention is not None) == POOLINGS[name].gives_attention
    if out.attention is not None:
        assert out.attention.shape[0::2] == (batch, count) and out.attention.ge(0).all()
        total = out.attention.sum(-1)
        below = (
            name in BELOW_ONE
            and options.get("variant") != "paper"
            and options.get("keys") != "pixels"
            or name == "cbam"
        )
        assert total.lt(1).all() if below else torch.allclose(total, torch.ones_like(total))
    if getattr(pooling, "k", 1) > 1 and pooling.reduce == "max_logit":
        assert out.vectors.shape == (batch, pooling.k, DIM)
        torch.testing.assert_close(out.vectors.mean(1), out.vector)
    elif name == "map" and pooling.reduce == "max_logit":
        assert out.vectors.shape == (batch, pooling.token_options.groups * pooling.token_options.tokens, DIM)
        torch.testing.assert_close(out.vectors.mean(1), out.vector)
    else:
        assert out.vectors is None
    assert torch.equal(pooling(tokens).vector, out.vector)
    for i in (0, batch - 1):
        alone = pooling(image_tokens(tokens, i))
        assert alone.vector.shape == (1, DIM)
        torch.testing.assert_close(alone.vector[0], out.vector[i], atol=1e-12, rtol=0)
        if alone.attention is not None:
            torch.testing.assert_close(alone.attention[0], out.attention[i], atol=1e-12, rtol=0)
    torch.manual_seed(1)
    copy = build(name, options).double().eval()
    copy.load_state_dict(pooling.state_dict())
    assert torch.equal(copy(tokens).vector, out.vector)
    rebuilt = POOLINGS[name](**pooling.arguments())
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {
        key: value.shape for key, value in pooling.state_dict().items()
    }


@pytest.mark.parametrize("name, options", ROWS, ids=str)
def test_precision_and_gradients(name, options):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for zero in (False, True):
            assert_precision(name, options, dtype, zero)


def assert_precision(name, options, dtype, zero):
    torch.manual_seed(0)
    exact = build(name, options).double()
    pooling = build(name, options)
    pooling.load_state_dict(exact.state_dict())
    if name == "otk" and options.get("variant") != "released":
        exact.epsilon = pooling.epsilon = 1.0  # the sharper the plan, the more a rounded input changes it
    tokens = make_tokens(5, (5, 7), dtype, zero)
    out = pooling.to(dtype)(tokens)
    assert out.vector.dtype == dtype and (out.vectors is None or out.vectors.dtype == dtype)
    (out.vector.sum() if out.vectors is None else out.vectors.sum()).backward()
    for leaf in (tokens.patches, tokens.prefix, *pooling.parameters()):
        assert leaf.grad is None or leaf.grad.isfinite().all()
    for key, parameter in pooling.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, f"{key} is not in the graph"
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.02}[dtype]
    if dtype in (torch.bfloat16, torch.float16) and (
        name == "kmeans" or getattr(pooling, "k", 1) > 1 and name == "simpool"
    ):
        return assert_close_given_rounded_input(pooling, tokens, out, tolerance)
    torch.testing.assert_close(
        out.vector.double(), exact(make_tokens(5, (5, 7), zero=zero)).vector, atol=tolerance, rtol=tolerance
    )


def assert_close_given_rounded_input(pooling, tokens, out, tolerance):
    """Compare with float64 on the rounded input, since the assignment to clusters is a step function."""
    double = Tokens(tokens.patches.detach().double(), tokens.prefix.detach().double(), tokens.grid, None)
    torch.testing.assert_close(out.vector.double(), pooling.double()(double).vector, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name, options", ROWS, ids=str)
def test_autocast_changes_nothing(name, options):
    torch.manual_seed(0)
    pooling, tokens = build(name, options).eval(), make_tokens(2, (5, 7), torch.float32)
    plain = pooling(tokens).vector
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pooling(tokens).vector, plain)


@pytest.mark.parametrize("name, options", [row for row in ROWS if row[0] != "cls"], ids=str)
def test_maps_are_flattened_row_by_row(name, options):
    torch.manual_seed(0)
    pooling, tokens = build(name, options).double().eval(), make_tokens(2, (5, 7))
    out, flat = pooling(tokens.patches.transpose(1, 2).reshape(2, DIM, 5, 7)), pooling(tokens)
    assert torch.equal(out.vector, flat.vector) and (
        out.attention is None or torch.equal(out.attention, flat.attention)
    )
    square = make_tokens(2, (6, 6))
    assert torch.equal(pooling(square.patches).vector, pooling(square).vector)


@pytest.mark.parametrize("name, options", [row for row in ROWS if row[0] != "cls"], ids=str)
def test_training_on_a_single_patch_of_a_single_image(name, options):
    torch.manual_seed(0)
    pooling, tokens = build(name, options).train(), make_tokens(1, (1, 1), torch.float32)
    out = pooling(tokens)
    out.vector.sum().backward()
    assert out.vector.isfinite().all() and tokens.patches.grad.isfinite().all()


@pytest.mark.parametrize("name", ["how", "cbam", "ge", "vgg", "dft"])
def test_neighbors_need_a_grid(name):
    with pytest.raises(UserError, match="35 patches without a grid"):
        POOLINGS[name](DIM)(torch.zeros(2, 35, DIM))


def test_class_token_pooling_takes_no_bare_patches():
    for bare in (torch.zeros(2, 4, 8), Tokens(torch.zeros(2, 4, 8), torch.zeros(2, 0, 8), (2, 2))):
        with pytest.raises(UserError, match="simpool"):
            CLS(8)(bare)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("gem", {"gamma": 0}, "above 0"),
        ("lse", {"scale": -1.0}, "above 0"),
        ("otk", {"epsilon": 0}, "epsilon above 0"),
        ("otk", {"iterations": 0}, "at least one"),
        ("otk", {"k": 0}, "1 or more"),
        ("kmeans", {"reduce": "sum"}, "max_logit or concat_project or max_feature or mean"),
        ("kmeans", {"tolerance": -1}, "at least 0"),
        ("slot", {"iterations": 0}, "1 or more"),
        ("se", {"variant": "mine"}, "paper or released"),
        ("vit", {"num_heads": 3}, "does not divide"),
        ("cait", {"blocks": 0}, "1 or more"),
        ("vgg", {"size": 0}, "1 or more"),
        ("dft", {"size": 0}, "1 or more"),
        ("simpool", {"layers": 0}, "1 or more"),
        ("simpool", {"linear": "kq"}, "q, k and v"),
        ("simpool", {"shared": True, "linear": "q"}, "shares the projection"),
        ("simpool", {"k": 2, "num_heads": 2}, "initialized by k-means"),
        ("simpool", {"similarity": "l1"}, "dot or euclidean or cosine"),
    ],
)
def test_wrong_arguments(name, options, words):
    with pytest.raises(UserError, match=words):
        POOLINGS[name](DIM, **options)


def test_example_of_the_contributing_page(monkeypatch):
    """Run the pooling of CONTRIBUTING.md as a row: it obeys the contract and equals a loop."""
    page = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    namespace = {"__name__": "softmax_norm"}
    exec(page.partition("## Add a pooling")[2].partition("```python\n")[2].partition("```")[0], namespace)
    monkeypatch.setitem(POOLINGS, "softmax_norm", namespace["SoftmaxNorm"])
    test_contract("softmax_norm", {})
    test_precision_and_gradients("softmax_norm", {})
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    for image, vector in zip(x, POOLINGS["softmax_norm"](DIM)(x).vector):
        weights = torch.stack([patch.square().sum().sqrt().exp() for patch in image])
        torch.testing.assert_close(vector, sum(w * patch for w, patch in zip(weights, image)) / weights.sum())


def test_a_pooling_must_implement_pool():
    class Half(Pooling):
        pass

    with pytest.raises(TypeError, match="pool"):
        Half(4)
