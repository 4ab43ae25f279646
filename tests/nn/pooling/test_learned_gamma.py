"""SimPool's learned exponent: gradient, bounds, learning rate, checkpoints and exports (SimPool, appendix C.4)."""

import os
import signal

import pytest
import torch

import maskwise
from maskwise.engine.optim import check_groups, make_optimizer, parameter_groups
from maskwise.engine.trainer import Trainer
from maskwise.errors import UserError
from maskwise.export import convert, load
from maskwise.nn import Backbone, Encoder, SimPool
from maskwise.nn.pooling.learned_gamma import GAMMA_MIN
from maskwise.recipe.reading import read_recipe
from support.run_contents import tensors

DIM = 6


def pooling_and_patches(**options):
    torch.manual_seed(0)
    pooling = SimPool(DIM, **{"gamma": 1.75, "learn_gamma": True, **options}).double()
    with torch.no_grad():
        for name, parameter in pooling.named_parameters():
            if name != "exponent":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return pooling, torch.randn(3, 7, DIM, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_heads": 2, "beta": True}, {"iterations": 2}, {"k": 2, "reduce": "mean"}, {"gamma_max": 5.0}],
    ids=str,
)
def test_gradient_is_that_of_finite_differences(options):
    pooling, x = pooling_and_patches(**options)
    weigh = torch.randn(3, DIM, dtype=torch.float64)
    (pooling(x).vector * weigh).sum().backward()

    def fixed(gamma):
        fixed_gamma = SimPool(
            DIM, **{key: value for key, value in options.items() if key != "gamma_max"}, gamma=gamma
        ).double()
        fixed_gamma.load_state_dict({key: value for key, value in pooling.state_dict().items() if key != "exponent"})
        with torch.no_grad():
            return (fixed_gamma(x).vector * weigh).sum().item()

    step = 1e-5
    assert pooling.exponent.grad.item() == pytest.approx(
        (fixed(1.75 + step) - fixed(1.75 - step)) / (2 * step), rel=1e-6
    )
    assert (pooling(x).vector * weigh).sum().item() == pytest.approx(
        fixed(1.75), abs=1e-12
    )  # the value equals that of the same exponent, fixed


@pytest.mark.parametrize(
    "weight, clamped, outward", [(9.0, 5.0, -1.0), (5.0, 5.0, -1.0), (0.01, GAMMA_MIN, 1.0), (-3.0, GAMMA_MIN, 1.0)]
)
def test_beyond_a_bound_gradients_lead_back(weight, clamped, outward):
    pooling, x = pooling_and_patches(gamma_max=5.0)
    with torch.no_grad():
        pooling.exponent.fill_(weight)
    assert pooling.current_gamma(torch.float64).item() == clamped and pooling(x).vector.isfinite().all()
    for sign in (outward, -outward):
        (gradient,) = torch.autograd.grad(sign * pooling.current_gamma(torch.float64).sum(), pooling.exponent)
        assert gradient.item() == (0 if sign == outward else sign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [GAMMA_MIN, 1.25, 40.0])
def test_gradients_are_finite_over_channels_of_zeros(dtype, weight):
    torch.manual_seed(0)
    pooling = SimPool(DIM, gamma=2.0, learn_gamma=True, layer_norm="k").to(dtype)  # raw values: the channel stays zero
    with torch.no_grad():
        pooling.exponent.fill_(weight)
    x = torch.randn(3, 7, DIM).relu()
    x[..., 2] = 0
    x = x.to(dtype).requires_grad_()
    pooling(x).vector.square().sum().backward()
    assert x.grad.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in pooling.parameters())


def test_constant_by_default():
    assert (
        "exponent" not in SimPool(DIM).state_dict()
        and SimPool(DIM, gamma=None).current_gamma(torch.float32) is None
        and SimPool(DIM).current_gamma(torch.float32) == 1.25
    )
    assert list(SimPool(DIM, learn_gamma=True).state_dict()) == ["exponent", *SimPool(DIM).state_dict()]


