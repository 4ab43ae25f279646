"""A method inside the trainer: the order of a step, held last layer, frozen gains."""

import copy

import torch

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer
from support.tiny_networks import crops, method


def trainer(made, optimizer="sgd", **options):
    return Trainer(
        made,
        optimizer=make_optimizer(optimizer, parameter_groups(made)),
        world=World(),
        schedules=Schedules(
            lr=lambda step: 0.05,
            weight_decay=lambda step: 0.04,
            momentum=lambda step: 0.9,
            steps_per_epoch=2,
            total_steps=4,
        ),
        **options,
    )


def test_the_teacher_averages_the_student_as_the_step_left_it():
    made = method(dtype=torch.float32)
    before = {name: p.clone() for name, p in made.teacher.named_parameters()}
    trainer(made, freeze_last_layer=0).step(*crops(dtype=torch.float32))
    student = dict(made.student.named_parameters())
    for name, p in made.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * student[name], rtol=0, atol=3e-7)


def test_every_part_of_the_student_moves_and_the_last_layer_only_after_its_epoch():
    made = method(dtype=torch.float32, masking="random")
    training = trainer(made, "adamw", freeze_last_layer=1)
    for step in range(3):
        before = copy.deepcopy(made.student.state_dict())
        training.step(*crops(dtype=torch.float32))
        still = {name for name, value in made.student.state_dict().items() if torch.equal(value, before[name])}
        assert still == ({name for name in before if "last_layer" in name} if step < 2 else set())


def test_frozen_gains_stay_at_one_in_both_networks():
    made = method(dtype=torch.float32, head={"norm_last_layer": True, "patch_prototypes": 5})
    training = trainer(made, "lars", freeze_last_layer=0)
    for _ in range(2):
        training.step(*crops(dtype=torch.float32))
    gains = [value for key, value in made.student.state_dict().items() if key.endswith("weight_g")]
    assert len(gains) == 2 and all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)
    assert not any("weight_g" in name for group in training.optimizer.param_groups for name in group["names"])
