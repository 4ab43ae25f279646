"""iBOT: the patch term against the references' numbers, its bookkeeping and its edges."""

import pytest
import torch

from maskwise.errors import UserError
from maskwise.methods.patches import masked_indices
from support.tiny_networks import FixedMasking, crops, loop_sinkhorn, method, scripted

CENTER2 = [0.012632761, 0.065226083, 0.068457605, 0.019881777, -0.043740184, -0.074260445, -0.048581882, 0.013862481]


def golden(**options):
    return scripted("ibot", warmup_patch_temp=0.04, patch_temp=0.07, **options)


def test_golden_losses_and_patch_center():
    ibot, *batch, ids = golden()
    answer = ibot(*batch, step=0, epoch=0, sample_ids=ids)
    assert answer["cls"].item() == pytest.approx(9.273146696, abs=5e-10)
    assert answer["patch"].item() == pytest.approx(11.418920165, abs=5e-10)
    assert answer["loss"].item() == pytest.approx(20.692066861, abs=5e-10)
    ibot.update_teacher(0.996)
    assert ibot.patch_center.tolist() == pytest.approx(CENTER2, abs=5e-10)
    answer = ibot(*batch, step=1, epoch=40, sample_ids=ids)
    assert answer["cls"].item() == pytest.approx(9.374344302, abs=5e-10)
    assert answer["patch"].item() == pytest.approx(11.111288694, abs=5e-10)


def test_golden_without_locals_and_per_token():
    ibot, global_crops, _, ids = golden()
    answer = ibot(global_crops, None, step=0, epoch=0, sample_ids=ids)
    assert answer["cls"].item() == pytest.approx(12.128087762, abs=5e-10)
    assert answer["patch"].item() == pytest.approx(11.418920165, abs=5e-10)
    ibot, *batch, ids = golden(patch_loss="token")
    assert ibot(*batch, step=0, epoch=0, sample_ids=ids)["patch"].item() == pytest.approx(11.950053807, abs=5e-10)


def test_lambdas_weigh_their_terms():
    ibot, *batch, ids = golden(lambda1=0.5, lambda2=2.0)
    answer = ibot(*batch, step=0, epoch=0, sample_ids=ids)
    assert answer["loss"].item() == pytest.approx(9.273146696 / 2 + 2 * 11.418920165, abs=5e-9)


def gradients(module, answer):
    module.zero_grad()
    answer["loss"].backward()
    return {name: p.grad.clone() for name, p in module.student.named_parameters() if p.requires_grad}


