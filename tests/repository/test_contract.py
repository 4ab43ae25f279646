"""Public names: signatures, shapes and the semantics that external code relies on."""

import inspect

import pytest
import torch

import maskwise
from maskwise.engine.optim import LARS, clip_per_tensor_, ema_, parameter_groups
from maskwise.evaluation.knn import few_shot_indices, knn_classify
from maskwise.functional import losses, masks, schedules, targets
from maskwise.nn import POOLINGS, Backbone, Encoder, ProjectionHead, SimPool, Tokens

TINY = dict(image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def defaults(function) -> dict:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }


def build(method: str, pooling: str = "cls", **options):
    from maskwise.methods.masking import MASKINGS

    backbone = Backbone("vit_tiny_patch16_224", mask_token=method == "IBOT", drop_path=0.1, **TINY)
    encoder = Encoder(backbone, POOLINGS[pooling](backbone.dim))
    head = ProjectionHead(48, 32, hidden=32, bottleneck=16)
    if method == "IBOT":
        options["masking"] = MASKINGS["attmask_hint"]()
    return getattr(maskwise, method)(encoder, head, **options)


def test_top_level_names_exist():
    for name in (
        "load",
        "read_recipe",
        "train",
        "evaluate",
        "export",
        "push_to_hub",
        "Encoder",
        "Backbone",
        "DINO",
        "IBOT",
        "SimPool",
        "ProjectionHead",
    ):
        assert callable(getattr(maskwise, name)), name


def test_functional_signatures():
    assert parameters(masks.random_mask)[:2] == ["ratios", "grid"] and {"generator", "noise"} <= set(
        parameters(masks.random_mask)
    )
    assert parameters(masks.blockwise_mask)[:2] == ["ratios", "grid"] and {"generator", "noise"} <= set(
        parameters(masks.blockwise_mask)
    )
    assert parameters(masks.attention_mask)[:2] == ["attention", "ratio"]
    assert {"mode", "show_ratio", "show_max", "generator", "noise"} <= set(parameters(masks.attention_mask))
    assert defaults(masks.attention_mask)["show_max"] == 0.1
    assert parameters(losses.dino_loss) == [
        "student_logits",
        "teacher_logits",
        "center",
        "student_temp",
        "teacher_temp",
    ]
    assert parameters(losses.ibot_loss)[:6] == [
        "student_logits",
        "teacher_logits",
        "mask",
        "center",
        "student_temp",
        "teacher_temp",
    ]
    assert defaults(losses.dino_loss) == {"student_temp": 0.1, "teacher_temp": 0.04}
    assert parameters(targets.update_center) == ["center", "batch_mean", "momentum"] and defaults(
        targets.update_center
    ) == {"momentum": 0.9}
    assert parameters(targets.sinkhorn) == ["logits", "temp", "iterations", "all_sum"]
    assert parameters(schedules.cosine) == ["step", "total", "start", "end", "warmup", "warmup_start"]
    assert parameters(schedules.temperature) == ["epoch", "warm", "final", "warm_epochs", "hold"]


def test_functional_shapes():
    g = torch.Generator().manual_seed(0)
    ratios = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)
    for hidden in (masks.random_mask(ratios, (4, 5), generator=g), masks.blockwise_mask(ratios, (4, 5), generator=g)):
        assert hidden.shape == (3, 20) and hidden.dtype == torch.bool
    assert masks.random_mask(ratios, (4, 5), generator=g).sum(1).tolist() == [0, 6, 14]
    hidden = masks.attention_mask(
        torch.rand(3, 20, generator=g), 0.3, mode="hint", show_ratio=0.1, show_max=0.2, generator=g
    )
    assert hidden.shape == (3, 20) and hidden.sum(1).tolist() == [
        4,
        4,
        4,
    ]  # int(20 * .3) hidden, int(20 * .1) of the top 4 shown again
    student, teacher, center = torch.randn(4, 3, 8, generator=g), torch.randn(2, 3, 8, generator=g), torch.zeros(8)
    assert losses.dino_loss(student, teacher, center).shape == ()
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[1, 2] = mask[4, 0] = True
    assert losses.ibot_loss(torch.randn(2, 8), torch.randn(2, 8), mask, center).shape == ()
    assert targets.sinkhorn(torch.randn(5, 8), 0.05).sum(-1).allclose(torch.ones(5))


