import math

import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional import losses, schedules, targets

C1 = [0.02118886, 0.063123456, 0.057287478, 0.008097479, -0.04722053, -0.066802984, -0.035830271, 0.022258076]
C3 = [0.057421811, 0.171064565, 0.155249066, 0.021944169, -0.127967637, -0.181036087, -0.097100036, 0.060319387]
C2 = [0.012632761, 0.065226083, 0.068457605, 0.019881777, -0.043740184, -0.074260445, -0.048581882, 0.013862481]


def wave(function, rows, i_step, j_step, columns=8):
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)
    return function(i_step * i + j_step * j)


def student():
    return wave(torch.sin, 12, 0.7, 1.1).view(4, 3, 8)


def teacher():
    return wave(torch.cos, 6, 0.5, -0.9).view(2, 3, 8)


def patches():
    i, n, j = (
        torch.arange(size, dtype=torch.float64).view(shape) for size, shape in ((6, (6, 1, 1)), (4, (4, 1)), (8, (8,)))
    )
    return torch.sin(0.3 * i + 0.9 * n + 1.1 * j), torch.cos(0.2 * i + 0.6 * n - 0.9 * j)


def golden_mask():
    mask = torch.tensor([[(n + b + v) % 3 == 0 for n in range(4)] for v in range(2) for b in range(3)])
    mask[2] = False
    assert mask.sum(1).view(2, 3).tolist() == [[2, 1, 0], [1, 1, 2]]
    return mask


def half_unit(digits):
    """Half a unit of the last printed digit."""
    return {"rel": 0, "abs": 0.5000001 * 10.0**-digits}


def test_cls_loss_and_centers_over_three_epochs():
    """Each call uses the center from before it."""
    center = torch.zeros(8, dtype=torch.float64)
    values = []
    for call, epoch in enumerate((0, 15, 99)):
        temp = schedules.temperature(epoch, 0.04, 0.07, 30)
        values.append(losses.dino_loss(student(), teacher(), center, 0.1, temp).item())
        center = targets.update_center(center, teacher().mean((0, 1)))
        expected = {0: C1, 2: C3}.get(call)
        assert expected is None or center.tolist() == pytest.approx(expected, **half_unit(9))
    assert values == pytest.approx([9.273146696, 9.330129126, 9.443322887], **half_unit(9))


def test_cls_gradient():
    s, t = student().requires_grad_(), teacher().requires_grad_()
    losses.dino_loss(s, t, torch.zeros(8, dtype=torch.float64)).backward()
    assert s.grad.norm().item() == pytest.approx(3.017493174, **half_unit(9))
    assert s.grad[0, 0, 0].item() == pytest.approx(1.8360058e-05, rel=0, abs=0.5e-12)
    assert t.grad is None


def test_ibot_loss():
    mask, (sp, tp) = golden_mask(), patches()
    zero = torch.zeros(8, dtype=torch.float64)
    first = losses.ibot_loss(sp[mask], tp[mask], mask, zero, 0.1, 0.04)
    cls = losses.dino_loss(student(), teacher(), zero, 0.1, 0.04)
    assert first.item() == pytest.approx(11.418920165, **half_unit(9))
    assert (first + cls).item() == pytest.approx(20.692066861, **half_unit(9))
    c2 = targets.update_center(zero, tp.mean((0, 1)))
    assert c2.tolist() == pytest.approx(C2, **half_unit(9))
    c1 = targets.update_center(zero, teacher().mean((0, 1)))
    assert losses.ibot_loss(sp[mask], tp[mask], mask, c2, 0.1, 0.07).item() == pytest.approx(
        11.111288694, **half_unit(9)
    )
    assert losses.dino_loss(student(), teacher(), c1, 0.1, 0.07).item() == pytest.approx(9.374344302, **half_unit(9))
    assert losses.dino_loss(student()[:2], teacher(), zero, 0.1, 0.04).item() == pytest.approx(
        12.128087762, **half_unit(9)
    )


def test_mean_over_masked_tokens_is_another_number():
    mask, (sp, tp) = golden_mask(), patches()
    token = losses.ibot_loss(sp[mask], tp[mask], mask, torch.zeros(8, dtype=torch.float64), reduction="token")
    assert token.item() == pytest.approx(11.950053807, **half_unit(9))