def test_without_weight_the_patch_term_leaves_no_gradient():
    global_crops, local_crops, ids = crops()
    both = [method(name, "random", **options) for name, options in (("ibot", {"lambda2": 0.0}), ("dino", {}))]
    one, two = (gradients(m, m(global_crops, local_crops, step=0, epoch=0, sample_ids=ids)) for m in both)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_local_crops_touch_neither_patch_loss_nor_centers():
    global_crops, local_crops, ids = crops()
    answers, centers = [], []
    for local in (None, local_crops, local_crops + 1):
        ibot = method(drop_path=0.3)
        answers.append(ibot(global_crops, local, step=0, epoch=0, sample_ids=ids)["patch"].item())
        ibot.update_teacher(0.9)
        centers.append(torch.cat([ibot.center, ibot.patch_center]))
    assert answers[0] == pytest.approx(answers[1], rel=1e-12) and answers[0] == pytest.approx(answers[2], rel=1e-12)
    torch.testing.assert_close(centers[0], centers[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(centers[0], centers[2], rtol=1e-12, atol=0)


def test_when_nothing_is_hidden_the_patch_loss_is_zero_and_gradients_are_finite():
    for ibot in (
        method(masking=FixedMasking(torch.zeros(8, 16, dtype=torch.bool))),
        method(start_epoch=3),
        method(masking="none"),
    ):
        answer = ibot(*crops()[:2], step=0, epoch=2, sample_ids=torch.arange(4))
        assert answer["patch"].item() == 0.0 and answer["mask_share"].item() == 0.0
        answer["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in ibot.parameters() if p.requires_grad)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("patch_loss", ["image", "token"])
@pytest.mark.parametrize("pooling, patch_prototypes", [("cls", None), ("simpool", 5)])
def test_every_trainable_parameter_has_a_gradient_masked_or_not(epoch, patch_loss, pooling, patch_prototypes):
    ibot = method(pooling=pooling, head={"patch_prototypes": patch_prototypes}, start_epoch=1, patch_loss=patch_loss)
    assert len(ibot.patch_center) == (patch_prototypes or len(ibot.center))
    answer = ibot(*crops()[:2], step=0, epoch=epoch, sample_ids=torch.arange(4))
    assert (answer["mask_share"] > 0) == epoch
    answer["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ibot.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in ibot.teacher.parameters())


def test_a_batch_norm_head_trains_masked_or_not():
    ibot = method(head={"norm": "batch"}, start_epoch=1)
    for epoch in (0, 1):
        assert ibot(*crops()[:2], step=0, epoch=epoch, sample_ids=torch.arange(4))["loss"].isfinite()


def test_masking_starts_with_its_epoch_and_so_does_the_temperature():
    ibot = method(start_epoch=50, warmup_patch_temp=0.04, patch_temp=0.07, warmup_teacher_temp_epochs=30)
    expected = {0: 0.04, 49: 0.04, 50: 0.04, 60: 0.050345, 79: 0.07, 90: 0.07}
    assert [ibot.patch_temperature(e) for e in expected] == pytest.approx(list(expected.values()), abs=5e-7)
    for epoch, hidden in ((49, False), (50, True)):
        answer = ibot(*crops()[:2], step=0, epoch=epoch, sample_ids=torch.arange(4))
        assert (answer["mask_share"].item() > 0) == hidden


def test_the_patch_ramp_may_have_its_own_length():
    ibot = method(warmup_teacher_temp_epochs=30, warmup_patch_temp_epochs=2)
    assert ibot.patch_temperature(2) == 0.07


def test_the_students_head_sees_class_tokens_and_hidden_patches_only(monkeypatch):
    from maskwise.functional import chunked_losses

    ibot = method()
    rows, products = [], []
    embed, chunked = ibot.student.head.embed, chunked_losses.chunked_cross_entropy
    monkeypatch.setattr(ibot.student.head, "embed", lambda x: rows.append(len(x)) or embed(x))

    def counted(logits, *arguments, **options):
        products.append(logits.shape[0] * logits.shape[1])
        return chunked(logits, *arguments, **options)

    monkeypatch.setattr(chunked_losses, "chunked_cross_entropy", counted)
    answer = ibot(*crops()[:2], step=1, epoch=0, sample_ids=torch.arange(4))
    hidden = round(answer["mask_share"].item() * 8 * 16)
    assert hidden > 0
    assert rows == [4 * 4 + hidden] and products == [4 * 4, hidden]


def test_hidden_rows_come_in_order_of_the_mask():
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    ibot = method(masking=FixedMasking(mask), pad_multiple=10)
    hidden = ibot.masking.sample(None, (4, 4), step=0, sample_ids=torch.arange(4))
    rows = masked_indices(hidden, ibot.pad_multiple)
    assert torch.equal(rows[: hidden.num_masked], mask.flatten().nonzero()[:, 0])
    assert len(rows) % 10 == 0 and len(rows) - hidden.num_masked < 10


@pytest.mark.parametrize("targets", ["centering", "sinkhorn"])
@pytest.mark.parametrize("patch_loss", ["image", "token"])
def test_padding_the_rows_changes_nothing(targets, patch_loss):
    global_crops, local_crops, ids = crops()
    results = []
    for pad in (1, 64, 1000):
        ibot = method(pad_multiple=pad, targets=targets, patch_loss=patch_loss)
        answer = ibot(global_crops, local_crops, step=0, epoch=0, sample_ids=ids)
        results.append((answer["loss"].detach(), gradients(ibot, answer)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_the_spelled_out_loss():
    ibot = method()
    global_crops, local_crops, ids = crops()
    ibot.center.normal_(std=0.1)
    ibot.patch_center.normal_(std=0.1)
    answer = ibot(global_crops, local_crops, step=2, epoch=0, sample_ids=ids)
    computed = gradients(ibot, answer)
    with torch.no_grad():
        look = ibot.teacher.encoder(global_crops)
        mask = ibot.masking(look.attention, look.grid, step=2, sample_ids=ids)
        probs = torch.softmax((ibot.teacher.head(look.pooled) - ibot.center) / 0.04, -1).view(2, 4, -1)
        patch_probs = torch.softmax((ibot.teacher.head(look.patches) - ibot.patch_center) / 0.07, -1)
    seen = ibot.student.encoder(global_crops, mask)
    vectors = torch.cat([seen.pooled, ibot.student.encoder(local_crops).pooled])
    logs = torch.log_softmax(ibot.student.head(vectors) / 0.1, -1).view(4, 4, -1)
    cls = torch.stack([-(probs[q] * logs[v]).sum(-1).mean() for q in range(2) for v in range(4) if v != q]).mean()
    terms = -(patch_probs * torch.log_softmax(ibot.student.head(seen.patches) / 0.1, -1)).sum(-1)
    images = [terms[v][mask[v]].mean() if mask[v].any() else terms.new_zeros(()) for v in range(8)]
    patch = torch.stack(images).mean()
    assert answer["patch"].item() == pytest.approx(patch.item(), rel=1e-12)
    torch.testing.assert_close(computed, gradients(ibot, {"loss": cls + patch}), rtol=1e-8, atol=1e-12)


def test_sinkhorn_balances_images_and_hidden_patches_apart():
    ibot = method(targets="sinkhorn")
    global_crops, local_crops, ids = crops()
    answer = ibot(global_crops, local_crops, step=0, epoch=0, sample_ids=ids)
    with torch.no_grad():
        look = ibot.teacher.encoder(global_crops)
        mask = ibot.masking(look.attention, look.grid, step=0, sample_ids=ids)
        seen = ibot.student.encoder(global_crops, mask)
        probs = loop_sinkhorn(ibot.teacher.head(look.pooled), 0.04).view(2, 4, -1)
        patch_probs = loop_sinkhorn(ibot.teacher.head(look.patches[mask]), 0.07)
        vectors = torch.cat([seen.pooled, ibot.student.encoder(local_crops).pooled])
        logs = torch.log_softmax(ibot.student.head(vectors) / 0.1, -1).view(4, 4, -1)
        cls = torch.stack([-(probs[q] * logs[v]).sum(-1).mean() for q in range(2) for v in range(4) if v != q]).mean()
        terms = -(patch_probs * torch.log_softmax(ibot.student.head(seen.patches[mask]) / 0.1, -1)).sum(-1)
        weights = (mask.double() / mask.sum(1, keepdim=True).clamp(min=1) / 8)[mask]
    assert answer["cls"].item() == pytest.approx(cls.item(), rel=1e-9)
    assert answer["patch"].item() == pytest.approx((terms * weights).sum().item(), rel=1e-9)
    ibot.update_teacher(0.9)
    assert not ibot.center.any() and not ibot.patch_center.any()


def test_an_unknown_patch_loss_is_refused():
    with pytest.raises(UserError, match="image, token"):
        method(patch_loss="batch")
