"""Chunked cross-entropy against whole matrices: values, gradients, gradcheck, padding, types."""

import pytest
import torch

from maskwise.functional import losses
from maskwise.functional.chunked_losses import (
    CenteredProbs,
    LinearLogits,
    WholeProbs,
    chunked_cross_entropy,
    token_chunk,
    token_loss,
    view_pair_chunk,
    view_pair_loss,
)

S, G, B, D, K = 4, 2, 5, 3, 7


def made(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chunked_dino(z, weight, probs, entries):
    return view_pair_loss(LinearLogits(z, weight), WholeProbs(probs), 0.1, entries)


def chunked_ibot(z, weight, probs, weights, entries):
    return token_loss(LinearLogits(z, weight), WholeProbs(probs), weights, 0.1, entries)


def gradients(loss, *leaves):
    return torch.autograd.grad(3.0 * loss, leaves)


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("entries", [1, 2 * S * K, 3 * S * K, 10**6])
def test_the_chunked_dino_loss_is_the_plain_one(dtype, near, entries):
    z, weight = (made(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate([(S, B, D), (K, D)]))
    probs = (5 * made(G, B, K, seed=2)).softmax(-1).to(dtype)
    whole, chunked = losses.dino_loss_from_probs(z @ weight.T, probs), chunked_dino(z, weight, probs, entries)
    torch.testing.assert_close(chunked, whole, rtol=near, atol=near)
    torch.testing.assert_close(gradients(chunked, z, weight), gradients(whole, z, weight), rtol=near, atol=near)


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", ["image", "token"])
@pytest.mark.parametrize("entries", [1, 4 * K, 10**6])
def test_the_chunked_ibot_loss_is_the_plain_one_and_padding_has_no_weight(dtype, near, reduction, entries):
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[2] = False
    rows = int(mask.sum()) + 3
    z, weight = (made(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate([(rows, D), (K, D)]))
    probs = (5 * made(rows, K, seed=2)).softmax(-1).to(dtype)
    whole = losses.ibot_loss_from_probs(z @ weight.T, probs, mask, 0.1, reduction)
    chunked = chunked_ibot(z, weight, probs, losses.patch_weights(mask, rows, reduction), entries)
    torch.testing.assert_close(chunked, whole, rtol=near, atol=near)
    grads = gradients(chunked, z, weight)
    torch.testing.assert_close(grads, gradients(whole, z, weight), rtol=near, atol=near)
    assert not grads[0][-3:].any()


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_public_losses_take_tensors_and_linear_logits(dtype, near):
    center, weight = 0.1 * made(K, seed=4, dtype=dtype), made(K, D, seed=1, dtype=dtype)
    student, teacher = made(S, B, D, dtype=dtype), made(G, B, D, seed=2, dtype=dtype)
    plain = losses.dino_loss(student @ weight.T, teacher @ weight.T, center, 0.1, 0.07)
    chunked = losses.dino_loss(LinearLogits(student, weight), LinearLogits(teacher, weight), center, 0.1, 0.07)
    torch.testing.assert_close(chunked, plain, rtol=near, atol=near)
    mask = made(6, 4, seed=3) > 0.3
    student, teacher = (made(int(mask.sum()), D, seed=seed, dtype=dtype) for seed in (5, 6))
    plain = losses.ibot_loss(student @ weight.T, teacher @ weight.T, mask, center, 0.1, 0.07)
    chunked = losses.ibot_loss(LinearLogits(student, weight), LinearLogits(teacher, weight), mask, center, 0.1, 0.07)
    torch.testing.assert_close(chunked, plain, rtol=near, atol=near)


def test_centered_probabilities_are_those_of_the_whole_logits():
    z, weight, center = made(G, B, D), made(K, D, seed=1), 0.1 * made(K, seed=2)
    probs = CenteredProbs(LinearLogits(z, weight), center, 0.07)
    whole = torch.softmax((z @ weight.T - center) / 0.07, dim=-1)
    assert probs.shape == tuple(whole.shape) == WholeProbs(whole).shape
    torch.testing.assert_close(probs.rows(1, 4), whole[:, 1:4], rtol=1e-13, atol=0)
    torch.testing.assert_close(probs.rows(0, 5, 2), WholeProbs(whole).rows(0, 5, 2), rtol=1e-13, atol=0)


def test_gradcheck():
    z, weight = made(S, B, D).requires_grad_(), made(K, D, seed=1).requires_grad_()
    probs = (2 * made(G, B, K, seed=2)).softmax(-1)
    assert torch.autograd.gradcheck(lambda z, w: chunked_dino(z, w, probs, 2 * S * K), (z, weight))
    assert torch.autograd.gradcheck(
        lambda z, w: chunked_ibot(z, w, probs.flatten(0, 1), torch.arange(10.0), 3 * K), (z.flatten(0, 1)[:10], weight)
    )


def test_gradients_pass_through_the_weight_norm_of_a_head():
    from maskwise.nn import ProjectionHead

    torch.manual_seed(0)
    head = ProjectionHead(6, K, hidden=8, bottleneck=D, norm_last_layer=False).double()
    x, probs = made(S * B, 6), (5 * made(G, B, K, seed=2)).softmax(-1)
    z = head.embed(x)
    chunked = chunked_dino(z.unflatten(0, (S, B)), head.weights()[0], probs, 2 * S * K)
    whole = losses.dino_loss_from_probs(head(x).unflatten(0, (S, B)), probs)
    leaves = list(head.parameters())
    torch.testing.assert_close(gradients(chunked, *leaves), gradients(whole, *leaves), rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda g, v: chunked_dino(
            z.detach().unflatten(0, (S, B)), v * (g / v.norm(dim=1, keepdim=True)), probs, 2 * S * K
        ),
        (head.last_layer.weight_g, head.last_layer.weight_v),
    )


def test_no_rows_have_no_loss_and_gradients_of_zero():
    z, weight = made(0, D).requires_grad_(), made(K, D).requires_grad_()
    loss = chunked_ibot(z, weight, made(0, K), made(0), None)
    assert loss.item() == 0 and not any(grad.any() for grad in gradients(loss, z, weight))


def test_bf16_products_stay_near_and_gradients_have_the_types_of_the_inputs():
    z, weight = (
        made(S, B, D, dtype=torch.float32).requires_grad_(),
        made(K, D, seed=1, dtype=torch.float32).requires_grad_(),
    )
    probs = (5 * made(G, B, K, seed=2)).softmax(-1).float()

    def chunk_loss(logits, start, stop):
        return view_pair_chunk(logits, probs[:, start:stop], 0.1, 1 / (G * (S - 1) * B))

    low = chunked_cross_entropy(LinearLogits(z, weight), chunk_loss, torch.bfloat16, 2 * S * K)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(
        chunked_dino(z, weight, probs, None).item(), rel=2e-2
    )
    assert [grad.dtype for grad in gradients(low, z, weight)] == [torch.float32, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        autocast = chunked_dino(z, weight, probs, 2 * S * K)
    assert autocast.item() == low.item()


def test_only_a_chunk_of_logits_is_in_memory():
    shapes = []
    z, weight, probs = made(1, 50, D).requires_grad_(), made(K, D, seed=1), (made(50, K)).softmax(-1)

    def chunk_loss(logits, start, stop):
        shapes.append(logits.shape)
        loss, grad = token_chunk(logits[0], probs[start:stop], torch.ones(stop - start), 0.1)
        return loss, grad[None]

    chunked_cross_entropy(LinearLogits(z, weight), chunk_loss, entries=8 * K)
    assert shapes == [(1, 8, K)] * 6 + [(1, 2, K)]
