"""Packed, checkpointed and plain blocks give the same tokens and gradients."""

import pytest
import torch
from torch.nn import functional as F

from maskwise.nn import CLS, Backbone, Encoder, SimPool
from maskwise.nn.backbones import varlen_attention

TINY = dict(image_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, mask_token=True, drop_path=0.5)


def encoder(pooling=CLS, **options):
    torch.manual_seed(0)
    backbone = Backbone("vit_tiny_patch16_224", class_token=pooling is CLS, **TINY, **options)
    return Encoder(backbone, pooling(24)).double().train()


def batches():
    generator = torch.Generator().manual_seed(1)
    globals_, locals_ = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3, 32, 32), (6, 3, 16, 16))
    )
    mask = torch.rand(4, 16, generator=generator) < 0.3
    return [(globals_, mask, torch.arange(4)), (locals_, None, torch.arange(6) + 50)]


def outcome(model, features):
    loss = sum((i + 1) * (f.pooled.sin().sum() + f.patches.cos().sum()) for i, f in enumerate(features))
    names, leaves = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    return [t for f in features for t in (f.pooled, f.patches)], dict(zip(names, torch.autograd.grad(loss, leaves)))


def test_checkpointing_changes_nothing_in_eva():
    torch.manual_seed(0)
    eva = (
        Backbone(
            "eva02_tiny_patch14_224", image_size=28, patch_size=7, embed_dim=24, depth=2, num_heads=2, drop_path=0.2
        )
        .double()
        .train()
    )
    images, key = torch.randn(3, 3, 28, 28, dtype=torch.float64), torch.arange(3)
    assert not eva.supports_packing(images)
    results = []
    for checkpointing in ("none", "elementwise", "blocks"):
        eva.set_execution(checkpointing=checkpointing)
        tokens = eva(images, drop_key=key)
        leaves = list(eva.blocks.parameters())
        results.append([tokens.patches, *torch.autograd.grad(tokens.patches.sin().sum(), leaves)])
    torch.testing.assert_close(results[1:], [results[0]] * 2, rtol=1e-12, atol=1e-13)


def run_separately(model):
    return [model(images, mask, attention=False, drop_key=key) for images, mask, key in batches()]


@pytest.mark.parametrize("pooling", [CLS, SimPool])
@pytest.mark.parametrize("kernel", ["each size", "packed"])
def test_packed_crops_of_two_sizes_equal_separate_ones(pooling, kernel, monkeypatch):
    model = encoder(pooling)
    expected = outcome(model, run_separately(model))
    if kernel == "packed":  # the CPU has no such kernel: replace it by an explicit loop
        monkeypatch.setattr(varlen_attention, "is_supported", lambda device, dtype: True)
        monkeypatch.setattr(varlen_attention, "kernel", lambda: explicit_varlen_attention)
    assert model.supports_packing(batches()[0][0]) == (kernel == "packed")
    packed = outcome(model, model.forward_packed(batches()))
    torch.testing.assert_close(packed, expected, rtol=1e-10, atol=1e-11)


def explicit_varlen_attention(q, k, v, ends_q, ends_k, max_q, max_k, *, scale):
    assert torch.equal(ends_q, ends_k) and ends_q.dtype == torch.int32 and int(ends_q.diff().max()) == max_q == max_k
    parts = [
        tuple(tensor[a:b].transpose(0, 1) for tensor in (q, k, v))
        for a, b in zip(ends_q[:-1].tolist(), ends_q[1:].tolist())
    ]
    return torch.cat([F.scaled_dot_product_attention(*part, scale=scale).transpose(0, 1) for part in parts])


@pytest.mark.parametrize("kind", ["elementwise", "blocks"])
def test_checkpointing_changes_memory_only(kind):
    model = encoder(qk_norm=True, init_values=0.5)
    saved = {}

    def count(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    results = []
    for checkpointing in ("none", kind):
        model.backbone.set_execution(checkpointing=checkpointing)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            features = run_separately(model)
        results.append((outcome(model, features), sum(saved.values())))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-12, atol=1e-13)
    assert results[1][1] < (0.8 if kind == "elementwise" else 0.5) * results[0][1]


def test_checkpointed_blocks_return_cls_attention_keys_and_stages():
    model = encoder()
    images = batches()[0][0]
    plain = model.backbone(images, attention=True, keys=True, layers=(0, -1), drop_key=torch.arange(4))
    model.backbone.set_execution(checkpointing="blocks")
    other = model.backbone(images, attention=True, keys=True, layers=(0, -1), drop_key=torch.arange(4))
    for name in ("patches", "cls_attention", "keys", "stages"):
        torch.testing.assert_close(getattr(other, name), getattr(plain, name), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_two_hundred_steps_compile_at_most_three_graphs():
    from torch._dynamo.utils import counters

    from maskwise.distributed.world import World
    from maskwise.engine.optim import make_optimizer, parameter_groups
    from maskwise.engine.trainer import Schedules, Trainer
    from support.tiny_networks import LOCAL, SIZE, crops, method

    assert (SIZE, LOCAL) == (16, 8)
    plain, compiled = (method(drop_path=0.1, dtype=torch.float32, pad_multiple=16) for _ in range(2))
    for network in (compiled.student, compiled.teacher):
        network.encoder.backbone.set_execution(compiled=True)
    trainers = [
        Trainer(
            made,
            optimizer=make_optimizer("adamw", parameter_groups(made)),
            world=World(),
            schedules=Schedules(
                lr=lambda step: 1e-3,
                weight_decay=lambda step: 0.04,
                momentum=lambda step: 0.9,
                steps_per_epoch=50,
                total_steps=200,
            ),
        )
        for made in (plain, compiled)
    ]
    torch._dynamo.reset()
    counters.clear()
    shares = set()
    for step in range(200):
        metrics = trainers[1].step(*crops(dtype=torch.float32, seed=step))
        shares.add(float(metrics["mask_share"]))
        if step < 3:
            torch.testing.assert_close(
                trainers[0].step(*crops(dtype=torch.float32, seed=step))["loss"], metrics["loss"], rtol=1e-5, atol=1e-5
            )
    assert len(shares) > 3, "the number of masked patches must vary"
    assert 0 < counters["stats"]["unique_graphs"] <= 3