def test_gamma_is_fitted_to_a_target():
    """Fit the output of gamma 3 by gamma alone."""
    pooling, x = pooling_and_patches()
    target = SimPool(DIM, gamma=3.0).double()
    target.load_state_dict({key: value for key, value in pooling.state_dict().items() if key != "exponent"})
    optimizer = torch.optim.Adam([pooling.exponent], lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        (pooling(x).vector - target(x).vector.detach()).square().sum().backward()
        optimizer.step()
    assert pooling.exponent.item() == pytest.approx(3.0, abs=0.2)


def test_parameter_group_of_gamma():
    module = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), SimPool(DIM, learn_gamma=True, gamma_lr=0.1))
    decayed, plain, slow = groups = parameter_groups(module)
    check_groups(module, groups)
    assert (
        slow["names"] == ["1.exponent"]
        and slow["lr_factor"] == 0.1
        and not slow["weight_decay_on"]
        and slow["weight_decay"] == 0
    )
    assert "lr_factor" not in decayed and "lr_factor" not in plain
    same = parameter_groups(torch.nn.Sequential(torch.nn.Linear(DIM, DIM), SimPool(DIM, learn_gamma=True)))
    assert len(same) == 2 and same[1]["names"] == [
        "0.bias",
        "1.exponent",
        "1.norm_patches.weight",
        "1.norm_patches.bias",
    ]
    for name in ("adamw", "sgd", "lars", "lamb"):
        assert make_optimizer(name, parameter_groups(module)).param_groups[2]["lr_factor"] == 0.1


TINY = (
    "data.count=16",
    "train.epochs=1",
    "train.steps=3",
    "evaluate.pictures_every=0",
    "evaluate.knn_every=0",
    "pooling=simpool",
    "pooling.gamma=2",
    "pooling.learn_gamma=true",
    "optimizer.warmup_epochs=0",
    "train.save_every=1",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train two runs of three steps that differ in the factor on gamma's learning rate."""
    root = tmp_path_factory.mktemp("runs")
    for factor in (1.0, 0.1):
        assert maskwise.train(recipe(factor), out=root / str(factor), quiet=True)["status"] == "complete"
    return root


def recipe(factor):
    return read_recipe("debug/tiny", *TINY, f"pooling.gamma_lr={factor}", "teacher.momentum=0.5", "pooling.gamma_max=5")


@pytest.mark.slow
def test_student_and_teacher_learn_gamma_at_its_rate(runs):
    moved = {}
    for factor in (1.0, 0.1):
        student, teacher = (
            tensors(runs / str(factor))[f"model/{role}.encoder.pooling.exponent"].item()
            for role in ("student", "teacher")
        )
        assert student != 2 and abs(teacher - 2) < abs(student - 2) and teacher != 2
        moved[factor] = abs(student - 2)
    assert moved[0.1] == pytest.approx(0.1 * moved[1.0], rel=0.2)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(runs, tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(trainer, *arguments, **options):
        if trainer.step_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert maskwise.train(recipe(0.1), out=tmp_path / "parts", quiet=True)["status"] == "preempted"
    assert maskwise.train(recipe(0.1), out=tmp_path / "parts", quiet=True)["status"] == "complete"
    whole, parts = tensors(runs / "0.1"), tensors(tmp_path / "parts")
    assert "optimizer/exp_avg/student.encoder.pooling.exponent" in whole and whole.keys() == parts.keys()
    assert not [key for key in whole if not torch.equal(whole[key], parts[key])]


@pytest.mark.slow
def test_export_and_load(runs, tmp_path):
    maskwise.export(runs / "1.0", tmp_path / "out", say=None)
    run, out = maskwise.load(runs / "1.0"), load.load(tmp_path / "out")
    images = torch.randn(2, 3, *run.image_size)
    assert out.pooling.exponent.item() == run.pooling.exponent.item() != 2 and out.pooling.gamma_options.gamma_max == 5
    with torch.no_grad():
        assert torch.equal(out(images).pooled, run(images).pooled)
    with pytest.raises(UserError, match="one of this encoder's weights"):
        maskwise.load(tmp_path / "out", gamma=2.0)


def test_a_research_file_cannot_hold_it(tmp_path):
    backbone = Backbone(
        "vit_tiny_patch16_224", image_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=3, class_token=False
    )
    encoder = Encoder(backbone, SimPool(12, gamma=2.5, learn_gamma=True)).eval()
    maskwise.export(encoder, tmp_path / "out", say=None)
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(maskwise.load(tmp_path / "out")(images).pooled, encoder(images).pooled)
    with pytest.raises(
        UserError, match="has pooling.exponent, which the DINO family's SimPool lacks: export it as a folder"
    ):
        convert.convert(tmp_path / "out", tmp_path / "x.pth", layout="simpool")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gamma": None, "learn_gamma": True}, "gamma=None is outside the bounds of a learned gamma"),
        ({"gamma": 0.05, "learn_gamma": True}, "choose 0.1 or more, such as 2"),
        ({"gamma": 6.0, "learn_gamma": True, "gamma_max": 5.0}, "from 0.1 to gamma_max=5.0"),
        ({"gamma_max": 5.0}, "learn_gamma is false"),
        ({"gamma_lr": 0.1}, "learn_gamma is false"),
        ({"learn_gamma": True, "gamma_lr": 0.0}, "gamma_lr=0.0 is not above 0"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(UserError, match=words):
        SimPool(DIM, **options)
