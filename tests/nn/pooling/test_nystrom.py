"""Nystrom features in OTK: the kernel in closed form, a float64 loop, gradients of equal eigenvalues, and exports."""

import math

import pytest
import torch

import maskwise
from maskwise.errors import UserError
from maskwise.export import load
from maskwise.nn import POOLINGS, Backbone, Encoder
from maskwise.nn.pooling.nystrom import FLOOR, InverseRoot, Nystrom
from maskwise.nn.pooling.otk import sinkhorn

DIM = 8


def patches(batch=3, count=35, dim=DIM, seed=0):
    return torch.randn(batch, count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian(x, y, sigma):
    """Return the kernel, pair by pair."""
    return torch.stack([torch.stack([torch.exp(-((a - b) ** 2).mean() / (2 * sigma**2)) for b in y]) for a in x])


@pytest.mark.parametrize("anchors, sigma", [(5, 1.0), (DIM, 0.7), (1, 2.0)])
def test_inner_products_are_the_kernel_at_the_anchors(anchors, sigma):
    psi, x = Nystrom(DIM, anchors, sigma).double(), patches(1)
    w = psi.anchors.detach()
    assert torch.linalg.eigvalsh(gaussian(w, w, sigma)).min() > FLOOR
    torch.testing.assert_close(psi(x)[0] @ psi(w[None])[0].T, gaussian(x[0], w, sigma), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(psi(w[None])[0] @ psi(w[None])[0].T, gaussian(w, w, sigma), atol=1e-12, rtol=1e-10)


def test_features_are_the_projection_on_the_anchors():
    """Compare with k(x, W) k(W, W)^-1 k(W, y), which approaches k from below with more anchors."""
    x, sigma = patches(1)[0], 1.0
    gaps = []
    for anchors in (2, 8, 30):
        psi = Nystrom(DIM, anchors, sigma).double()
        w = psi.anchors.detach()
        approximation = psi(x[None])[0] @ psi(x[None])[0].T
        torch.testing.assert_close(
            approximation,
            gaussian(x, w, sigma) @ torch.linalg.solve(gaussian(w, w, sigma), gaussian(w, x, sigma)),
            atol=1e-9,
            rtol=1e-9,
        )
        gaps.append(1 - approximation.diagonal())
    assert (
        (gaps[0] >= 0).all() and (gaps[1] <= gaps[0] + 1e-9).all() and gaps[2].mean() < gaps[1].mean() < gaps[0].mean()
    )


def test_vectors_by_a_loop():
    """Compute references, plan, psi of each patch and their weighted sum one by one."""
    torch.manual_seed(0)
    pooling, x = POOLINGS["otk"](DIM, k=2, anchors=5, sigma=0.8).double(), patches(2, 6)
    w = pooling.psi.anchors.detach()
    values, vectors = torch.linalg.eigh(gaussian(w, w, 0.8))
    root = sum(vectors[:, i : i + 1] @ vectors[:, i : i + 1].T / math.sqrt(values[i]) for i in range(5))
    out = pooling(x)
    for image, attention, vectors_ in zip(x, out.attention, out.vectors):
        logits = torch.stack(
            [torch.stack([-((u - patch) ** 2).mean() / 0.1 for patch in image]) for u in pooling.references.detach()]
        )
        torch.testing.assert_close(attention, sinkhorn(logits[None], 3)[0])
        for row, vector in zip(attention, vectors_):
            embedded = sum(share * (root @ gaussian(w, patch[None], 0.8)[:, 0]) for share, patch in zip(row, image))
            torch.testing.assert_close(vector, pooling.to_dim.weight @ embedded)


def test_the_initial_projection_keeps_inner_products():
    torch.manual_seed(0)
    fewer, equal, more = (POOLINGS["otk"](DIM, anchors=count).double() for count in (5, DIM, 12))
    torch.testing.assert_close(
        fewer.to_dim.weight.T @ fewer.to_dim.weight, torch.eye(5, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert equal.to_dim is None and more.to_dim.weight.shape == (DIM, 12)
    assert (
        sum(p.numel() for p in fewer.parameters()) == (3 + 5 + 5) * DIM
        and sum(p.numel() for p in equal.parameters()) == (3 + DIM) * DIM
    )


def test_without_anchors_nothing_changes():
    assert list(POOLINGS["otk"](DIM).state_dict()) == ["references"]
    pooling = POOLINGS["otk"](DIM, k=1).double()
    torch.testing.assert_close(pooling(patches()).vector, patches().mean(1))


def test_anchors_are_a_function_of_their_shape():
    torch.manual_seed(0)
    first = Nystrom(64, 40, 1.0).anchors
    torch.manual_seed(1)
    assert torch.equal(Nystrom(64, 40, 1.0).anchors, first) and torch.equal(Nystrom(64, 50, 1.0).anchors[:40], first)
    assert abs(first.mean()) < 0.1 and first.std().item() == pytest.approx(1, abs=0.05)


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    pooling, x = POOLINGS["otk"](4, k=2, anchors=3, reduce="mean").double(), patches(2, 5, 4)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(pooling, {"psi.anchors": w}, (x,)).vector,
        (x.requires_grad_(), pooling.psi.anchors.detach().requires_grad_()),
    )
    spread = patches(1, 4, 4)[0]
    symmetric = (spread @ spread.T + 0.1 * torch.eye(4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: InverseRoot.apply((m + m.T) / 2), symmetric)


def test_gradient_of_equal_eigenvalues():
    """Compare with finite differences for equal eigenvalues, and for some below the floor."""
    matrix = torch.eye(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: InverseRoot.apply((m + m.T) / 2), matrix)
    low = torch.diag(torch.tensor([1.0, FLOOR / 9, FLOOR / 9], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: InverseRoot.apply((m + m.T) / 2), low, eps=1e-8, atol=1e-4)
    torch.testing.assert_close(
        InverseRoot.apply(low).diagonal(), torch.tensor([1.0, FLOOR**-0.5, FLOOR**-0.5], dtype=torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_anchors_that_coincide(dtype):
    torch.manual_seed(0)
    pooling = POOLINGS["otk"](DIM, anchors=5).to(dtype)
    with torch.no_grad():
        pooling.psi.anchors.copy_(pooling.psi.anchors[:1].expand(5, -1).clone())
    x = patches().to(dtype).requires_grad_()
    out = pooling(x)
    out.vectors.square().sum().backward()
    assert (
        out.vector.isfinite().all()
        and x.grad.isfinite().all()
        and all(p.grad.isfinite().all() for p in pooling.parameters())
    )
    single = Nystrom(DIM, 1, 1.0).to(dtype)
    x = x.detach().float()
    torch.testing.assert_close(
        (pooling.psi.float()(x) ** 2).sum(-1), (single.float()(x) ** 2).sum(-1), atol=1e-4, rtol=1e-4
    )  # five equal anchors count as one


def test_export_and_load(tmp_path):
    torch.manual_seed(0)
    backbone = Backbone(
        "vit_tiny_patch16_224", image_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=3, class_token=False
    )
    encoder = Encoder(backbone, POOLINGS["otk"](12, anchors=5, sigma=0.5)).eval()
    with torch.no_grad():
        encoder.pooling.psi.anchors.add_(torch.randn(5, 12))
    maskwise.export(encoder, tmp_path / "out", say=None)
    again = load.load(tmp_path / "out")
    images = torch.randn(2, 3, 16, 16)
    assert again.pooling.anchors == 5 and again.pooling.sigma == 0.5
    with torch.no_grad():
        assert torch.equal(again(images).pooled, encoder(images).pooled)


@pytest.mark.slow
def test_exported_program_and_onnx(tmp_path):
    backbone = Backbone(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=3, class_token=False
    )
    encoder = Encoder(backbone, POOLINGS["otk"](12, anchors=5)).eval()
    maskwise.export(encoder, tmp_path / "out", onnx=("pt2",), say=None)
    program = torch.export.load(next((tmp_path / "out").glob("*.pt2"))).module()
    images = torch.randn(3, 3, 32, 32)
    output = program(images)
    torch.testing.assert_close(
        output[0] if isinstance(output, tuple) else output, encoder(images).pooled, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(UserError, match="ONNX .* cannot hold this encoder") as caught:
        maskwise.export(encoder, tmp_path / "other", onnx=("onnx",), say=None)
    assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "options, words", [({"anchors": 0}, "at least one anchor"), ({"anchors": 4, "sigma": 0.0}, "sigma above 0")]
)
def test_wrong_arguments(options, words):
    with pytest.raises(UserError, match=words):
        POOLINGS["otk"](DIM, **options)
