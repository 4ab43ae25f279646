"""Projection head: parameter counts, cosines, separate last layers."""

import copy

import pytest
import torch
import torch.nn.functional as F

from maskwise.errors import UserError
from maskwise.nn import ProjectionHead


def head(**options):
    torch.manual_seed(0)
    return ProjectionHead(12, 20, **{"hidden": 16, "bottleneck": 8, **options})


def count(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in ProjectionHead(384, **options).parameters())


def test_parameter_counts_match_the_papers():
    assert count(prototypes=65536) == 22_352_128
    assert count(prototypes=8192) == 7_614_720
    assert count(prototypes=8192, patch_prototypes=8192) == 9_720_064


def test_state_dict_keys_match_dino_checkpoints():
    keys = set(head(patch_prototypes=5).state_dict())
    assert {
        "mlp.0.weight",
        "mlp.2.bias",
        "mlp.4.weight",
        "last_layer.weight_g",
        "last_layer.weight_v",
        "last_layer2.weight_g",
    } <= keys
    batch = head(norm="batch").state_dict()
    assert {"mlp.0.weight", "mlp.1.running_mean", "mlp.3.weight", "mlp.4.running_mean", "mlp.6.weight"} <= set(batch)
    assert batch["mlp.6.weight"].shape == (8, 16)
    assert head().last_layer.weight_g.shape == (20, 1) and head().last_layer.weight_v.shape == (20, 8)


def test_initial_logits_are_cosines():
    h, x = head().double(), torch.randn(6, 12, dtype=torch.float64)
    z = h.embed(x)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(h(x), z @ F.normalize(h.last_layer.weight_v, dim=1).T, atol=1e-9, rtol=0)
    assert h(x).abs().max() <= 1 + 1e-9


def test_initialization():
    torch.manual_seed(0)
    h = ProjectionHead(384, 1024)
    for i in (0, 2, 4):
        assert h.mlp[i].weight.std().item() == pytest.approx(0.02, rel=0.02) and h.mlp[i].bias.eq(0).all()
    v = h.last_layer.weight_v
    assert v.abs().max() <= 1 / 16 and v.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.02)
    assert h.last_layer.weight_g.eq(1).all()


def test_norm_last_layer_freezes_the_gains():
    assert (
        not head().last_layer.weight_g.requires_grad and not head(patch_prototypes=5).last_layer2.weight_g.requires_grad
    )
    assert head(norm_last_layer=False).last_layer.weight_g.requires_grad
    h = head(norm_last_layer=False)
    with torch.no_grad():
        h.last_layer.weight_g.mul_(3)
    x = torch.randn(4, 12)
    torch.testing.assert_close(h(x), 3 * head()(x))


def test_patch_prototypes_add_a_last_layer_for_patches():
    z = head().embed(torch.randn(3, 5, 12))
    assert z.shape == (3, 5, 8)
    assert torch.equal(head().classify(z), head().classify_patches(z))
    separate = head(patch_prototypes=7)
    assert separate.classify_patches(z).shape == (3, 5, 7)
    assert separate.prototypes == 20 and separate.patch_prototypes == 7


def test_mean_logits_equal_logits_of_the_mean_bottleneck():
    h, x = head(patch_prototypes=7), torch.randn(50, 12)
    torch.testing.assert_close(
        h.classify_patches(h.embed(x)).mean(0), h.classify_patches(h.embed(x).mean(0)), atol=1e-6, rtol=0
    )


def test_an_empty_patch_batch_gives_zero_gradients():
    h = head(patch_prototypes=7)
    h.classify_patches(h.embed(torch.zeros(0, 12))).sum().backward()
    assert h.last_layer2.weight_v.grad.eq(0).all() and h.mlp[0].weight.grad.eq(0).all()


def test_copies_work_and_bottlenecks_are_float32_under_autocast():
    h, x = copy.deepcopy(head()), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        z = h.embed(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"layers": 0}])
def test_wrong_arguments(options):
    with pytest.raises(UserError, match="head."):
        head(**options)


def test_one_layer_and_zero_input():
    assert [type(m).__name__ for m in head(layers=1).mlp] == ["Linear"]
    x = torch.zeros(2, 12, requires_grad=True)
    head()(x).sum().backward()
    assert x.grad.isfinite().all()
