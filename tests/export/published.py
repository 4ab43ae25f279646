"""Training files built as the published ones are: shapes, prefixes, aliases and extra entries of attmask.md 6 and pooling.md 6."""

import argparse

import numpy as np
import torch
from torch import nn

SIZE, PATCH, DIM, DEPTH, K = 32, 8, 64, 2, 12
X = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def randn(*shape):
    return torch.randn(*shape) * 0.1


def vit(cls=True, rows=None, mask=False, scale=False, dim=DIM, depth=DEPTH, patch=PATCH, grid=SIZE // PATCH):
    """The tensors of a vision transformer under the DINO family's names."""
    tensors = {
        "pos_embed": randn(1, rows or grid * grid + cls, dim), "patch_embed.proj.weight": randn(dim, 3, patch, patch), "patch_embed.proj.bias": randn(dim),
        "norm.weight": 1 + randn(dim), "norm.bias": randn(dim),
    }  # fmt: skip
    if cls:
        tensors["cls_token"] = randn(1, 1, dim)
    if mask:
        tensors["masked_embed"] = randn(1, dim)
    for i in range(depth):
        front = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            tensors[f"{front}{norm}.weight"], tensors[f"{front}{norm}.bias"] = 1 + randn(dim), randn(dim)
        for name, out, inside in (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim)):
            tensors[f"{front}{name}.weight"], tensors[f"{front}{name}.bias"] = randn(out, inside), randn(out)
        if scale:
            tensors[f"{front}gamma_1"], tensors[f"{front}gamma_2"] = 1 + randn(dim), 1 + randn(dim)
    return tensors


def head(norm=False, alias=False, patch_prototypes=None, dim=DIM, prototypes=K):
    """The tensors of a three-layer projection head; `norm` shifts the indices, `alias` writes the shared last layer twice."""
    places = (0, 3, 6) if norm else (0, 2, 4)
    tensors = {}
    for place, (out, inside) in zip(places, ((16, dim), (16, 16), (8, 16))):
        tensors[f"mlp.{place}.weight"], tensors[f"mlp.{place}.bias"] = randn(out, inside), randn(out)
        if norm and place < 6:
            tensors |= {f"mlp.{place + 1}.{key}": value.clone() for key, value in nn.BatchNorm1d(16).state_dict().items()}
            tensors[f"mlp.{place + 1}.running_mean"] = randn(16)
    tensors["last_layer.weight_g"], tensors["last_layer.weight_v"] = 1 + randn(prototypes, 1), randn(prototypes, 8)
    if patch_prototypes:
        tensors["last_layer2.weight_g"], tensors["last_layer2.weight_v"] = 1 + randn(patch_prototypes, 1), randn(patch_prototypes, 8)
    if alias:
        tensors |= {key.replace("last_layer.", "last_layer2."): value for key, value in tensors.items() if key.startswith("last_layer.")}
    return tensors


def simpool(beta=True):
    tensors = {"norm_patches.weight": 1 + randn(DIM), "norm_patches.bias": randn(DIM), "wq.weight": randn(DIM, DIM), "wk.weight": randn(DIM, DIM)}
    return {**tensors, **({"beta": randn(1)} if beta else {})}


def prefixed(tensors, prefix):
    return {prefix + key: value for key, value in tensors.items()}


def network(backbone, projection, wrap=""):
    return {**prefixed(backbone, f"{wrap}backbone."), **prefixed(projection, f"{wrap}head.")}


