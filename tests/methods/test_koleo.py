"""KoLeo in DINO, iBOT and MST: the term, its weight, two ranks and micro-batches."""

import pytest
import torch

import maskwise
from maskwise.errors import UserError
from maskwise.functional.koleo import koleo_loss
from maskwise.methods.koleo import gather_features
from support.tiny_networks import crops, method, part, run_ranks

MASKINGS = {"dino": None, "ibot": "block", "mst": "attmask_low"}


def answer_of(made, batch, **options):
    global_crops, local_crops, ids = batch
    return made(global_crops, local_crops, step=1, epoch=0, sample_ids=ids, **options)


def gradients(made, loss):
    made.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in made.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("name", MASKINGS)
def test_it_adds_the_sum_over_global_crops_of_the_pooled_features_before_the_head(name):
    made = method(name, MASKINGS[name], koleo=0.1)
    plain = method(name, MASKINGS[name])
    batch = crops()
    answer, without = answer_of(made, batch), answer_of(plain, batch)
    masks = made.sample_masks(made.teacher_features(batch[0]), made.split_views(*batch), 1, batch[2])
    mask = masks.mask if made.student.encoder.backbone.has_mask_token else None
    first, second = made.student.encoder(batch[0], mask).pooled.chunk(2)
    term = koleo_loss(first[None]) + koleo_loss(second[None])
    assert set(answer) - set(without) == {"koleo"}
    assert answer["koleo"].item() == pytest.approx(term.item() / 2, rel=1e-12)
    assert answer["loss"].item() == pytest.approx(without["loss"].item() + 0.1 * term.item(), rel=1e-12)
    assert not answer["koleo"].requires_grad
    expected = gradients(plain, without["loss"])
    for key, value in gradients(made, 0.1 * term).items():
        expected[key] = expected[key] + value
    torch.testing.assert_close(gradients(made, answer_of(made, batch)["loss"]), expected, rtol=1e-9, atol=1e-12)


def test_local_crops_have_no_part_in_it():
    made, (global_crops, local_crops, ids) = method("dino", None, koleo=1.0), crops()
    terms = [answer_of(made, (global_crops, local, ids))["koleo"].item() for local in (local_crops, local_crops + 1)]
    assert terms[0] == pytest.approx(terms[1], rel=1e-12)


def test_two_ranks_are_one():
    batch = crops(4)
    one = method("ibot", "block", koleo=0.3)
    whole = answer_of(one, batch)
    expected = gradients(one, whole["loss"])
    parts = [method("ibot", "block", koleo=0.3, world_size=2, rank=rank) for rank in range(2)]

    def work(rank, all_sum):
        parts[rank].all_sum = all_sum
        rows = slice(2 * rank, 2 * rank + 2)
        answer = answer_of(parts[rank], (part(batch[0], rows, 4), part(batch[1], rows, 4), batch[2][rows]))
        return answer["koleo"].item(), answer["loss"]

    answers = run_ranks(2, work)
    assert [answer[0] for answer in answers] == pytest.approx([whole["koleo"].item()] * 2, rel=1e-12)
    found = [gradients(made, answer[1]) for made, answer in zip(parts, answers)]
    mean = {name: (found[0][name] + found[1][name]) / 2 for name in expected}
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)


def test_features_are_gathered_by_rank_then_micro_batch():
    rows = torch.arange(2 * 8 * 3.0).view(2, 8, 3)
    micro = [[rows[:, 4 * r + 2 * m : 4 * r + 2 * m + 2] for m in range(2)] for r in range(2)]
    found = run_ranks(2, lambda rank, all_sum: gather_features(micro[rank], all_sum, rank, 2))
    for rank, batches in enumerate(found):
        assert [batch.start for batch in batches] == [4 * rank, 4 * rank + 2]
        assert all(torch.equal(batch.features, rows) for batch in batches)


def test_features_before_the_loss_leave_batch_norms_alone():
    from maskwise.methods import DINO
    from maskwise.nn import POOLINGS, Encoder, ProjectionHead
    from maskwise.nn.backbones.factory import Backbone

    torch.manual_seed(0)
    backbone = Backbone("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 8, 16])
    encoder = Encoder(backbone, POOLINGS["gap"](backbone.dim))
    made = DINO(encoder, ProjectionHead(backbone.dim, 7, hidden=8, bottleneck=4), koleo=0.1).train()
    images, ids = torch.randn(8, 3, 32, 32), torch.arange(4)
    output = made.teacher_forward(images, None, step=0, epoch=0, sample_ids=ids)
    before = {name: buffer.clone() for name, buffer in made.named_buffers()}
    features = made.features_before_loss(output)
    assert all(torch.equal(buffer, before[name]) for name, buffer in made.named_buffers())
    torch.testing.assert_close(features.flatten(0, 1), encoder(images).pooled)


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_a_batch_of_one_image_is_a_conflict_in_the_recipe(name):
    overrides = ("method.koleo=0.1", "train.batch_size=1", "optimizer.min_lr=0", f"method={name}")
    with pytest.raises(UserError, match="method.koleo: compares the images of a batch, and train.batch_size is 1"):
        maskwise.read_recipe("debug/tiny", *overrides)
