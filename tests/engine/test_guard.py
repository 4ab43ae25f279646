"""Non-finite values never reach weights, teacher, moments or centers: injected everywhere, for every method."""

import pytest
import torch

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer
from maskwise.methods import METHODS
from support import pair
from support.tiny_method import state
from support.tiny_networks import PROTOTYPES, crops, method

IMAGES = 4
STUDENT_TEACHER = [name for name in ("dino", "ibot", "mst") if name in METHODS]


def make_trainer(name="ibot", optimizer="adamw", world=World(), precision="fp32", accumulate=1, **options):
    masking = "attmask_low" if name == "mst" else "attmask_hint" if name == "ibot" else None
    model = method(
        name,
        options.pop("masking", masking),
        dtype=torch.float32,
        all_sum=world.all_sum,
        world_size=world.size,
        **options,
    )
    return Trainer(
        model,
        optimizer=make_optimizer(optimizer, parameter_groups(model)),
        world=world,
        schedules=Schedules(
            lr=lambda step: 0.01,
            weight_decay=lambda step: 0.04,
            momentum=lambda step: 0.9,
            steps_per_epoch=2,
            total_steps=20,
        ),
        freeze_last_layer=0,
        precision=precision,
        accumulate=accumulate,
    )


def batch(step):
    global_crops, local_crops, ids = crops(IMAGES, dtype=torch.float32, seed=step)
    return [global_crops, local_crops, ids]


def poison_images(which):
    """Set the last image of some crops to a non-finite value."""

    def inject(trainer, data, value):
        data[which][-1] = value

    return inject


def poison_loss(trainer, data, value):
    forward = trainer.method.forward
    trainer.forward = lambda *args, **options: {**(losses := forward(*args, **options)), "loss": losses["loss"] * value}


def poison_gradient(trainer, data, value):
    trainer.hook = trainer.method.student.encoder.backbone.blocks[0].mlp.fc1.bias.register_hook(
        lambda gradient: gradient * value
    )


def poison_teacher(field):
    """Make one number of the teacher's features non-finite; the student is unaffected."""

    def inject(trainer, data, value):
        encode = trainer.method.teacher.encoder.forward

        def poisoned(*args, **options):
            features = encode(*args, **options)
            getattr(features, field).view(-1)[-1] = value
            return features

        trainer.method.teacher.encoder.forward = poisoned

    return inject


PLACES = {
    "loss": poison_loss,
    "one gradient": poison_gradient,
    "global crops": poison_images(0),
    "local crops": poison_images(1),
    "teacher's vectors": poison_teacher("pooled"),
    "teacher's patches": poison_teacher("patches"),
}


def causes_of_skipped_step(trainer, inject, value):
    """Take a finite step, then a non-finite one that must change nothing; returns the reported causes."""
    good, bad = trainer.step_index, trainer.step_index + 1
    assert trainer.step(*batch(good))["ok"]
    before, data, skipped = state(trainer), batch(bad), int(trainer.skipped)
    assert trainer.bad_batches() == [] and all(torch.isfinite(tensor).all() for tensor in before.values())
    forward, encode = trainer.forward, trainer.method.teacher.encoder.forward
    inject(trainer, data, value)
    output = trainer.step(*data)
    trainer.forward, trainer.method.teacher.encoder.forward = forward, encode
    if hasattr(trainer, "hook"):
        trainer.hook.remove()
    assert not output["ok"] and int(trainer.skipped) == skipped + 1 and int(trainer.skipped_in_a_row) == 1
    after = state(trainer)
    assert before.keys() == after.keys()
    assert not [key for key in before if not torch.equal(before[key], after[key])]
    [entry] = trainer.bad_batches()
    assert entry["step"] == bad + 1 and entry["sample_ids"] == [data[2].tolist()]
    return entry["causes"]