def training_file(layout, seed=0, **args):
    """A whole training file of DINO, iBOT, AttMask, SimPool or DINO with batch norm in its head ("dino_bn")."""
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
        "optimizer": {"state": {0: {"step": 7, "exp_avg": randn(3)}}, "param_groups": [{"lr": np.float64(1e-3), "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, seed=np.int64(0), **args),
        "ibot_loss" if masked else "dino_loss": centers,
        "fp16_scaler": {"scale": 65536.0},
    }


def features(tensors, x, heads=1, pool="cls", gamma=None, eps=1e-6):
    """CLS or SimPool vector [B, D] and its attention [B, heads, N] straight from a file's backbone tensors, in float64."""
    t, x = {key: value.double() for key, value in tensors.items()}, x.double()
    grid = x.shape[-1] // t["patch_embed.proj.weight"].shape[-1]

    def norm(y, name):
        return nn.functional.layer_norm(y, y.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def linear(y, name):
        return nn.functional.linear(y, t[f"{name}.weight"], t.get(f"{name}.bias"))

    y = nn.functional.conv2d(x, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=t["patch_embed.proj.weight"].shape[-1]).flatten(2).transpose(1, 2)
    table = t["pos_embed"]
    if pool == "simpool":
        square = table[:, -grid * grid :].transpose(1, 2).unflatten(2, (grid, grid))
        scale = (grid + 0.1) / grid
        table = nn.functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic", recompute_scale_factor=False).flatten(2).transpose(1, 2)
    else:
        y = torch.cat([t["cls_token"].expand(len(y), -1, -1), y], dim=1)
    y = y + table
    if "register_tokens" in t:
        y = torch.cat([y[:, :1], t["register_tokens"].expand(len(y), -1, -1), y[:, 1:]], dim=1)
    for i in range(1 + max(int(key.split(".")[1]) for key in t if key.startswith("blocks."))):
        front = f"blocks.{i}."
        q, k, v = linear(norm(y, front + "norm1"), front + "attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        branch = linear((weights @ v).transpose(1, 2).flatten(2), front + "attn.proj")
        y = y + branch * t.get(front + "gamma_1", t.get(front + "ls1.gamma", 1.0))
        z = norm(y, front + "norm2")
        if front + "mlp.w12.weight" in t:
            gate, value = linear(z, front + "mlp.w12").chunk(2, dim=-1)
            branch = linear(nn.functional.silu(gate) * value, front + "mlp.w3")
        else:
            branch = linear(nn.functional.gelu(linear(z, front + "mlp.fc1")), front + "mlp.fc2")
        y = y + branch * t.get(front + "gamma_2", t.get(front + "ls2.gamma", 1.0))
    if pool == "cls":
        return norm(y, "norm")[:, 0], weights[:, :, 0, -grid * grid :]
    normed = norm(y, "simpool.norm_patches")
    q, k = linear(y.mean(1), "simpool.wq"), linear(normed, "simpool.wk")
    a = ((k @ q[:, :, None])[:, :, 0] / q.shape[-1] ** 0.5).softmax(-1)
    values = normed - normed.min() + 1e-6
    vector = (a[:, :, None] * values**gamma).sum(1) ** (1 / gamma) if gamma else (a[:, :, None] * normed).sum(1)
    return norm(vector + t.get("simpool.beta", 0.0), "norm"), a[:, None]


def dinov2(registers=0, gated=False, grid=SIZE // PATCH, chunks=False, **shape):
    """The tensors of a DINOv2 backbone under its names: layer scales, a mask token, registers, a gated MLP, chunked blocks."""
    tensors = {key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): value for key, value in vit(scale=True, grid=grid, **shape).items()}
    tensors["mask_token"] = randn(1, DIM)
    if registers:
        tensors["register_tokens"] = randn(1, registers, DIM)
    if gated:
        for key in [key for key in tensors if ".mlp." in key]:
            del tensors[key]
        for i in range(DEPTH):
            for name, out, inside in (("w12", 2 * 40, DIM), ("w3", DIM, 40)):
                tensors[f"blocks.{i}.mlp.{name}.weight"], tensors[f"blocks.{i}.mlp.{name}.bias"] = randn(out, inside), randn(out)
    if chunks:
        tensors = {key.replace("blocks.", "blocks.0.", 1) if key.startswith("blocks.") else key: value for key, value in tensors.items()}
    return tensors
