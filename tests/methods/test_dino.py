"""DINO: the image term against the references' numbers and its closed forms."""

import math

import pytest
import torch

from maskwise.errors import UserError
from maskwise.methods import DINO
from support.tiny_networks import crops, method, scripted

CENTERS = {
    1: [0.02118886, 0.063123456, 0.057287478, 0.008097479, -0.04722053, -0.066802984, -0.035830271, 0.022258076],
    3: [0.057421811, 0.171064565, 0.155249066, 0.021944169, -0.127967637, -0.181036087, -0.097100036, 0.060319387],
}


def test_golden_losses_centers_and_gradient():
    dino, global_crops, local_crops, ids = scripted("dino")
    for call, (epoch, expected) in enumerate([(0, 9.273146696), (15, 9.330129126), (99, 9.443322887)], start=1):
        answer = dino(global_crops, local_crops, step=call, epoch=epoch, sample_ids=ids)
        assert answer["loss"].item() == pytest.approx(expected, abs=5e-10)
        if call == 1:
            answer["loss"].backward()
            gradient = dino.student.encoder.student.grad
            assert gradient.norm().item() == pytest.approx(3.017493174, abs=5e-10)
            assert gradient[0, 0].item() == pytest.approx(1.8360058e-05, abs=5e-13)
        dino.update_teacher(0.996)
        if call in CENTERS:
            assert dino.center.tolist() == pytest.approx(CENTERS[call], abs=5e-10)


def test_without_locals_two_terms_remain():
    dino, global_crops, _, ids = scripted("dino")
    assert dino(global_crops, None, step=0, epoch=0, sample_ids=ids)["cls"].item() == pytest.approx(
        12.128087762, abs=5e-10
    )
    empty = global_crops[:0]
    assert dino(global_crops, empty, step=0, epoch=0, sample_ids=ids)["cls"].item() == pytest.approx(
        12.128087762, abs=5e-10
    )


@pytest.mark.parametrize("locals_", [0, 2, 6])
def test_every_pair_of_different_views_counts_once(locals_):
    dino = method("dino", None)
    global_crops, local_crops, ids = crops(3, locals_)
    answer = dino(global_crops, local_crops, step=0, epoch=0, sample_ids=ids)
    teacher = torch.softmax((dino.teacher.head(dino.teacher.encoder(global_crops).pooled)) / 0.04, dim=-1).view(
        2, 3, -1
    )
    vectors = [dino.student.encoder(c).pooled for c in (global_crops, local_crops) if len(c)]
    student = torch.log_softmax(dino.student.head(torch.cat(vectors)) / 0.1, dim=-1).view(2 + locals_, 3, -1)
    pairs = [-(teacher[q] * student[v]).sum(-1).mean() for q in range(2) for v in range(2 + locals_) if v != q]
    assert len(pairs) == 2 * (1 + locals_)
    assert answer["loss"].item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-12)


def test_one_view_alone_is_refused():
    dino = method("dino", None)
    with pytest.raises(UserError, match="two global crops"):
        dino(crops(3)[0][:3], None, step=0, epoch=0, sample_ids=torch.arange(3))
    assert dino(*[c[:3] for c in crops(3)[:2]], step=0, epoch=0, sample_ids=torch.arange(3))["loss"].isfinite()


def test_uniform_teacher_and_student_cost_the_logarithm_of_the_prototypes():
    dino, global_crops, local_crops, ids = scripted("dino")
    dino.student.encoder.student.data.zero_()
    dino.teacher.encoder.teacher.data.zero_()
    answer = dino(global_crops, local_crops, step=0, epoch=0, sample_ids=ids, statistics=True)
    assert answer["loss"].item() == pytest.approx(math.log(8))
    assert answer["teacher_entropy"].item() == answer["teacher_spread"].item() == pytest.approx(math.log(8))


def test_lambda1_weighs_the_loss():
    dino, *batch, ids = scripted("dino", lambda1=0.5)
    answer = dino(*batch, step=0, epoch=0, sample_ids=ids)
    assert answer["loss"].item() == pytest.approx(answer["cls"].item() / 2)


def test_a_masking_hides_patches_from_the_student_only():
    dino = method("dino", "attmask_high")
    assert isinstance(dino, DINO)
    global_crops, local_crops, ids = crops()
    answer = dino(global_crops, local_crops, step=0, epoch=0, sample_ids=ids)
    hidden = dino.masking(dino.teacher.encoder(global_crops).attention, (4, 4), step=0, sample_ids=ids)
    assert answer["mask_share"].item() == pytest.approx(hidden.double().mean().item())
    assert hidden.any()
    logits = torch.cat([dino.student.encoder(global_crops, hidden).pooled, dino.student.encoder(local_crops).pooled])
    logits = dino.student.head(logits).view(4, 4, -1)
    probs = torch.softmax(dino.teacher.head(dino.teacher.encoder(global_crops).pooled) / 0.04, dim=-1).view(2, 4, -1)
    pairs = [
        -(probs[q] * torch.log_softmax(logits[v] / 0.1, -1)).sum(-1).mean()
        for q in range(2)
        for v in range(4)
        if v != q
    ]
    assert answer["cls"].item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-12)
    assert answer["patch"].item() == 0.0


@pytest.mark.parametrize("masking", [None, "random", "attmask_high"])
@pytest.mark.parametrize("pooling", ["cls", "simpool"])
def test_every_trainable_parameter_has_a_gradient(masking, pooling):
    dino = method("dino", masking, pooling=pooling)
    dino(*crops()[:2], step=0, epoch=0, sample_ids=torch.arange(4))["loss"].backward()
    missing = [name for name, p in dino.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize("masking", ["random", "block", "attmask_high", "attmask_low", "attmask_hint"])
def test_with_a_mask_it_is_ibot_without_its_patch_term(masking):
    """The papers' DINO + mask is iBOT with lambda2 = 0."""
    methods = [
        method(name, masking, drop_path=0.1, **options) for name, options in (("dino", {}), ("ibot", {"lambda2": 0.0}))
    ]
    global_crops, local_crops, ids = crops()
    answers = [built(global_crops, local_crops, step=3, epoch=0, sample_ids=ids) for built in methods]
    assert answers[0]["mask_share"].item() == answers[1]["mask_share"].item() > 0
    assert answers[0]["loss"].item() == pytest.approx(answers[1]["loss"].item(), rel=1e-12)
    for answer in answers:
        answer["loss"].backward()
    for (name, one), (_, two) in zip(methods[0].student.named_parameters(), methods[1].student.named_parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-13, msg=name)
