import math

import pytest
import torch

from maskwise.errors import UserError
from maskwise.functional import map_losses


def golden():
    """Logits with known losses: C = 5, G = 2, B = 2; [B, G, C] each."""
    index = torch.arange(10, dtype=torch.float64)
    tokens = torch.stack([torch.sin(index * (1.1 + g) + g).reshape(2, 5) for g in range(2)], dim=1)
    averaged = torch.stack([torch.cos(index * (0.7 + g) + g).reshape(2, 5) for g in range(2)], dim=1)
    return tokens, averaged


def softmax(row):
    high = max(row)
    powers = [math.exp(value - high) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q))


def test_golden_numbers():
    tokens, averaged = golden()
    assert float(map_losses.intra_group(tokens, averaged)) == pytest.approx(0.1017437849, abs=5e-11)
    assert float(map_losses.inter_group(tokens)) == pytest.approx(0.0523242460, abs=5e-11)
    assert -0.8 * float(map_losses.inter_group(tokens)) == pytest.approx(-0.0418593968, abs=5e-11)


@pytest.mark.parametrize("teacher", map_losses.TEACHERS)
@pytest.mark.parametrize("reduction", map_losses.REDUCTIONS)
def test_intra_term_is_the_loop_over_groups_and_images(teacher, reduction):
    tokens, averaged = golden()
    per = 10 if reduction == "mean_elements" else 2
    expected = 0.0
    for g in range(2):
        for b in range(2):
            p, q = softmax(tokens[b, g].tolist()), softmax(averaged[b, g].tolist())
            expected += (kl(p, q) if teacher == "tokens" else kl(q, p)) / per
    assert float(map_losses.intra_group(tokens, averaged, reduction=reduction, teacher=teacher)) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("center", map_losses.CENTERS)
@pytest.mark.parametrize("reduction", map_losses.REDUCTIONS)
def test_inter_term_is_the_loop_over_groups_and_images(center, reduction):
    tokens, _ = golden()
    per = 10 if reduction == "mean_elements" else 2
    expected = 0.0
    for b in range(2):
        rows = [tokens[b, g].tolist() for g in range(2)]
        if center == "logits":
            together = softmax([sum(values) / 2 for values in zip(*rows)])
        else:
            together = [sum(values) / 2 for values in zip(*map(softmax, rows))]
        expected += sum(kl(together, softmax(row)) for row in rows) / per
    assert float(map_losses.inter_group(tokens, reduction=reduction, center=center)) == pytest.approx(
        expected, rel=1e-12
    )


def test_who_learns_from_whom():
    for teacher, learns in (("tokens", "averaged"), ("averaged", "tokens")):
        tokens, averaged = (logits.requires_grad_() for logits in golden())
        map_losses.intra_group(tokens, averaged, teacher=teacher).backward()
        still = {"tokens": averaged, "averaged": tokens}[learns]
        moves = {"tokens": tokens, "averaged": averaged}[learns]
        assert still.grad is None and moves.grad.abs().max() > 0


@pytest.mark.parametrize("center", map_losses.CENTERS)
def test_the_joint_prediction_is_a_constant(center):
    """The gradient is that of a cross-entropy with soft targets, (softmax(y_g) - p*) / (B C)."""
    tokens = golden()[0].requires_grad_()
    map_losses.inter_group(tokens, center=center).backward()
    fixed = tokens.detach()
    together = fixed.mean(dim=1).softmax(-1) if center == "logits" else fixed.softmax(-1).mean(dim=1)
    torch.testing.assert_close(tokens.grad, (fixed.softmax(-1) - together[:, None]) / 10, atol=1e-15, rtol=0)


def test_zero_when_all_agree_and_never_below():
    tokens, averaged = golden()
    assert float(map_losses.intra_group(tokens, tokens.clone())) == 0
    same = tokens[:, :1].expand(-1, 3, -1)
    for center in map_losses.CENTERS:
        assert float(map_losses.inter_group(same, center=center)) == pytest.approx(0, abs=1e-15)
    assert float(map_losses.inter_group(torch.stack([tokens[:, 0], tokens[:, 0] + 7.0], dim=1))) == pytest.approx(
        0, abs=1e-15
    )  # logits have no origin
    assert map_losses.intra_group(tokens, averaged) > 0 and map_losses.inter_group(tokens) > 0


def test_softmax_of_the_mean_is_not_the_mean_of_softmaxes():
    """The two centers differ by about 4e-3 on random logits of 1000 classes."""
    logits = torch.randn(16, 4, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gap = (logits.mean(1).softmax(-1) - logits.softmax(-1).mean(1)).abs().max()
    assert 2e-3 < gap < 2e-2
    assert abs(map_losses.inter_group(logits) - map_losses.inter_group(logits, center="probabilities")) > 1e-5


def test_the_whole_objective_per_group_and_summed():
    tokens, averaged = golden()
    targets = torch.tensor([3, 1])
    criterion = torch.nn.functional.cross_entropy
    terms = map_losses.map_loss(tokens, averaged, targets, criterion)
    label = -sum(math.log(softmax(tokens[b, g].tolist())[int(targets[b])]) for g in range(2) for b in range(2)) / 2
    assert float(terms["label"]) == pytest.approx(label, rel=1e-12)
    assert float(terms["loss"]) == pytest.approx(label + 0.1017437849 - 0.0418593968, abs=2e-10)
    total = map_losses.map_loss(tokens, averaged, targets, criterion, total="sum", intra=0, inter=0)
    rows = [[sum(values) for values in zip(*tokens[b].tolist(), *averaged[b].tolist())] for b in range(2)]
    assert float(total["loss"]) == pytest.approx(
        -sum(math.log(softmax(rows[b])[int(targets[b])]) for b in range(2)) / 2, rel=1e-12
    )
    assert set(total) == {"loss", "label"}


def test_one_group_has_no_inter_term_and_no_averaged_token_no_intra_term():
    tokens, averaged = golden()
    targets = torch.tensor([3, 1])
    criterion = torch.nn.functional.cross_entropy
    assert set(map_losses.map_loss(tokens[:, :1], averaged[:, :1], targets, criterion)) == {"loss", "label", "intra"}
    assert set(map_losses.map_loss(tokens, None, targets, criterion)) == {"loss", "label", "inter"}


def test_half_precision_logits_are_compared_in_float32():
    tokens, averaged = golden()
    with torch.autocast("cpu", torch.bfloat16):
        loss = map_losses.intra_group(tokens.bfloat16(), averaged.bfloat16())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(
        float(map_losses.intra_group(tokens.bfloat16().double(), averaged.bfloat16().double())), rel=1e-5
    )


def test_unknown_names_are_refused():
    tokens, averaged = golden()
    for options in ({"reduction": "sum"}, {"teacher": "both"}, {"center": "mode"}, {"total": "mean"}):
        with pytest.raises(UserError, match="is unknown: choose"):
            map_losses.map_loss(tokens, averaged, torch.tensor([0, 1]), torch.nn.functional.cross_entropy, **options)
