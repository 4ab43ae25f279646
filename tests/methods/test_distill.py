"""Distillation: the loss spelled out, the frozen teacher, masks, ranks, micro-batches, and whole runs."""

import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import maskwise
from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer
from maskwise.errors import UserError
from maskwise.methods import Distill
from maskwise.methods.distill import digest_of
from maskwise.methods.masking import MASKINGS
from maskwise.nn import POOLINGS, Encoder
from maskwise.nn.backbones.factory import Backbone
from support import tiny_teacher
from support.miniature import miniature
from support.tiny_networks import FixedMasking, crops, part

MASK = torch.rand(8, 16, generator=torch.Generator().manual_seed(2)) < 0.4
MASK[3] = False
TEACHER = "method.model=support.tiny_teacher:TinyTeacher"
RECIPE = ("distill/vitt16", TEACHER, "masking=block", "crops.local_number=2", "backbone.drop_path=0.2")


def vit(dim, patch, pooling="cls", mask_token=False, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": patch, "embed_dim": dim, "depth": 1, "num_heads": 2}
    backbone = Backbone("vit_tiny_patch16_224", mask_token=mask_token, **sizes, **options)
    encoder = Encoder(backbone, POOLINGS[pooling](dim))
    for parameter in encoder.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return encoder


def distill(masking=None, dtype=torch.float64, student=None, source=None, **options):
    source = source or vit(10, 8, "simpool", seed=1, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    student = student or vit(12, 4, mask_token=masking is not None)
    return Distill(student, source, masking, model="teacher", **options).to(dtype).train()


def answer_of(made, batch):
    global_crops, local_crops, ids = batch
    return made(global_crops, local_crops, step=1, epoch=0, sample_ids=ids)


def gradients(made, loss):
    made.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.requires_grad}


def spelled_out(made, batch, masked):
    """The loss, image by image and patch by patch; the source's grid is 2 x 2, the student's 4 x 4."""
    global_crops, local_crops, _ = batch
    student, source = made.student.encoder, made.source
    pixels = global_crops * torch.tensor(student.std).view(-1, 1, 1) + torch.tensor(student.mean).view(-1, 1, 1)
    images = (pixels - torch.tensor(source.mean).view(-1, 1, 1)) / torch.tensor(source.std).view(-1, 1, 1)
    target = source(images)
    seen = student(global_crops, MASK if student.backbone.has_mask_token else None)
    local = made.projections.pooled(student(local_crops).pooled)
    pooled = made.projections.pooled(seen.pooled)
    terms = [1 - F.cosine_similarity(pooled[v], target.pooled[v], dim=0) for v in range(8)]
    terms += [
        1 - F.cosine_similarity(local[4 * view + b], target.pooled[4 * g + b], dim=0)
        for view in range(2)
        for g in range(2)
        for b in range(4)
    ]
    plane = target.patches.transpose(1, 2).unflatten(2, (2, 2))
    wide = F.interpolate(plane, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)
    patches = made.projections.patches(seen.patches)
    distance = torch.stack(
        [torch.stack([1 - F.cosine_similarity(patches[v, n], wide[v, n], dim=0) for n in range(16)]) for v in range(8)]
    )
    if masked:
        views = [distance[v][MASK[v]].mean() if MASK[v].any() else distance.new_zeros(()) for v in range(8)]
        return torch.stack(terms).mean(), torch.stack(views).mean()
    return torch.stack(terms).mean(), distance.mean()


@pytest.mark.parametrize("masked, patches", [(False, "all"), (True, "all"), (True, "masked")])
def test_loss_and_gradient_are_those_spelled_out(masked, patches):
    masking = FixedMasking(MASK) if masked else None
    made, batch = distill(masking, patches=patches, pooled_weight=0.5, patch_weight=2.0), crops()
    answer = answer_of(made, batch)
    pooled, patch = spelled_out(made, batch, patches == "masked")
    assert answer["pooled"].item() == pytest.approx(pooled.item(), rel=1e-6)  # float32 statistics in the spelled-out
    assert answer["patch"].item() == pytest.approx(patch.item(), rel=1e-6)
    assert answer["mask_share"].item() == pytest.approx(MASK.double().mean().item() if masked else 0.0)
    expected = gradients(made, 0.5 * pooled + 2.0 * patch)
    torch.testing.assert_close(gradients(made, answer_of(made, batch)["loss"]), expected, rtol=1e-4, atol=1e-7)


def test_a_convolutional_student_learns_the_patches_on_its_own_grid():
    torch.manual_seed(0)
    backbone = Backbone("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 8, 16], output_stride=8)
    student = Encoder(backbone, POOLINGS["gap"](backbone.dim))
    made = distill(student=student, dtype=torch.float32)
    answer = answer_of(made, crops(dtype=torch.float32))
    answer["loss"].backward()
    assert answer["loss"].isfinite() and made.student.encoder.backbone.grid_for((16, 16)) == (2, 2)
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)
    made.update_teacher(0.0)
    student_state = made.student.state_dict()
    assert all(torch.equal(value, student_state[name]) for name, value in made.teacher.state_dict().items())


def test_masks_follow_the_teachers_attention_on_the_students_grid():
    masking = MASKINGS["attmask_high"](ratio=0.25, var=0.0, prob=1.0)
    made, batch = distill(masking), crops()
    targets = made.source_features(batch[0])
    masks = made.sample_masks(targets, (4, 4), 1, batch[2], 2)
    best = targets.attention.mean(1).argmax(1)
    for view, cell in enumerate(best.tolist()):
        corner = {0: 0, 1: 3, 2: 12, 3: 15}[cell]  # the corner of the student's grid inside the best cell
        assert masks.mask[view, corner] and masks.mask[view].sum() == 4


def trainer(made, accumulate=1, precision="fp32"):
    return Trainer(
        made,
        optimizer=make_optimizer("sgd", parameter_groups(made)),
        world=World(),
        schedules=Schedules(
            lr=lambda step: 0.1,
            weight_decay=lambda step: 0.04,
            momentum=lambda step: 0.8,
            steps_per_epoch=2,
            total_steps=3,
        ),
        accumulate=accumulate,
        precision=precision,
    )


def test_micro_batches_equal_one_batch_and_the_teacher_stays_bit_for_bit():
    runs = []
    for accumulate in (1, 2, 4):
        made = distill(MASKINGS["block"]())
        before = copy.deepcopy(made.source.state_dict())
        running = trainer(made, accumulate)
        outputs = [running.step(*crops(4, 2, torch.float64, seed=step)) for step in range(3)]
        runs.append(
            ([{k: o[k] for k in ("loss", "pooled", "patch", "mask_share")} for o in outputs], made.state_dict())
        )
        assert all(torch.equal(value, before[name]) for name, value in made.source.state_dict().items())
        assert not made.source.training and not any(p.requires_grad for p in made.source.parameters())
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-10, atol=1e-11)
    assert not [name for name in runs[0][1] if name.startswith("source.")], "saved twice"


