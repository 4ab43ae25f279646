"""Small training files in the published layouts: shapes, prefixes, aliases and extra entries of the releases."""

import argparse

import numpy as np
import torch
from torch import nn

SIZE, PATCH, DIM, DEPTH, K = 32, 8, 64, 2, 12
X = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def randn(*shape):
    return torch.randn(*shape) * 0.1


def vit(cls=True, rows=None, mask=False, scale=False, dim=DIM, depth=DEPTH, patch=PATCH, grid=SIZE // PATCH):
    """Return the tensors of a vision transformer under the DINO family's names."""
    tensors = {
        "pos_embed": randn(1, rows or grid * grid + cls, dim),
        "patch_embed.proj.weight": randn(dim, 3, patch, patch),
        "patch_embed.proj.bias": randn(dim),
        "norm.weight": 1 + randn(dim),
        "norm.bias": randn(dim),
    }
    if cls:
        tensors["cls_token"] = randn(1, 1, dim)
    if mask:
        tensors["masked_embed"] = randn(1, dim)
    for i in range(depth):
        prefix = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            tensors[f"{prefix}{norm}.weight"], tensors[f"{prefix}{norm}.bias"] = 1 + randn(dim), randn(dim)
        for name, out, inside in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"] = randn(out, inside), randn(out)
        if scale:
            tensors[f"{prefix}gamma_1"], tensors[f"{prefix}gamma_2"] = 1 + randn(dim), 1 + randn(dim)
    return tensors


def head(norm=False, alias=False, patch_prototypes=None, dim=DIM, prototypes=K):
    """Return the tensors of a three-layer head; `norm` shifts the indices, `alias` repeats the shared last layer."""
    indices = (0, 3, 6) if norm else (0, 2, 4)
    tensors = {}
    for index, (out, inside) in zip(indices, ((16, dim), (16, 16), (8, 16))):
        tensors[f"mlp.{index}.weight"], tensors[f"mlp.{index}.bias"] = randn(out, inside), randn(out)
        if norm and index < 6:
            tensors |= {
                f"mlp.{index + 1}.{key}": value.clone() for key, value in nn.BatchNorm1d(16).state_dict().items()
            }
            tensors[f"mlp.{index + 1}.running_mean"] = randn(16)
    tensors["last_layer.weight_g"], tensors["last_layer.weight_v"] = 1 + randn(prototypes, 1), randn(prototypes, 8)
    if patch_prototypes:
        tensors["last_layer2.weight_g"], tensors["last_layer2.weight_v"] = (
            1 + randn(patch_prototypes, 1),
            randn(patch_prototypes, 8),
        )
    if alias:
        tensors |= {
            key.replace("last_layer.", "last_layer2."): value
            for key, value in tensors.items()
            if key.startswith("last_layer.")
        }
    return tensors


def simpool(beta=True, dim=DIM):
    tensors = {
        "norm_patches.weight": 1 + randn(dim),
        "norm_patches.bias": randn(dim),
        "wq.weight": randn(dim, dim),
        "wk.weight": randn(dim, dim),
    }
    return {**tensors, **({"beta": randn(1)} if beta else {})}


def prefixed(tensors, prefix):
    return {prefix + key: value for key, value in tensors.items()}


def network(backbone, projection, wrap=""):
    return {**prefixed(backbone, f"{wrap}backbone."), **prefixed(projection, f"{wrap}head.")}


def training_file(layout, seed=0, **args):
    """Return a training file of DINO, iBOT, AttMask, SimPool, or DINO with batch norm in its head ("dino_bn")."""
    torch.manual_seed(seed)
    norm, masked = layout == "dino_bn", layout in ("ibot", "attmask")
    cls = layout != "simpool"
    networks = {}
    for role in ("student", "teacher"):
        backbone = vit(cls=cls, mask=masked and role == "student")
        if layout == "simpool":
            backbone |= prefixed(simpool(), "simpool.")
        wrap = "module." if role == "student" or norm else ""
        networks[role] = network(backbone, head(norm=norm, alias=masked), wrap)
    centers = {"center": randn(1, K), **({"center2": randn(1, 1, K)} if masked else {})}
    return {
        **networks,
        "optimizer": {
            "state": {0: {"step": 7, "exp_avg": randn(3)}},
            "param_groups": [{"lr": np.float64(1e-3), "params": [0]}],
        },
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, seed=np.int64(0), **args),
        "ibot_loss" if masked else "dino_loss": centers,
        "fp16_scaler": {"scale": 65536.0},
    }


