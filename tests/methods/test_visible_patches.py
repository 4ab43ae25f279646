"""iBOT's loss on visible patches: against loops in float64, padding, start, and two ranks."""

import pytest
import torch

from maskwise.methods.masking import SampledMasks
from maskwise.methods.patches import masked_indices
from support.tiny_networks import FixedMasking, crops, loop_sinkhorn, method, part, run_ranks

MASK = torch.rand(8, 16, generator=torch.Generator().manual_seed(2)) < 0.4
MASK[3] = False
MASK[5] = True


def masked_method(**options):
    made = method(masking=FixedMasking(MASK), **options)
    made.patch_center.normal_(std=0.1, generator=torch.Generator().manual_seed(5))
    return made


def answer_of(made, batch, epoch=0):
    global_crops, local_crops, ids = batch
    return made(global_crops, local_crops, step=1, epoch=epoch, sample_ids=ids)


def gradients(made, loss):
    made.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in made.student.named_parameters() if p.requires_grad}


def looped(made, batch, patch_loss, targets):
    """The patch loss of the visible patches, patch by patch."""
    with torch.no_grad():
        patches = made.teacher.encoder(batch[0]).patches
        logits = made.teacher.head(patches)
        probs = torch.softmax((logits - made.patch_center) / 0.07, -1)
        if targets == "sinkhorn":
            probs[~MASK] = loop_sinkhorn(logits[~MASK], 0.07)
    logs = torch.log_softmax(made.student.head(made.student.encoder(batch[0], MASK).patches) / 0.1, -1)
    total, count = 0.0, int((~MASK).sum())
    for v, n in (~MASK).nonzero().tolist():
        weight = count if patch_loss == "token" else int((~MASK[v]).sum()) * len(MASK)
        total = total - (probs[v, n] * logs[v, n]).sum() / weight
    return total


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize("patch_loss", ["image", "token"])
def test_value_and_gradient_are_those_of_the_loop(patch_loss, targets):
    options = {"patch_loss": patch_loss, "targets": targets}
    made, plain, batch = masked_method(visible_weight=0.5, **options), masked_method(**options), crops()
    answer, without = answer_of(made, batch), answer_of(plain, batch)
    term = looped(made, batch, patch_loss, targets)
    assert set(answer) - set(without) == {"visible"}
    assert answer["visible"].item() == pytest.approx(term.item(), rel=1e-9)
    assert answer["patch"].item() == pytest.approx(without["patch"].item(), rel=1e-12)
    assert answer["loss"].item() == pytest.approx(without["loss"].item() + 0.5 * term.item(), rel=1e-9)
    extra = gradients(made, 0.5 * term)
    expected = {name: value + extra[name] for name, value in gradients(plain, without["loss"]).items()}
    torch.testing.assert_close(gradients(made, answer_of(made, batch)["loss"]), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize("patch_loss", ["image", "token"])
def test_padding_the_rows_changes_nothing(targets, patch_loss):
    results = []
    for pad in (1, 50, 1000):
        made = masked_method(visible_weight=0.5, pad_multiple=pad, targets=targets, patch_loss=patch_loss)
        answer = answer_of(made, crops())
        results.append((answer["visible"], answer["loss"].detach(), gradients(made, answer["loss"])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-12)


def test_visible_rows_come_in_order():
    made = masked_method(visible_weight=0.5, pad_multiple=10)
    visible = SampledMasks(~MASK, int((~MASK).sum()))
    rows = masked_indices(visible, made.pad_multiple)
    assert torch.equal(rows[: visible.num_masked], (~MASK).flatten().nonzero()[:, 0]) and len(rows) % 10 == 0


def test_it_begins_with_the_masks():
    made = masked_method(visible_weight=0.5, start_epoch=2)
    before, after = (answer_of(made, crops(), epoch) for epoch in (1, 2))
    assert before["visible"].item() == 0.0 and before["mask_share"].item() == 0.0
    assert after["visible"].item() > 0.0
    before["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("patch_loss", ["image", "token"])
def test_two_ranks_are_one(patch_loss):
    options = {"visible_weight": 0.5, "patch_loss": patch_loss, "targets": "sinkhorn"}
    batch = crops(4)
    one = masked_method(**options)
    whole = answer_of(one, batch)
    expected = gradients(one, whole["loss"])
    parts = [masked_method(world_size=2, rank=rank, **options) for rank in range(2)]

    def work(rank, all_sum):
        rows = slice(2 * rank, 2 * rank + 2)
        parts[rank].all_sum, parts[rank].masking = all_sum, FixedMasking(part(MASK, rows, 4))
        return answer_of(parts[rank], (part(batch[0], rows, 4), part(batch[1], rows, 4), batch[2][rows]))

    answers = run_ranks(2, work)
    assert sum(answer["visible"].item() for answer in answers) / 2 == pytest.approx(whole["visible"].item(), rel=1e-9)
    found = [gradients(made, answer["loss"]) for made, answer in zip(parts, answers)]
    mean = {name: (found[0][name] + found[1][name]) / 2 for name in expected}
    torch.testing.assert_close(mean, expected, rtol=1e-8, atol=1e-12)
