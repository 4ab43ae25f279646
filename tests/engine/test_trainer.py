"""One step: schedules, guard, clip, frozen last layer, state."""

import copy

import pytest
import torch

from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import supports_found_inf
from maskwise.errors import UserError
from support.tiny_method import IMAGES, crops, make_trainer, state


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_first_step_has_rate_zero_and_moves_only_the_center():
    trainer = make_trainer()
    before = state(trainer)
    output = trainer.step(*crops(0))
    after = state(trainer)
    assert not any(value.requires_grad for value in output.values())
    assert all(torch.equal(before[key], after[key]) for key in before if key != "center")
    assert not torch.equal(before["center"], after["center"])
    trainer.step(*crops(1))
    assert not torch.equal(trainer.method.student.encoder.trunk.weight, before["student.encoder.trunk.weight"])


def test_rates_and_decay_follow_the_schedules_and_decay_stays_off_in_its_group():
    trainer = make_trainer()
    for step in range(3):
        trainer.step(*crops(step))
        decayed, undecayed = trainer.optimizer.param_groups
        assert decayed["lr"] == undecayed["lr"] == trainer.schedules.lr(step)
        assert decayed["weight_decay"] == trainer.schedules.weight_decay(step) and undecayed["weight_decay"] == 0
    assert (trainer.step_index, trainer.epoch) == (3, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("at", [0, 5])
def test_non_finite_batch_changes_no_state(optimizer, norm, at):
    trainer = make_trainer(optimizer=optimizer, norm=norm)
    for step in range(at):
        trainer.step(*crops(step))
    before = state(trainer)
    bad, local = crops(at)
    bad[1, 0, 0, 0] = float("nan")
    output = trainer.step(bad, local)
    assert not output["ok"] and same_tensors(before, state(trainer))
    assert int(trainer.skipped) == 1 and trainer.step_index == at + 1
    assert trainer.step(*crops(at + 1))["ok"] and int(trainer.skipped_in_a_row) == 0
    assert all(torch.isfinite(value).all() for value in state(trainer).values())


def test_non_finite_gradient_is_detected_with_a_finite_loss():
    trainer = make_trainer()
    trainer.step(*crops(0))
    before = state(trainer)
    trainer.method.student.encoder.trunk.weight.register_hook(lambda gradient: gradient * float("inf"))
    output = trainer.step(*crops(1))
    assert torch.isfinite(output["loss"]) and not output["ok"] and same_tensors(before, state(trainer))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_device_side_guard_equals_host_side_guard(name):
    layer = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(name, parameter_groups(layer), lr=0.1)
    assert supports_found_inf(optimizer)
    reference = copy.deepcopy(layer)
    reference_optimizer = make_optimizer(name, parameter_groups(reference), lr=0.1)
    for ok in (False, True, False, True):
        for parameter, twin in zip(layer.parameters(), reference.parameters()):
            parameter.grad = torch.full_like(parameter, 0.5 if ok else float("nan"))
            twin.grad = torch.full_like(twin, 0.5)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(0.0 if ok else 1.0)
        optimizer.step()
        if ok:
            reference_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), reference.parameters()))


def test_external_optimizer_is_guarded_on_the_host():
    assert not supports_found_inf(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))


def test_last_layer_is_frozen_for_its_epochs():
    trainer = make_trainer(steps_per_epoch=4, freeze_last_layer=1)
    key = "student.head.last_layer.weight"
    first = trainer.method.state_dict()[key].clone()
    for step in range(4):
        trainer.step(*crops(step))
        assert torch.equal(trainer.method.state_dict()[key], first)
        assert not any(key in name for name in trainer.tensors()[1])
    trainer.step(*crops(4))
    assert not torch.equal(trainer.method.state_dict()[key], first)
    assert any(key in name for name in trainer.tensors()[1])


def test_clipping_is_per_tensor_by_default():
    per_tensor, global_norm, off = (
        make_trainer(clip=clip, clip_mode=mode) for clip, mode in ((1e-3, "tensor"), (1e-3, "global"), (None, "tensor"))
    )
    norms = {}
    for name, trainer in (("tensor", per_tensor), ("global", global_norm), ("off", off)):
        trainer.step(*crops(0))
        norms[name] = torch.stack([p.grad.norm() for p in trainer.parameters if p.grad is not None])
    assert torch.allclose(norms["tensor"], norms["off"].clamp(max=1e-3), rtol=1e-2)
    assert norms["global"].norm() <= 1e-3
    with pytest.raises(AssertionError):
        assert torch.allclose(norms["tensor"], norms["global"])


def test_uint8_crops_are_normalized():
    first, second = make_trainer(), make_trainer()
    raw = torch.randint(0, 256, (2 * IMAGES, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(first.step(raw)["loss"], second.step((raw.float() / 255 - 0.5) / 0.25)["loss"])


def test_bf16_keeps_weights_in_float32():
    trainer = make_trainer(precision="bf16")
    for step in range(3):
        assert trainer.step(*crops(step))["ok"]
    assert {p.dtype for p in trainer.parameters} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_state_round_trip_continues_bit_for_bit(optimizer):
    original, resumed = make_trainer(optimizer=optimizer), make_trainer(optimizer=optimizer)
    for step in range(6):
        original.step(*crops(step))
    model, moments = original.tensors()
    copied = [{key: value.clone() for key, value in part.items()} for part in (model, moments)]
    resumed.step(*crops(99))
    resumed.load_tensors(*copied, step=6)
    for step in range(6, 9):
        original.step(*crops(step)), resumed.step(*crops(step))
    assert same_tensors(state(original), state(resumed))


def test_moments_carry_parameter_names():
    trainer = make_trainer(freeze_last_layer=0)
    trainer.step(*crops(0))
    names = {key.split("/", 1)[1] for key in trainer.tensors()[1]}
    assert names == {name for name, parameter in trainer.method.named_parameters() if parameter.requires_grad}


def test_checkpoint_of_another_model_is_a_one_line_error():
    trainer = make_trainer()
    model, moments = trainer.tensors()
    with pytest.raises(UserError, match="does not fit this model") as caught:
        trainer.load_tensors({"other": torch.zeros(1)}, moments, step=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not fit"):
        trainer.load_tensors(model, {"exp_avg/unknown": torch.zeros(1)}, step=1)


def test_loaded_moments_get_the_layout_of_their_weights():
    """Fused AdamW pairs moments and channels-last weights by their place in memory."""
    from maskwise.engine.trainer import in_layout_of

    weight = torch.nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    stored = torch.arange(48.0).reshape(4, 3, 2, 2)
    loaded = in_layout_of(stored, weight)
    assert torch.equal(loaded, stored) and loaded.stride() == weight.stride() and not loaded.requires_grad
    step = torch.tensor(3.0)
    assert in_layout_of(step, weight) is step
