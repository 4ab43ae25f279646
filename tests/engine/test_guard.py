"""What is not finite gets nowhere: injected at every place it can come from, into every method, and searched for in everything that lasts."""


import pair
import pytest
import torch
from methods.tiny_networks import PROTOTYPES, crops, method

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Trainer
from maskwise.methods import METHODS

IMAGES = 4
STUDENT_TEACHER = [name for name in ("dino", "ibot", "mst") if name in METHODS]


def trainer(name="ibot", optimizer="adamw", world=World(), precision="fp32", accumulate=1, **options):
    masking = "attmask_low" if name == "mst" else "attmask_hint" if name == "ibot" else None
    made = method(name, options.pop("masking", masking), dtype=torch.float32, all_sum=world.all_sum, world_size=world.size, **options)
    return Trainer(
        made, optimizer=make_optimizer(optimizer, parameter_groups(made)), world=world, lr=lambda step: 0.01, weight_decay=lambda step: 0.04, momentum=lambda step: 0.9,
        steps_per_epoch=2, total_steps=20, freeze_last_layer=0, precision=precision, accumulate=accumulate,
    )


def batch(step):
    global_crops, local_crops, ids = crops(IMAGES, dtype=torch.float32, seed=step)
    return [global_crops, local_crops, ids]


def state(it):
    model, moments = it.tensors()
    return {key: value.clone() for key, value in {**model, **moments}.items()}


def poison_images(which):
    """The last image of the given crops is not a number."""

    def inject(it, data, value):
        data[which][-1] = value

    return inject


def poison_loss(it, data, value):
    forward = it.method.forward
    it.forward = lambda *args, **options: {**(seen := forward(*args, **options)), "loss": seen["loss"] * value}


def poison_gradient(it, data, value):
    it.hook = it.method.student.encoder.backbone.blocks[0].mlp.fc1.bias.register_hook(lambda gradient: gradient * value)


def poison_teacher(field):
    """One number of the teacher's features is not one; the student sees nothing of it."""

    def inject(it, data, value):
        encode = it.method.teacher.encoder.forward

        def spoilt(*args, **options):
            features = encode(*args, **options)
            getattr(features, field).view(-1)[-1] = value
            return features

        it.method.teacher.encoder.forward = spoilt

    return inject


PLACES = {
    "loss": poison_loss, "one gradient": poison_gradient, "global crops": poison_images(0), "local crops": poison_images(1),
    "teacher's vectors": poison_teacher("pooled"), "teacher's patches": poison_teacher("patches"),
}  # fmt: skip


def refused(it, inject, value):
    """A good step, a bad one that must change nothing, and the causes that are told."""
    good, bad = it.step_index, it.step_index + 1
    assert it.step(*batch(good))["ok"]
    before, data, skipped = state(it), batch(bad), int(it.skipped)
    assert it.bad_batches() == [] and all(torch.isfinite(each).all() for each in before.values())
    forward, encode = it.forward, it.method.teacher.encoder.forward
    inject(it, data, value)
    seen = it.step(*data)
    it.forward, it.method.teacher.encoder.forward = forward, encode
    if hasattr(it, "hook"):
        it.hook.remove()
    assert not seen["ok"] and int(it.skipped) == skipped + 1 and int(it.skipped_in_a_row) == 1
    after = state(it)
    assert before.keys() == after.keys()
    assert not [key for key in before if not torch.equal(before[key], after[key])]
    [told] = it.bad_batches()
    assert told["step"] == bad + 1 and told["sample_ids"] == [data[2].tolist()]
    return told["causes"]


@pytest.mark.parametrize("name", STUDENT_TEACHER)
def test_nothing_gets_through(name):
    it = trainer(name)
    for place, inject in PLACES.items():
        for value in (float("nan"), float("inf")):
            if place == "teacher's patches" and name != "ibot":
                continue  # this method reads no patch of the teacher
            causes = refused(it, inject, value)
            assert causes and (causes == ["gradient"]) == (place == "one gradient"), (place, causes)
    assert it.step(*batch(99))["ok"] and int(it.skipped_in_a_row) == 0


def test_the_teachers_patches_are_guarded_where_nothing_is_hidden():
    """The patch center is a mean over all patches, hidden or not: without a hidden one the loss is finite."""
    it = trainer(start_epoch=5)
    assert refused(it, poison_teacher("patches"), float("nan")) == ["center"]


@pytest.mark.parametrize("options", [
    {"targets": "sinkhorn"}, {"accumulate": 2}, {"accumulate": 2, "targets": "sinkhorn"}, {"accumulate": 2, "patch_loss": "token"}, {"precision": "bf16"},
    {"optimizer": "sgd"}, {"optimizer": "lars", "head": {"norm": "batch"}, "pooling": "simpool"},
], ids=str)  # fmt: skip
def test_nothing_gets_through_however_a_step_is_taken(options):
    it = trainer(**options)
    if options.get("targets") == "sinkhorn":
        it.method.hide = lambda features, views, *args, **more: hidden_everywhere(features)  # without centers only hidden patches are read
    for place in ("one gradient", "local crops", "teacher's vectors", "teacher's patches"):
        assert refused(it, PLACES[place], float("nan")), place


def hidden_everywhere(features):
    from maskwise.methods.masking import Hidden

    mask = torch.ones(features.patches.shape[:2], dtype=torch.bool)
    return Hidden(mask, mask.numel())


def test_a_gradient_that_overflows_on_its_way_is_caught():
    """Finite loss, finite weights: the infinity is made by the backward pass."""
    it = trainer("dino")
    causes = refused(it, lambda it, data, value: poison_gradient(it, data, value), 1e38 * 1e10)
    assert causes == ["gradient"]


def test_what_the_trainer_remembers_is_bounded():
    it = trainer("dino")
    it.step(*batch(0))
    (entry,) = it.recent
    assert it.recent.maxlen == 1000 and entry[0] == 0 and entry[2].tolist() == [0, 0, 0]


def test_the_center_moves_by_what_is_reported():
    it = trainer("dino", masking=None)
    center, told = it.method.center.clone(), it.step(*batch(0))["center_move"]
    assert len(center) == PROTOTYPES
    torch.testing.assert_close(told, (it.method.center - center).norm() / 0.1)


@pytest.mark.slow
def test_one_bad_rank_of_two_leaves_both_alone():
    ends = pair.end(pair.start(__file__))
    assert ends[0][0] == ends[1][0], "the ranks tell the same causes and end with the same weights"


def one_of_two():
    world = World.start("cpu")
    for name in STUDENT_TEACHER:
        for place in PLACES:
            if place == "teacher's patches" and name != "ibot":
                continue
            it = trainer(name, world=world)
            for step in range(2):
                assert it.step(*batch(10 * step + world.rank))["ok"]
            before, data = state(it), batch(20 + world.rank)
            forward = it.forward
            if world.rank == 1 and place == "loss":
                it.forward = lambda *args, **options: {**(seen := forward(*args, **options)), "loss": seen["loss"] * float("nan")}
            elif world.rank == 1:
                PLACES[place](it, data, float("nan"))
            assert not it.step(*data)["ok"], (name, place)
            after = state(it)
            assert not [key for key in before if not torch.equal(before[key], after[key])], (name, place)
            [told] = it.bad_batches()
            print(name, place, told, sum(float(value.double().sum()) for value in after.values()))
    world.close()


if __name__ == "__main__":
    one_of_two()