def test_two_ranks_are_one():
    batch = crops(4)
    one = distill(FixedMasking(MASK), patches="masked")
    whole = answer_of(one, batch)
    expected = gradients(one, whole["loss"])
    found = []
    for rank in range(2):
        rows = slice(2 * rank, 2 * rank + 2)
        made = distill(FixedMasking(part(MASK, rows, 4)), patches="masked")
        answer = answer_of(made, (part(batch[0], rows, 4), part(batch[1], rows, 4), batch[2][rows]))
        found.append((answer["loss"].item(), gradients(made, answer["loss"])))
    assert (found[0][0] + found[1][0]) / 2 == pytest.approx(whole["loss"].item(), rel=1e-12)
    mean = {name: (found[0][1][name] + found[1][1][name]) / 2 for name in expected}
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-12)


def test_a_bf16_step_is_near_the_float32_one():
    steps = []
    for precision in ("fp32", "bf16"):
        running = trainer(distill(dtype=torch.float32), precision=precision)
        steps.append(running.step(*crops(dtype=torch.float32)))
    assert steps[1]["ok"] and steps[1]["loss"].dtype == torch.float32
    assert steps[1]["loss"].item() == pytest.approx(steps[0]["loss"].item(), rel=0.05)


def test_a_checkpoint_of_another_teacher_is_refused_in_one_line():
    made = distill()
    other = distill(source=vit(10, 8, "simpool", seed=7))
    assert not torch.equal(made.source_digest, other.source_digest)
    with pytest.raises(UserError, match="method.model teacher has other weights than when this run began") as caught:
        other.load_state_dict(made.state_dict())
    assert "\n" not in str(caught.value)
    changed = copy.deepcopy(made.source)
    changed.backbone.pos_embed.data[0, 0, 0] += 1e-12
    assert not torch.equal(digest_of(changed), digest_of(made.source))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patches": "masked"}, "masking is none"),
        ({"masking": MASKINGS["attmask_high"](), "source": vit(10, 8, "gap")}, "which gives none"),
        ({"masking": MASKINGS["block"](), "student": vit(12, 4)}, "no mask token"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        distill(**options)
    assert "\n" not in str(caught.value)


def small(*more):
    return miniature(*RECIPE, "train.steps=4", "optimizer.warmup_epochs=1", "train.save_every=4", *more)


def test_an_interrupted_run_goes_on_to_the_same_weights_and_another_teacher_is_refused(tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(running, *arguments, **options):
        if running.step_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(running, *arguments, **options)

    recipe = small("train.precision=fp32")
    assert maskwise.train(recipe, out=tmp_path / "whole", quiet=True)["status"] == "complete"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert maskwise.train(recipe, out=tmp_path / "parts", quiet=True)["status"] == "preempted"
    make = tiny_teacher.TinyTeacher.__init__

    def other(network):
        make(network)
        network.layer.weight.data[0, 0, 0, 0] += 1

    with monkeypatch.context() as patch:
        patch.setattr(tiny_teacher.TinyTeacher, "__init__", other)
        with pytest.raises(UserError, match="has other weights than when this run began"):
            maskwise.train(recipe, out=tmp_path / "parts", quiet=True)
    moved = small("train.precision=fp32", "method.model=support.tiny_teacher:Moved")
    assert maskwise.train(moved, out=tmp_path / "parts", quiet=True)["status"] == "complete"
    for file in ("model", "optimizer"):
        one, two = (
            load_file(tmp_path / run / "checkpoints" / "step_00000004" / f"{file}.safetensors")
            for run in ("whole", "parts")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        assert not [key for key in one if "source." in key]
    encoder = maskwise.load(tmp_path / "whole")
    assert encoder(torch.randn(1, 3, 32, 32)).pooled.shape == (1, 48)
    maskwise.export(encoder, tmp_path / "exported")
    files = list((tmp_path / "exported").rglob("*.safetensors"))
    assert files and not [key for file in files for key in load_file(file) if "projections" in key]


def test_the_recipe_names_its_keys_and_no_others():
    recipe = small()
    assert not [key for key in recipe.values if key.startswith("head.") or "temp" in key]
    with pytest.raises(UserError, match="method.teacher_size resizes"):
        from maskwise.build import distillation

        source = distillation.frozen_teacher("support.tiny_teacher:TinyTeacher", 0)
        source.backbone.check_size = lambda size: (_ for _ in ()).throw(UserError("no"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distillation, "frozen_teacher", lambda name, seed: source)
            distillation.method(recipe, vit(12, 4, mask_token=True), World())
    with pytest.raises(UserError, match="method.model: nowhere/at/all does not exist"):
        from maskwise.build.distillation import frozen_teacher

        frozen_teacher("nowhere/at/all", 0)
