"""The loss in pieces against the whole matrices: values, gradients, gradcheck, padding, types."""

import pytest
import torch

from maskwise.functional import losses
from maskwise.functional.prototypes import loss_in_pieces, score_rows, score_views

S, G, B, D, K = 4, 2, 5, 3, 7


def made(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def views_term(z, weight, probs, cells):
    return loss_in_pieces(z, weight, score_views(lambda a, b: probs[:, a:b], S, G, B, 0.1), cells=cells)


def rows_term(z, weight, probs, weights, cells):
    return loss_in_pieces(z[None], weight, score_rows(lambda a, b: probs[a:b], weights, 0.1), cells=cells)


def gradients(loss, *leaves):
    return torch.autograd.grad(3.0 * loss, leaves)


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("cells", [1, 2 * S * K, 3 * S * K, 10**6])
def test_the_image_term_in_pieces_is_the_whole_one(dtype, near, cells):
    z, weight = (made(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate([(S, B, D), (K, D)]))
    probs = (5 * made(G, B, K, seed=2)).softmax(-1).to(dtype)
    whole, pieces = losses.dino_loss_from_probs(z @ weight.T, probs), views_term(z, weight, probs, cells)
    torch.testing.assert_close(pieces, whole, rtol=near, atol=near)
    torch.testing.assert_close(gradients(pieces, z, weight), gradients(whole, z, weight), rtol=near, atol=near)


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("reduction", ["image", "token"])
@pytest.mark.parametrize("cells", [1, 4 * K, 10**6])
def test_the_patch_term_in_pieces_is_the_whole_one_and_padding_weighs_nothing(dtype, near, reduction, cells):
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    mask[2] = False
    rows = int(mask.sum()) + 3
    z, weight = (made(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate([(rows, D), (K, D)]))
    probs = (5 * made(rows, K, seed=2)).softmax(-1).to(dtype)
    whole = losses.ibot_loss_from_probs(z @ weight.T, probs, mask, 0.1, reduction)
    pieces = rows_term(z, weight, probs, losses.patch_weights(mask, rows, reduction), cells)
    torch.testing.assert_close(pieces, whole, rtol=near, atol=near)
    found = gradients(pieces, z, weight)
    torch.testing.assert_close(found, gradients(whole, z, weight), rtol=near, atol=near)
    assert not found[0][-3:].any()


def test_gradcheck():
    z, weight = made(S, B, D).requires_grad_(), made(K, D, seed=1).requires_grad_()
    probs = (2 * made(G, B, K, seed=2)).softmax(-1)
    assert torch.autograd.gradcheck(lambda z, w: views_term(z, w, probs, 2 * S * K), (z, weight))
    assert torch.autograd.gradcheck(lambda z, w: rows_term(z, w, probs.flatten(0, 1), torch.arange(10.0), 3 * K), (z.flatten(0, 1)[:10], weight))


def test_gradients_pass_through_the_weight_norm_of_a_head():
    from maskwise.nn import ProjectionHead

    torch.manual_seed(0)
    head = ProjectionHead(6, K, hidden=8, bottleneck=D, norm_last_layer=False).double()
    x, probs = made(S * B, 6), (5 * made(G, B, K, seed=2)).softmax(-1)
    z = head.embed(x)
    pieces = views_term(z.unflatten(0, (S, B)), head.weights()[0], probs, 2 * S * K)
    whole = losses.dino_loss_from_probs(head(x).unflatten(0, (S, B)), probs)
    leaves = list(head.parameters())
    torch.testing.assert_close(gradients(pieces, *leaves), gradients(whole, *leaves), rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradcheck(
        lambda g, v: views_term(z.detach().unflatten(0, (S, B)), v * (g / v.norm(dim=1, keepdim=True)), probs, 2 * S * K),
        (head.last_layer.weight_g, head.last_layer.weight_v),
    )


def test_no_rows_cost_nothing_and_leave_gradients_of_zero():
    z, weight = made(0, D).requires_grad_(), made(K, D).requires_grad_()
    loss = rows_term(z, weight, made(0, K), made(0), None)
    assert loss.item() == 0 and not any(each.any() for each in gradients(loss, z, weight))


def test_bf16_products_stay_near_and_answer_in_the_types_they_were_given():
    z, weight = made(S, B, D, dtype=torch.float32).requires_grad_(), made(K, D, seed=1, dtype=torch.float32).requires_grad_()
    probs = (5 * made(G, B, K, seed=2)).softmax(-1).float()
    score = score_views(lambda a, b: probs[:, a:b], S, G, B, 0.1)
    low = loss_in_pieces(z, weight, score, torch.bfloat16, 2 * S * K)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(views_term(z, weight, probs, None).item(), rel=2e-2)
    assert [each.dtype for each in gradients(low, z, weight)] == [torch.float32, torch.float32]


def test_pieces_are_all_that_is_held():
    seen = []
    z, weight, probs = made(1, 50, D).requires_grad_(), made(K, D, seed=1), (made(50, K)).softmax(-1)
    score = score_rows(lambda a, b: probs[a:b], torch.ones(50), 0.1)
    loss_in_pieces(z, weight, lambda logits, a, b: seen.append(logits.shape) or score(logits, a, b), cells=8 * K)
    assert seen == [(1, 8, K)] * 6 + [(1, 2, K)]