@pytest.mark.parametrize("local, terms", [(8, 18), (10, 22), (6, 14), (0, 2)])
def test_number_of_cls_terms(local, terms):
    """Against a loop over the pairs."""
    s, t = (
        torch.randn(2 + local, 3, 5, dtype=torch.float64),
        torch.softmax(torch.randn(2, 3, 5, dtype=torch.float64), -1),
    )
    pairs = [losses.cross_entropy(s[v], t[q], 0.1).mean() for q in range(2) for v in range(2 + local) if v != q]
    assert len(pairs) == terms
    assert losses.dino_loss_from_probs(s, t, 0.1).item() == pytest.approx((sum(pairs) / terms).item(), rel=1e-12)


def test_without_a_pair_of_different_views_there_is_no_loss():
    with pytest.raises(UserError, match="no pair"):
        losses.dino_loss(torch.randn(1, 3, 5), torch.randn(1, 3, 5), torch.zeros(5))


def test_same_view_pairs_are_left_out():
    s, t = student(), teacher()
    alone = losses.dino_loss(s[:2], t[:1], torch.zeros(8, dtype=torch.float64))
    moved = s[:2].clone()
    moved[0] += 5 * torch.randn(8)
    assert losses.dino_loss(moved, t[:1], torch.zeros(8, dtype=torch.float64)).item() == alone.item()


@pytest.mark.parametrize("prototypes, value", [(8192, 9.0109), (60000, 11.0021), (65536, 11.0904)])
def test_uniform_outputs_cost_ln_k(prototypes, value):
    flat = torch.zeros(2, 1, prototypes)
    assert losses.dino_loss(flat, flat, torch.zeros(prototypes)).item() == pytest.approx(math.log(prototypes), rel=1e-6)
    assert math.log(prototypes) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("reduction", ["image", "token"])
def test_no_masked_patch_is_a_loss_of_zero_with_gradients(reduction):
    layer = torch.nn.Linear(4, 8)
    loss = losses.ibot_loss(
        layer(torch.zeros(0, 4)),
        torch.zeros(0, 8),
        torch.zeros(6, 4, dtype=torch.bool),
        torch.zeros(8),
        reduction=reduction,
    )
    loss.backward()
    assert loss.item() == 0 and torch.equal(layer.weight.grad, torch.zeros(8, 4))


@pytest.mark.parametrize("reduction", ["image", "token"])
def test_padding_rows_weigh_nothing(reduction):
    mask, (sp, tp) = golden_mask(), patches()
    probs = torch.softmax(tp[mask], -1)
    padded = [torch.cat([rows, torch.ones(5, 8, dtype=torch.float64)]) for rows in (sp[mask], probs)]
    plain = losses.ibot_loss_from_probs(sp[mask], probs, mask, 0.1, reduction)
    assert losses.ibot_loss_from_probs(*padded, mask, 0.1, reduction).item() == pytest.approx(plain.item(), rel=1e-14)


def test_parts_of_a_batch_make_the_loss_of_the_whole():
    """Views split in two halves; per token, the halves divide by half the count of the union."""
    mask, (sp, tp) = golden_mask(), patches()
    probs = torch.softmax(tp, -1)
    for reduction, total in (("image", None), ("token", mask.sum() / 2)):
        halves = [
            losses.ibot_loss_from_probs(sp[p][mask[p]], probs[p][mask[p]], mask[p], 0.1, reduction, total)
            for p in (slice(0, 3), slice(3, 6))
        ]
        whole = losses.ibot_loss_from_probs(sp[mask], probs[mask], mask, 0.1, reduction)
        assert (sum(halves) / 2).item() == pytest.approx(whole.item(), rel=1e-12)


def test_losses_are_float32_whatever_comes_in():
    s, t = student(), teacher()
    low = losses.dino_loss(s.bfloat16(), t.bfloat16(), torch.zeros(8))
    same = losses.dino_loss(s.bfloat16().float(), t.bfloat16().float(), torch.zeros(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses.dino_loss(s.bfloat16(), t.bfloat16(), torch.zeros(8))
    assert low.dtype == torch.float32 and low.item() == same.item() == cast.item()


def test_unknown_reduction():
    with pytest.raises(UserError, match="image or token"):
        losses.patch_weights(torch.ones(2, 2, dtype=torch.bool), 4, "mean")


def test_float32_losses_are_close_to_float64():
    wide = losses.dino_loss(student(), teacher(), torch.zeros(8, dtype=torch.float64)).item()
    assert losses.dino_loss(student().float(), teacher().float(), torch.zeros(8)).item() == pytest.approx(
        wide, rel=2e-6
    )
