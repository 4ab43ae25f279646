"""MST: the DINO loss unchanged, the pixel loss against closed forms, two ranks, and a resumed run."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import maskwise
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.methods import MST
from maskwise.methods.masking import MASKINGS
from support.miniature import miniature
from support.tiny_networks import crops, method, part, run_ranks


def low():
    return MASKINGS["attmask_low"](ratio=0.25, var=0.0, prob=1.0)


def answer_of(made, batch, **options):
    global_crops, local_crops, ids = batch
    return made(global_crops, local_crops, step=1, epoch=0, sample_ids=ids, **options)


def test_without_its_pixels_it_is_dino():
    mst, dino = method("mst", low(), pixel_weight=0.0, drop_path=0.1), method("dino", low(), drop_path=0.1)
    mine, plain = (answer_of(built, crops()) for built in (mst, dino))
    # to rounding: DINO computes its last block for class tokens alone
    assert mine["loss"].item() == mine["cls"].item() == pytest.approx(plain["loss"].item(), rel=1e-13)
    assert mine["mask_share"].item() == 0.25
    for answer in (mine, plain):
        answer["loss"].backward()
    for (name, one), (other, two) in zip(mst.student.named_parameters(), dino.student.named_parameters()):
        assert name == other
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind, closed", [("l1", lambda x: x.abs().mean()), ("l2", lambda x: x.square().mean())])
def test_a_decoder_that_paints_one_gray_costs_the_distance_to_it(kind, closed):
    mst = method("mst", low(), pixel_loss=kind, pixel_weight=0.5)
    with torch.no_grad():
        mst.decoder.pixels.weight.zero_()
        mst.decoder.pixels.bias.fill_(0.3)
    batch = crops()
    answer = answer_of(mst, batch)
    assert answer["pixel"].item() == pytest.approx(closed(batch[0] - 0.3).item(), rel=1e-12)
    assert answer["loss"].item() == pytest.approx(answer["cls"].item() + 0.5 * answer["pixel"].item(), rel=1e-12)


def test_the_pixel_term_covers_every_patch_of_both_global_crops_and_no_local_one():
    mst = method("mst", low())
    global_crops, local_crops, ids = crops()
    mask = mst.masking(mst.teacher.encoder(global_crops).attention, (4, 4), step=1, sample_ids=ids)
    seen = mst.student.encoder(global_crops, mask)
    painted = mst.decoder(seen.patches, (4, 4))
    per_view = [
        (painted[v, :, i, j] - global_crops[v, :, i, j]).abs().mean()
        for v in range(8)
        for i in range(16)
        for j in range(16)
    ]
    expected = torch.stack(per_view).mean()
    answer = answer_of(mst, (global_crops, local_crops, ids))
    assert answer["pixel"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert answer_of(mst, (global_crops, local_crops + 1.0, ids))["pixel"].item() == answer["pixel"].item()
    assert mask.sum(1).tolist() == [4] * 8


def test_its_gradient_reaches_decoder_and_mask_token_and_the_teacher_has_neither():
    mst = method("mst", low(), lambda1=0.0)
    answer_of(mst, crops())["loss"].backward()
    assert mst.student.encoder.backbone.mask_token.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mst.decoder.parameters())
    assert not [name for name, _ in mst.teacher.named_parameters() if "decoder" in name or "mask_token" in name]


def test_the_decoder_s_first_weights_follow_from_the_seed_alone():
    encoder, head = method("dino", low()).student.children()
    made = []
    for stray in (5, 6):
        torch.manual_seed(stray)
        made.append(MST(encoder, head, masking=low(), seed=3))
        assert torch.initial_seed() == stray, "the generator outside is put back"
    assert torch.equal(made[0].decoder.pixels.weight, made[1].decoder.pixels.weight)
    assert not torch.equal(
        made[0].decoder.pixels.weight, MST(encoder, head, masking=low(), seed=4).decoder.pixels.weight
    )


def test_two_ranks_are_one():
    batch = crops(4)
    one = method("mst", low())
    whole = answer_of(one, batch)
    whole["loss"].backward()
    one.update_teacher(0.9)
    parts = [method("mst", low(), world_size=2) for _ in range(2)]

    def work(rank, all_sum):
        made = parts[rank]
        made.all_sum = all_sum
        rows = slice(2 * rank, 2 * rank + 2)
        answer = answer_of(made, (part(batch[0], rows, 4), part(batch[1], rows, 4), batch[2][rows]))
        answer["loss"].backward()
        return {key: value.detach() for key, value in answer.items()}

    answers = run_ranks(2, work)
    for key in ("loss", "cls", "pixel"):
        assert sum(float(rank_answer[key]) for rank_answer in answers) / 2 == pytest.approx(
            whole[key].item(), rel=1e-12
        )
    for name, parameter in one.named_parameters():
        if parameter.grad is not None:
            mean = sum(dict(made.named_parameters())[name].grad for made in parts) / 2
            torch.testing.assert_close(mean, parameter.grad, rtol=1e-9, atol=1e-13)
    for made in parts:
        made.update_teacher(0.9)
        torch.testing.assert_close(made.center, one.center, rtol=1e-12, atol=1e-15)


def test_an_unknown_pixel_loss_is_refused():
    with pytest.raises(UserError, match="l1, l2"):
        method("mst", low(), pixel_loss="huber")


def test_an_interrupted_run_goes_on_to_the_same_weights_and_its_encoder_loads(tmp_path, monkeypatch):
    recipe = miniature(
        "mst/vits16_100ep",
        "train.steps=4",
        "train.precision=fp32",
        "optimizer.warmup_epochs=1",
        "teacher.warmup_temp_epochs=1",
        "train.save_every=4",
    )
    step = Trainer.step

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    assert maskwise.train(recipe, out=tmp_path / "whole", quiet=True)["status"] == "complete"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert maskwise.train(recipe, out=tmp_path / "parts", quiet=True)["status"] == "preempted"
    assert maskwise.train(recipe, out=tmp_path / "parts", quiet=True)["status"] == "complete"
    for file in ("model", "optimizer"):
        one, two = (
            load_file(tmp_path / run / "checkpoints" / "step_00000004" / f"{file}.safetensors")
            for run in ("whole", "parts")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert any(
        key.startswith("decoder.")
        for key in load_file(tmp_path / "whole" / "checkpoints" / "step_00000004" / "model.safetensors")
    )
    assert maskwise.load(tmp_path / "whole")(torch.randn(1, 3, 32, 32)).pooled.shape == (1, 48)
