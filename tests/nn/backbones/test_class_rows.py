"""A last block for the class token alone equals the whole block: features, attention, keys, losses and gradients."""

import pytest
import torch
from torch.nn import functional as F

from maskwise.bench import parts
from maskwise.methods.masking import MASKINGS
from maskwise.nn import CLS, Backbone, Encoder, SimPool
from maskwise.nn.backbones import varlen_attention
from maskwise.nn.backbones.transformer import set_token_dropout_
from support.tiny_networks import crops, method

SIZES = dict(image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
VIT = dict(SIZES, mask_token=True, drop_path=0.5)
EVA = dict(SIZES, drop_path=0.5, num_reg_tokens=2)
VARIANTS = {
    "plain": ("vit_tiny_patch16_224", VIT),
    "registers, layer scale, norms of q and k": (
        "vit_tiny_patch16_224",
        dict(VIT, reg_tokens=3, init_values=0.5, qk_norm=True, qkv_bias=False),
    ),
    "attention norm": ("vit_tiny_patch16_224", dict(VIT, scale_attn_norm=True)),
    "rotation": ("eva02_tiny_patch14_224", EVA),
    "rotation, split projections": ("eva02_tiny_patch14_224", dict(EVA, qkv_fused=False, scale_attn_inner=True)),
    "norms after the branches": ("eva02_tiny_patch14_224", dict(EVA, use_post_norm=True)),
}


def encoder(variant="plain", pooling=CLS, norm="after"):
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    model = Encoder(Backbone(name, class_token=pooling is CLS, **options), pooling(24), norm).double().train()
    for parameter in model.parameters():  # no zeros: every bias, gain and token matters
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(size=32, count=3):
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.rand(count, (size // 8) ** 2, generator=generator) < 0.3, torch.arange(count) + size


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], materialize_grads=True)


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", ["after", "before"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_class_token_attention_keys_and_gradients_are_those_of_the_whole_block(variant, norm):
    model = encoder(variant, norm=norm)
    images, mask, key = batch()
    mask = mask if model.backbone.has_mask_token else None
    whole, rows = (model(images, mask, keys=True, drop_key=key, patches=patches) for patches in (True, False))
    assert whole.patches.shape == (3, 16, 24) and rows.patches.shape == (3, 0, 24) and rows.grid == (4, 4)
    for name in ("pooled", "attention", "keys"):
        equal(getattr(rows, name), getattr(whole, name))
    losses = [(f.pooled.sin().sum() + f.keys.cos().sum() + f.attention.square().sum()) for f in (rows, whole)]
    equal(*(gradients(model, loss) for loss in losses))


@pytest.mark.parametrize("kind", ["elementwise", "blocks"])
@pytest.mark.parametrize("variant", ["registers, layer scale, norms of q and k", "rotation"])
def test_recomputation_keeps_it(variant, kind):
    model = encoder(variant)
    images, _, key = batch()
    results = []
    for checkpointing, patches in (("none", True), (kind, False)):
        model.backbone.set_execution(checkpointing=checkpointing)
        pooled = model(images, attention=False, drop_key=key, patches=patches).pooled
        results.append([pooled, *gradients(model, pooled.sin().sum())])
    equal(*results)


@pytest.mark.parametrize("kernel", ["each size", "packed"])
@pytest.mark.parametrize("patches", [(True, False), (False, False)])
def test_packed_batches_keep_the_patches_that_are_used(patches, kernel, monkeypatch):
    model = encoder("registers, layer scale, norms of q and k")
    batches = [batch(), (batch(16, 5)[0], None, batch(16, 5)[2])]
    separate = [model(images, mask, attention=False, drop_key=key) for images, mask, key in batches]
    if kernel == "packed":  # the CPU has no such kernel: replace it by an explicit loop
        monkeypatch.setattr(varlen_attention, "is_supported", lambda device, dtype: True)
        monkeypatch.setattr(varlen_attention, "kernel", lambda: explicit_varlen_attention)
    packed = model.forward_packed(batches, patches)
    used = [[[f.pooled, f.patches] if use else [f.pooled] for f, use in zip(fs, patches)] for fs in (packed, separate)]
    assert [f.patches.shape[1] for f in packed] == [16 if patches[0] else 0, 0]
    equal(*used)
    equal(*(gradients(model, sum(x.sin().sum() for batch in tensors for x in batch)) for tensors in used))


def explicit_varlen_attention(q, k, v, bounds_q, bounds_k, max_q, max_k, *, scale):
    assert int(bounds_q.diff().max()) == max_q and int(bounds_k.diff().max()) == max_k
    rows = [[t[a:b].transpose(0, 1) for a, b in zip(e[:-1].tolist(), e[1:].tolist())] for t, e in
            ((q, bounds_q), (k, bounds_k), (v, bounds_k))]  # fmt: skip
    return torch.cat([F.scaled_dot_product_attention(*part, scale=scale).transpose(0, 1) for part in zip(*rows)])


def test_poolings_of_patches_and_requested_last_layers_get_the_whole_block():
    images, _, key = batch()
    pooled = encoder(pooling=SimPool)
    torch.testing.assert_close(
        pooled(images, drop_key=key, patches=False), pooled(images, drop_key=key), rtol=0, atol=0
    )
    model = encoder()
    assert model(images, layers=(0,), patches=False).patches.shape[1] == 0
    assert model(images, layers=(-1,), patches=False).layers[0].shape == (3, 17, 24)


def test_dropout_draws_what_it_drew():
    model = encoder()
    set_token_dropout_(model.backbone, 0.3)
    results = []
    for patches in (True, False):
        torch.manual_seed(3)
        results.append(model(batch()[0], drop_key=batch()[2], patches=patches).pooled)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_saved_products_are_those_of_the_other_tokens():
    model, (images, _, _) = encoder().eval(), batch()
    with torch.no_grad():
        whole, rows = (
            parts.count(lambda p=p: model(images, attention=False, patches=p))["flops"] for p in (True, False)
        )
    tokens, width, others = 17, 24, 16
    linear = 2 * others * width * (width + width + 2 * 4 * width)  # q, projection, both layers of the MLP
    assert whole - rows == 3 * (linear + 4 * others * tokens * width)


@pytest.mark.parametrize("masking", [None, "attmask_high"])
@pytest.mark.parametrize("name", ["dino", "ibot", "mst"])
def test_losses_and_gradients_of_a_step_are_those_of_whole_blocks(name, masking):
    masking = MASKINGS["none"]() if masking is None else masking
    results, asked = [], []
    for whole in (True, False):
        made = method(name, masking, drop_path=0.2)
        made.student.encoder.pooling.reads_patches = made.teacher.encoder.pooling.reads_patches = whole
        seen = []
        for network in (made.student, made.teacher):
            network.encoder.backbone.blocks[-1].mlp.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append(output.shape[1])
            )
        global_crops, local_crops, ids = crops()
        answer = made(global_crops, local_crops, step=1, epoch=0, sample_ids=ids, statistics=True)
        learned = {n: p for n, p in made.student.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(answer["loss"], list(learned.values()), materialize_grads=True)
        made.update_teacher(0.9)
        results.append([answer, dict(zip(learned, grads)), made.centers.state_dict()])
        asked.append(seen)
    equal(*results)
    assert asked[0] == [17, 17, 5]  # teacher, student's global crops, its local crops
    assert asked[1] == {"dino": [1, 1, 1], "ibot": [17, 17, 1], "mst": [1, 17, 1]}[name]


@pytest.mark.gpu
@pytest.mark.parametrize("patches", [(True, False), (False, False)])
def test_rows_on_a_gpu(patches):
    """The packed kernel takes fewer queries than keys; separate crops, whole blocks and the packed ones agree."""
    torch.manual_seed(0)
    backbone = Backbone("vit_small_patch16_224", depth=2, mask_token=True, drop_path=0.2)
    model = Encoder(backbone, CLS(backbone.dim)).cuda().train()
    batches = [(torch.randn(n, 3, s, s, device="cuda"), None, torch.arange(n).cuda()) for n, s in ((4, 224), (6, 96))]
    found = []
    with torch.autocast("cuda", torch.bfloat16):
        assert model.supports_packing(batches[0][0])
        for ways in (model.forward_packed(batches), model.forward_packed(batches, patches), [
            model(x, mask, attention=False, drop_key=key, patches=use) for (x, mask, key), use in zip(batches, patches)
        ]):  # fmt: skip
            loss = sum(features.pooled.float().sin().sum() for features in ways)
            found.append([*(features.pooled.float() for features in ways), *gradients(model, loss)])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert (a - b).norm() <= 0.03 * b.norm().clamp_min(1e-6)  # bf16