@pytest.mark.parametrize("name", STUDENT_TEACHER)
def test_non_finite_values_change_no_state(name):
    trainer = make_trainer(name)
    for place, inject in PLACES.items():
        for value in (float("nan"), float("inf")):
            if place == "teacher's patches" and name != "ibot":
                continue  # this method reads no patch of the teacher
            causes = causes_of_skipped_step(trainer, inject, value)
            assert causes and (causes == ["gradient"]) == (place == "one gradient"), (place, causes)
    assert trainer.step(*batch(99))["ok"] and int(trainer.skipped_in_a_row) == 0


def test_teacher_patches_are_guarded_without_masked_patches():
    """Guard the patch center, a mean over all patches: without a masked patch the loss is finite."""
    trainer = make_trainer(start_epoch=5)
    assert causes_of_skipped_step(trainer, poison_teacher("patches"), float("nan")) == ["center"]


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "sinkhorn"},
        {"accumulate": 2},
        {"accumulate": 2, "targets": "sinkhorn"},
        {"accumulate": 2, "patch_loss": "token"},
        {"precision": "bf16"},
        {"optimizer": "sgd"},
        {"optimizer": "lars", "head": {"norm": "batch"}, "pooling": "simpool"},
    ],
    ids=str,
)
def test_non_finite_values_change_no_state_for_any_trainer_option(options):
    trainer = make_trainer(**options)
    if options.get("targets") == "sinkhorn":
        trainer.method.sample_masks = lambda features, views, *args, **more: all_masked(
            features
        )  # without centers only masked patches are read
    for place in ("one gradient", "local crops", "teacher's vectors", "teacher's patches"):
        assert causes_of_skipped_step(trainer, PLACES[place], float("nan")), place


def all_masked(features):
    from maskwise.methods.masking import SampledMasks

    mask = torch.ones(features.patches.shape[:2], dtype=torch.bool)
    return SampledMasks(mask, mask.numel())


def test_gradient_overflow_is_detected():
    """Detect an infinity of the backward pass at finite loss and weights."""
    trainer = make_trainer("dino")
    causes = causes_of_skipped_step(
        trainer, lambda trainer, data, value: poison_gradient(trainer, data, value), 1e38 * 1e10
    )
    assert causes == ["gradient"]


def test_history_of_the_trainer_is_bounded():
    trainer = make_trainer("dino")
    trainer.step(*batch(0))
    (entry,) = trainer.recent
    assert trainer.recent.maxlen == 1000 and entry[0] == 0 and entry[2].tolist() == [0, 0, 0]


def test_reported_center_shift_equals_the_change():
    trainer = make_trainer("dino", masking=None)
    center, shift = trainer.method.center.clone(), trainer.step(*batch(0))["center_shift"]
    assert len(center) == PROTOTYPES
    torch.testing.assert_close(shift, (trainer.method.center - center).norm() / 0.1)


@pytest.mark.slow
def test_non_finite_rank_of_two_changes_neither():
    ends = pair.end(pair.start(__file__))
    assert ends[0][0] == ends[1][0], "the ranks report the same causes and end with the same weights"


def run_rank():
    world = World.start("cpu")
    for name in STUDENT_TEACHER:
        for place in PLACES:
            if place == "teacher's patches" and name != "ibot":
                continue
            trainer = make_trainer(name, world=world)
            for step in range(2):
                assert trainer.step(*batch(10 * step + world.rank))["ok"]
            before, data = state(trainer), batch(20 + world.rank)
            forward = trainer.forward
            if world.rank == 1 and place == "loss":
                trainer.forward = lambda *args, **options: {
                    **(losses := forward(*args, **options)),
                    "loss": losses["loss"] * float("nan"),
                }
            elif world.rank == 1:
                PLACES[place](trainer, data, float("nan"))
            assert not trainer.step(*data)["ok"], (name, place)
            after = state(trainer)
            assert not [key for key in before if not torch.equal(before[key], after[key])], (name, place)
            [entry] = trainer.bad_batches()
            print(name, place, entry, sum(float(value.double().sum()) for value in after.values()))
    world.close()


if __name__ == "__main__":
    run_rank()
