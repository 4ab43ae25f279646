"""Optimizers, parameter groups, clipping and EMA against numbers of the released code."""

import copy

import pytest
import torch
from torch import nn

from maskwise.engine import optim
from maskwise.errors import UserError

BAD = torch.tensor(1.0)


def weight(values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_lars_moves_a_matrix_by_its_trust_ratio():
    matrix = weight([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    start = matrix.detach().clone()
    lars = optim.LARS([matrix], lr=0.1, weight_decay=0.01)
    matrix.grad = start / 10
    lars.step()
    torch.testing.assert_close(matrix.detach(), start * 0.9999, rtol=1e-12, atol=0)
    lars.step()
    assert matrix[0, 0].item() == pytest.approx(0.99971001, abs=5e-9)
    assert list(lars.state[matrix]) == ["mu"]


def test_lars_moves_a_vector_by_its_plain_gradient():
    vector = weight([0.5, -0.5, 1.0])
    lars = optim.LARS([vector], lr=0.1, weight_decay=0.01)
    vector.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    lars.step()
    torch.testing.assert_close(vector.detach(), torch.tensor([0.4, -0.7, 0.7], dtype=torch.float64))
    lars.step()
    torch.testing.assert_close(vector.detach(), torch.tensor([0.21, -1.08, 0.13], dtype=torch.float64))


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_lars_with_a_zero_norm_takes_the_plain_step(zero):
    matrix = weight([[0.0, 0.0]] if zero == "weight" else [[1.0, 2.0]])
    matrix.grad = torch.ones_like(matrix) if zero == "weight" else torch.zeros_like(matrix)
    expected = matrix.detach() - 0.1 * matrix.grad
    optim.LARS([matrix], lr=0.1).step()
    assert torch.equal(matrix.detach(), expected)


def test_sgd_equals_torch_without_nesterov():
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(3, 2).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    pair = [
        optim.make_optimizer("sgd", optim.parameter_groups(ours), lr=0.1),
        torch.optim.SGD(
            [{"params": [theirs.weight], "weight_decay": 0.04}, {"params": [theirs.bias]}], lr=0.1, momentum=0.9
        ),
    ]
    pair[0].param_groups[0]["weight_decay"] = 0.04
    for _ in range(3):
        x = torch.randn(4, 3, dtype=torch.float64)
        for model, optimizer in zip((ours, theirs), pair):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_non_finite_step_changes_nothing_and_the_next_step_is_correct(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    optimizers = [optim.make_optimizer(name, optim.parameter_groups(m), lr=0.1) for m in (model, twin)]
    start = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizers[0].found_inf = BAD
    optimizers[0].step()
    assert all(torch.equal(value, start[key]) for key, value in model.state_dict().items())
    optimizers[0].found_inf = 1 - BAD
    for m, optimizer in zip((model, twin), optimizers):
        for parameter in m.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_adamw_uses_torch_defaults_and_is_fused():
    optimizer = optim.make_optimizer("adamw", optim.parameter_groups(nn.Linear(2, 2)))
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["eps"] == 1e-8
    assert optimizer.defaults["fused"]
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_unknown_optimizer_is_an_error_listing_the_choices():
    with pytest.raises(UserError, match="adamw, sgd, lars"):
        optim.make_optimizer("adam", optim.parameter_groups(nn.Linear(2, 2)))


class Tokens(nn.Module):
    """One parameter of each kind that the weight-decay rule distinguishes."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 4))
        self.weight_g = nn.Parameter(torch.ones(8, 1))
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv2d(3, 4, 2)
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)


def test_tokens_and_position_tables_are_decayed_biases_and_norms_are_not():
    decayed, undecayed = optim.parameter_groups(Tokens())
    assert decayed["names"] == ["cls_token", "pos_embed", "mask_token", "weight_g", "conv.weight"]
    assert undecayed["names"] == ["norm.weight", "norm.bias", "conv.bias"]
    assert decayed["weight_decay_on"] and not undecayed["weight_decay_on"]


def test_two_dimensional_bias_is_not_decayed():
    module = nn.Module()
    module.inner = nn.Module()
    module.inner.bias = nn.Parameter(torch.zeros(2, 2))
    assert optim.parameter_groups(module)[1]["names"] == ["inner.bias"]


def test_parameter_outside_every_group_is_named():
    module = Tokens()
    groups = optim.parameter_groups(module)
    optim.check_groups(module, groups)
    module.late = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="late"):
        optim.check_groups(module, groups)


def test_frozen_model_is_an_error():
    with pytest.raises(UserError, match="frozen"):
        optim.parameter_groups(nn.Linear(2, 2).requires_grad_(False))


def gradients(*values):
    parameters = [nn.Parameter(torch.zeros(len(value), dtype=torch.float64)) for value in values]
    for parameter, value in zip(parameters, values):
        parameter.grad = torch.tensor(value, dtype=torch.float64)
    return parameters


def test_each_tensor_is_clipped_by_its_own_norm():
    parameters = gradients([3.0, 4.0], [0.6, 0.8], [18.0, 24.0])
    norms = optim.clip_per_tensor_([*parameters, nn.Parameter(torch.zeros(1))], 3.0)
    assert norms.tolist() == pytest.approx([5.0, 1.0, 30.0])
    assert parameters[0].grad.tolist() == pytest.approx([1.79999964, 2.39999952], abs=5e-9)
    assert parameters[1].grad.tolist() == [0.6, 0.8]
    assert [p.grad.norm().item() for p in parameters] == pytest.approx([3.0, 1.0, 3.0], abs=1e-6)


def test_global_clip_scales_all_tensors_by_one_factor():
    parameters = gradients([3.0, 4.0], [12.0])
    assert optim.clip_global_(parameters, 6.5).item() == pytest.approx(13.0)
    assert parameters[0].grad.tolist() == pytest.approx([1.5, 2.0], rel=1e-6)
    assert parameters[1].grad.tolist() == pytest.approx([6.0], rel=1e-6)


def test_ema_updates_parameters_by_name_and_no_buffers():
    torch.manual_seed(0)
    teacher, student = (nn.BatchNorm1d(4) for _ in range(2))
    nn.init.normal_(student.weight)
    student.running_mean.fill_(7.0)
    expected = 0.9 * teacher.weight + 0.1 * student.weight
    optim.ema_(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, expected, rtol=0, atol=3e-7)
    assert torch.equal(teacher.running_mean, torch.zeros(4))


def test_ema_follows_the_finite_flag_on_the_device():
    student = [torch.randn(3, dtype=torch.float64) for _ in range(2)]
    expected, finite, non_finite = ([torch.ones(3, dtype=torch.float64) for _ in range(2)] for _ in range(3))
    optim.ema_(expected, student, 0.996)
    optim.ema_(finite, student, 0.996, torch.tensor(True))
    optim.ema_(non_finite, student, 0.996, torch.tensor(False))
    torch.testing.assert_close(finite, expected, rtol=1e-14, atol=0)
    assert all(torch.equal(tensor, torch.ones(3, dtype=torch.float64)) for tensor in non_finite)


def test_ema_requires_equal_names_except_the_mask_token():
    teacher, student = torch.zeros(1), torch.ones(1)
    optim.ema_({"a": teacher}, {"a": student, "backbone.mask_token": student}, 0.5)
    assert teacher.item() == 0.5
    with pytest.raises(ValueError, match="differ"):
        optim.ema_({"a": teacher}, {"a": student, "b": student}, 0.5)
    with pytest.raises(ValueError, match="differ"):
        optim.ema_({"mask_token": teacher}, {}, 0.5)