def test_nn_signatures():
    assert parameters(ProjectionHead)[:2] == ["dim", "prototypes"]
    expected = {
        "hidden": 2048,
        "bottleneck": 256,
        "layers": 3,
        "norm": None,
        "norm_last_layer": True,
        "patch_prototypes": None,
    }
    assert defaults(ProjectionHead) == expected
    assert {key: defaults(SimPool)[key] for key in ("gamma", "num_heads", "min_scope", "beta")} == {
        "gamma": 1.25,
        "num_heads": 1,
        "min_scope": "image",
        "beta": False,
    }
    assert {"image_size", "patch_size", "class_token", "position", "drop_path", "mask_token"} <= set(
        parameters(Backbone)
    )
    assert defaults(Backbone)["position"] == "offset"
    assert defaults(Encoder)["norm"] == "after"
    assert {"attention", "keys", "layers"} <= set(parameters(Encoder.forward))


@pytest.mark.parametrize("pooling", ["cls", "simpool"])
def test_encoder_shapes(pooling):
    backbone = Backbone("vit_tiny_patch16_224", mask_token=True, **TINY)
    tokens = backbone(torch.randn(2, 3, 32, 48))
    assert isinstance(tokens, Tokens) and tokens.patches.shape == (2, 24, 48) and tuple(tokens.grid) == (4, 6)
    encoder = Encoder(backbone, POOLINGS[pooling](48)).eval()
    features = encoder(torch.randn(2, 3, 32, 48))
    heads = 3 if pooling == "cls" else 1
    assert features.pooled.shape == (2, 48) and features.patches.shape == (2, 24, 48)
    assert features.attention.shape == (2, heads, 24) and tuple(features.grid) == (4, 6)
    hidden = torch.zeros(2, 24, dtype=torch.bool)
    hidden[0, :5] = True
    assert not torch.equal(
        encoder(torch.zeros(2, 3, 32, 48), hidden).pooled[0], encoder(torch.zeros(2, 3, 32, 48)).pooled[0]
    )
    assert encoder.transform(torch.zeros(3, 50, 40, dtype=torch.uint8)).shape == (3, 32, 32)
    assert len(encoder.mean) == len(encoder.std) == 3


def test_pooling_contract_and_needs():
    pooled = SimPool(48)(torch.randn(2, 48, 3, 5))
    assert pooled.vector.shape == (2, 48) and pooled.attention.shape == (2, 1, 15) and pooled.vectors is None
    assert POOLINGS["cls"].needs == {"cls_attention"}


@pytest.mark.parametrize("name", ["DINO", "IBOT"])
def test_method_returns_its_losses_and_updates_its_teacher_on_request(name):
    method = build(name)
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    ids = torch.arange(3)
    seen = method(torch.randn(6, 3, 32, 32), torch.randn(6, 3, 16, 16), step=0, epoch=0, sample_ids=ids)
    assert {"loss", "cls", "patch"} <= set(seen) and seen["loss"].requires_grad and not seen["cls"].requires_grad
    assert all(torch.equal(value, before[key]) for key, value in method.teacher.state_dict().items())
    seen["loss"].backward()
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1.0)
    method.update_teacher(0.5)
    name, moved = next(iter(method.teacher.named_parameters()))
    assert torch.allclose(moved, before[name] + 0.5)


def test_optim_and_knn():
    assert parameters(clip_per_tensor_) == ["parameters", "max_norm"] and parameters(ema_)[:3] == [
        "teacher",
        "student",
        "momentum",
    ]
    assert issubclass(LARS, torch.optim.Optimizer) and len(parameter_groups(build("DINO"))) == 2
    assert parameters(knn_classify) == ["bank", "bank_labels", "queries", "k", "temperature", "num_classes"]
    ranking = knn_classify(torch.eye(3), torch.tensor([2, 0, 1]), torch.eye(3), 1, num_classes=5)
    assert ranking.tolist() == [[2, 0, 1, 3, 4], [0, 1, 2, 3, 4], [1, 0, 2, 3, 4]]
    assert few_shot_indices(torch.tensor([0, 1, 0, 1, 0]), 1, 1).tolist() == [2, 3]


def test_trainer_built_from_a_recipe_takes_one_step():
    from maskwise import build as root

    trainer = root.trainer(maskwise.read_recipe("debug/tiny"))
    seen = trainer.step(torch.randn(16, 3, 32, 32), torch.randn(16, 3, 16, 16))
    assert trainer.step_index == 1 and torch.isfinite(seen["loss"])