def features(tensors, x, heads=1, pool="cls", gamma=None, eps=1e-6):
    """Compute CLS or SimPool vector [B, D] and attention [B, heads, N] from a file's backbone tensors, in float64."""
    t, x = {key: value.double() for key, value in tensors.items()}, x.double()
    grid = x.shape[-1] // t["patch_embed.proj.weight"].shape[-1]

    def norm(y, name):
        return nn.functional.layer_norm(y, y.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def linear(y, name):
        return nn.functional.linear(y, t[f"{name}.weight"], t.get(f"{name}.bias"))

    y = (
        nn.functional.conv2d(
            x, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=t["patch_embed.proj.weight"].shape[-1]
        )
        .flatten(2)
        .transpose(1, 2)
    )
    table = t["pos_embed"]
    if pool == "simpool":
        square = table[:, -grid * grid :].transpose(1, 2).unflatten(2, (grid, grid))
        scale = (grid + 0.1) / grid
        table = (
            nn.functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic", recompute_scale_factor=False)
            .flatten(2)
            .transpose(1, 2)
        )
    else:
        y = torch.cat([t["cls_token"].expand(len(y), -1, -1), y], dim=1)
    y = y + table
    if "register_tokens" in t:
        y = torch.cat([y[:, :1], t["register_tokens"].expand(len(y), -1, -1), y[:, 1:]], dim=1)
    for i in range(1 + max(int(key.split(".")[1]) for key in t if key.startswith("blocks."))):
        prefix = f"blocks.{i}."
        q, k, v = (
            linear(norm(y, prefix + "norm1"), prefix + "attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        branch = linear((weights @ v).transpose(1, 2).flatten(2), prefix + "attn.proj")
        y = y + branch * t.get(prefix + "gamma_1", t.get(prefix + "ls1.gamma", 1.0))
        z = norm(y, prefix + "norm2")
        if prefix + "mlp.w12.weight" in t:
            gate, value = linear(z, prefix + "mlp.w12").chunk(2, dim=-1)
            branch = linear(nn.functional.silu(gate) * value, prefix + "mlp.w3")
        else:
            branch = linear(nn.functional.gelu(linear(z, prefix + "mlp.fc1")), prefix + "mlp.fc2")
        y = y + branch * t.get(prefix + "gamma_2", t.get(prefix + "ls2.gamma", 1.0))
    if pool == "cls":
        return norm(y, "norm")[:, 0], weights[:, :, 0, -grid * grid :]
    vector, a = simpooled(y, t, gamma)
    return norm(vector, "norm"), a[:, None]


def simpooled(y, tensors, gamma):
    """Pool float64 tokens [B, N, D] by SimPool's formula: vector [B, D] and attention [B, N]."""
    t = {key.removeprefix("simpool."): value.double() for key, value in tensors.items() if key.startswith("simpool.")}
    normed = nn.functional.layer_norm(y, y.shape[-1:], t["norm_patches.weight"], t["norm_patches.bias"], 1e-6)
    q, k = y.mean(1) @ t["wq.weight"].T, normed @ t["wk.weight"].T
    a = ((k @ q[:, :, None])[:, :, 0] / q.shape[-1] ** 0.5).softmax(-1)
    if not gamma:
        return (a[:, :, None] * normed).sum(1), a
    values = normed - normed.min() + 1e-6
    return (a[:, :, None] * values**gamma).sum(1) ** (1 / gamma) + t.get("beta", 0.0), a


def dinov2(registers=0, gated=False, grid=SIZE // PATCH, chunks=False, **shape):
    """Return the tensors of a DINOv2 backbone: layer scales, mask token, registers, gated MLP, chunked blocks."""
    tensors = {
        key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): value
        for key, value in vit(scale=True, grid=grid, **shape).items()
    }
    tensors["mask_token"] = randn(1, DIM)
    if registers:
        tensors["register_tokens"] = randn(1, registers, DIM)
    if gated:
        for key in [key for key in tensors if ".mlp." in key]:
            del tensors[key]
        for i in range(DEPTH):
            for name, out, inside in (("w12", 2 * 40, DIM), ("w3", DIM, 40)):
                tensors[f"blocks.{i}.mlp.{name}.weight"], tensors[f"blocks.{i}.mlp.{name}.bias"] = (
                    randn(out, inside),
                    randn(out),
                )
    if chunks:
        tensors = {
            key.replace("blocks.", "blocks.0.", 1) if key.startswith("blocks.") else key: value
            for key, value in tensors.items()
        }
    return tensors
