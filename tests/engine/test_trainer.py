"""One step: schedules, guard, clip, frozen last layer, state."""

import copy

import pytest
import torch
from engine.tiny_method import IMAGES, crops, trainer

from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import heeds_found_inf
from maskwise.functional.errors import UserError


def state(it):
    model, moments = it.tensors()
    return {key: value.clone() for key, value in {**model, **moments}.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_first_step_has_rate_zero_and_moves_only_the_center():
    it = trainer()
    before = state(it)
    seen = it.step(*crops(0))
    after = state(it)
    assert not any(value.requires_grad for value in seen.values())
    assert all(torch.equal(before[key], after[key]) for key in before if key != "center")
    assert not torch.equal(before["center"], after["center"])
    it.step(*crops(1))
    assert not torch.equal(it.method.student.encoder.trunk.weight, before["student.encoder.trunk.weight"])


def test_rates_and_decay_follow_the_schedules_and_decay_stays_off_in_its_group():
    it = trainer()
    for step in range(3):
        it.step(*crops(step))
        decayed, plain = it.optimizer.param_groups
        assert decayed["lr"] == plain["lr"] == it.lr(step)
        assert decayed["weight_decay"] == it.weight_decay(step) and plain["weight_decay"] == 0
    assert (it.step_index, it.epoch) == (3, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("at", [0, 5])
def test_a_bad_batch_touches_nothing(optimizer, norm, at):
    it = trainer(optimizer=optimizer, norm=norm)
    for step in range(at):
        it.step(*crops(step))
    before = state(it)
    bad, local = crops(at)
    bad[1, 0, 0, 0] = float("nan")
    seen = it.step(bad, local)
    assert not seen["ok"] and same(before, state(it))
    assert int(it.skipped) == 1 and it.step_index == at + 1
    assert it.step(*crops(at + 1))["ok"] and int(it.skipped_in_a_row) == 0
    assert all(torch.isfinite(value).all() for value in state(it).values())


def test_a_gradient_that_is_not_finite_is_caught_though_the_loss_is():
    it = trainer()
    it.step(*crops(0))
    before = state(it)
    it.method.student.encoder.trunk.weight.register_hook(lambda gradient: gradient * float("inf"))
    seen = it.step(*crops(1))
    assert torch.isfinite(seen["loss"]) and not seen["ok"] and same(before, state(it))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_the_way_of_the_device_equals_the_way_of_the_host(name):
    layer = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(name, parameter_groups(layer), lr=0.1)
    assert heeds_found_inf(optimizer)
    other = copy.deepcopy(layer)
    plain = make_optimizer(name, parameter_groups(other), lr=0.1)
    for ok in (False, True, False, True):
        for parameter, twin in zip(layer.parameters(), other.parameters()):
            parameter.grad = torch.full_like(parameter, 0.5 if ok else float("nan"))
            twin.grad = torch.full_like(twin, 0.5)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(0.0 if ok else 1.0)
        optimizer.step()
        if ok:
            plain.step()
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters()))


def test_an_optimizer_from_elsewhere_is_guarded_by_the_host():
    assert not heeds_found_inf(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))


def test_the_last_layer_is_held_for_its_epochs():
    it = trainer(steps_per_epoch=4, freeze_last_layer=1)
    key = "student.head.last_layer.weight"
    first = it.method.state_dict()[key].clone()
    for step in range(4):
        it.step(*crops(step))
        assert torch.equal(it.method.state_dict()[key], first)
        assert not any(key in name for name in it.tensors()[1])
    it.step(*crops(4))
    assert not torch.equal(it.method.state_dict()[key], first)
    assert any(key in name for name in it.tensors()[1])


def test_clipping_is_per_tensor_unless_told():
    per_tensor, together, off = (trainer(clip=clip, clip_mode=mode) for clip, mode in ((1e-3, "tensor"), (1e-3, "global"), (None, "tensor")))
    norms = {}
    for name, it in (("tensor", per_tensor), ("global", together), ("off", off)):
        it.step(*crops(0))
        norms[name] = torch.stack([p.grad.norm() for p in it.parameters if p.grad is not None])
    assert torch.allclose(norms["tensor"], norms["off"].clamp(max=1e-3), rtol=1e-2)
    assert norms["global"].norm() <= 1e-3
    with pytest.raises(AssertionError):
        assert torch.allclose(norms["tensor"], norms["global"])


def test_uint8_crops_are_normalised_on_the_way():
    one, two = trainer(), trainer()
    raw = torch.randint(0, 256, (2 * IMAGES, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(one.step(raw)["loss"], two.step((raw.float() / 255 - 0.5) / 0.25)["loss"])


def test_bf16_keeps_weights_in_float32():
    it = trainer(precision="bf16")
    for step in range(3):
        assert it.step(*crops(step))["ok"]
    assert {p.dtype for p in it.parameters} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_state_round_trip_continues_bit_for_bit(optimizer):
    one, two = trainer(optimizer=optimizer), trainer(optimizer=optimizer)
    for step in range(6):
        one.step(*crops(step))
    model, moments = one.tensors()
    copied = [{key: value.clone() for key, value in part.items()} for part in (model, moments)]
    two.step(*crops(99))
    two.load_tensors(*copied, step=6)
    for step in range(6, 9):
        one.step(*crops(step)), two.step(*crops(step))
    assert same(state(one), state(two))


def test_moments_carry_parameter_names():
    it = trainer(freeze_last_layer=0)
    it.step(*crops(0))
    names = {key.split("/", 1)[1] for key in it.tensors()[1]}
    assert names == {name for name, parameter in it.method.named_parameters() if parameter.requires_grad}


def test_a_checkpoint_of_another_model_is_refused_in_one_line():
    it = trainer()
    model, moments = it.tensors()
    with pytest.raises(UserError, match="does not fit this model") as caught:
        it.load_tensors({"other": torch.zeros(1)}, moments, step=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not fit"):
        it.load_tensors(model, {"exp_avg/nobody": torch.zeros(1)}, step=1)
