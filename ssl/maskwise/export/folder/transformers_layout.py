"""transformers' form of a vision transformer with class token: Dinov2Model, with or without registers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from timm.layers import HybridEmbed
from torch import Tensor, nn

from maskwise.export.folder.timm_layout import TimmLayout, is_square
from maskwise.nn.backbones.transformer import TransformerBackbone
from maskwise.nn.encoder import Encoder

WEIGHTS, INDEX = "transformers.safetensors", "model.safetensors.index.json"
BLOCK = {  # timm's and Dinov2's keys in a block; q, k and v are separate in Dinov2
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def dinov2(encoder: Encoder, layout: TimmLayout) -> tuple[dict, dict[str, Tensor]] | None:
    """Return config.json fields and tensors of a Dinov2Model equal to this encoder's backbone, or None.

    None without a class token, on grids that are not square, and for blocks with more parts than Dinov2's.
    """
    backbone = encoder.backbone
    if (
        not isinstance(backbone, TransformerBackbone)
        or backbone.kind != "VisionTransformer"
        or not backbone.has_class_token
        or not _computes_as_dinov2(encoder)
    ):
        return None
    source = dict(layout.tensors)
    heads, dim = backbone.num_heads, backbone.dim
    hidden = source["blocks.0.mlp.fc1.weight"].shape[0]
    tensors = _embeddings(source, backbone, encoder)
    for i in range(backbone.depth):
        tensors |= _block(source, f"blocks.{i}.", f"encoder.layer.{i}.", dim)
    for part in ("weight", "bias"):
        tensors[f"layernorm.{part}"] = source.pop(f"norm.{part}")
    if source:
        return None
    registers = backbone.num_prefix - 1
    config = {
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "hidden_size": dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": heads,
        "mlp_ratio": hidden // dim,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm.eps,
        "layerscale_value": 1.0,
        "image_size": encoder.image_size[0],
        "patch_size": backbone.patch_size[0],
        "num_channels": 3,
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in tensors,
        "use_swiglu_ffn": False,
        "drop_path_rate": 0.0,
        **({"num_register_tokens": registers} if registers else {}),
    }
    return config, {key: value.contiguous().clone() for key, value in tensors.items()}


def _block(source: dict[str, Tensor], timm_prefix: str, prefix: str, dim: int) -> dict[str, Tensor]:
    """Move one block out of `source` and return it under Dinov2's keys."""
    block = {}
    for kind in ("weight", "bias"):
        qkv = source.pop(f"{timm_prefix}attn.qkv.{kind}", None)
        for name, part in zip(("query", "key", "value"), () if qkv is None else qkv.chunk(3)):
            block[f"{prefix}attention.attention.{name}.{kind}"] = part
        for timm_name, name in BLOCK.items():
            value = source.pop(f"{timm_prefix}{timm_name}.{kind}", None)
            if value is None and kind == "bias":
                value = zero_bias(block[f"{prefix}{name}.weight"])
            block[f"{prefix}{name}.{kind}"] = value
    for branch in ("1", "2"):
        gamma = source.pop(f"{timm_prefix}ls{branch}.gamma", torch.ones(dim))
        block[f"{prefix}layer_scale{branch}.lambda1"] = gamma
    return block


def zero_bias(weight: Tensor) -> Tensor:
    """Return a bias of zeros, which is equal to no bias."""
    return torch.zeros(weight.shape[0], dtype=weight.dtype)


def _computes_as_dinov2(encoder: Encoder) -> bool:
    """Return whether the blocks compute the same as Dinov2's."""
    backbone = encoder.backbone
    if isinstance(backbone.patch_embed, HybridEmbed):
        return False
    square = encoder.image_size[0] == encoder.image_size[1] and backbone.patch_size[0] == backbone.patch_size[1]
    hidden = getattr(getattr(backbone.blocks[0].mlp, "fc1", None), "out_features", 0)
    if not square or hidden == 0 or hidden % backbone.dim or backbone.patch_embed.proj.in_channels != 3:
        return False
    norms = [encoder.norm, *(norm for block in backbone.blocks for norm in (block.norm1, block.norm2))]
    if not all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms):
        return False
    if len({norm.eps for norm in norms}) > 1:
        return False
    for block in backbone.blocks:
        attn, mlp = block.attn, block.mlp
        gelu = isinstance(getattr(mlp, "act", None), nn.GELU) and mlp.act.approximate == "none"
        extra_norms = (attn.q_norm, attn.k_norm, attn.norm, getattr(mlp, "norm", nn.Identity()))
        if (
            not gelu
            or not all(isinstance(norm, nn.Identity) for norm in extra_norms)
            or getattr(attn, "gate", None) is not None
        ):
            return False
        if attn.head_dim * attn.num_heads != backbone.dim or abs(attn.scale - attn.head_dim**-0.5) > 1e-12:
            return False
    return isinstance(backbone.norm_pre, nn.Identity) and isinstance(backbone.patch_embed.norm, nn.Identity)


def _embeddings(source: dict[str, Tensor], backbone: TransformerBackbone, encoder: Encoder) -> dict[str, Tensor]:
    """Move the embeddings out of `source`; position rows of registers, absent in Dinov2, are added to the registers."""
    rows = backbone.grid_for(encoder.image_size)[0] ** 2
    table = source.pop("pos_embed", None)
    own, patches = torch.zeros(1, 0, backbone.dim), torch.zeros(1, rows, backbone.dim)
    if table is not None:
        own, patches = table.split((backbone.table_prefix, rows), dim=1)
    own = torch.cat([own, own.new_zeros(1, backbone.num_prefix - own.shape[1], backbone.dim)], dim=1)
    weight = source.pop("patch_embed.proj.weight")
    bias = source.pop("patch_embed.proj.bias", None)
    mask = encoder.state_dict().get("backbone.mask_token")
    embeddings = {
        "embeddings.cls_token": source.pop("cls_token"),
        "embeddings.mask_token": torch.zeros(1, backbone.dim) if mask is None else mask.detach().cpu().reshape(1, -1),
        "embeddings.position_embeddings": torch.cat([own[:, :1], patches], dim=1),
        "embeddings.patch_embeddings.projection.weight": weight,
        "embeddings.patch_embeddings.projection.bias": zero_bias(weight) if bias is None else bias,
    }
    registers = source.pop("reg_token", None)
    if registers is not None:
        embeddings["embeddings.register_tokens"] = registers + own[:, 1:]
    return embeddings


def processor_type(encoder: Encoder) -> str:
    """Return the image processor of transformers, as config.json and preprocessor_config.json name it.

    BitImageProcessor converts images to RGB and needs no timm; it has no crop for oblong sizes, and knows gray and
    color only. transformers reads the type of a local folder from config.json, as it holds `pretrained_cfg`.
    """
    return "BitImageProcessor" if is_square(encoder) and len(encoder.mean) in (1, 3) else "TimmWrapperImageProcessor"


def preprocessor(encoder: Encoder) -> dict:
    """Return preprocessor_config.json: short side, center crop, mean and std of `Encoder.transform`."""
    height, width = encoder.image_size
    return {
        "image_processor_type": processor_type(encoder),
        "do_convert_rgb": len(encoder.mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": min(encoder.transform.resized_size(encoder.image_size))},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }


def index(tensors: dict[str, Tensor]) -> str:
    """Return model.safetensors.index.json, which leads transformers, but not timm, to the Dinov2 weights."""
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    return (
        json.dumps({"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(tensors), WEIGHTS)}, indent=2)
        + "\n"
    )


def open_transformers(folder: Path) -> nn.Module:
    """Open a folder by `AutoModel.from_pretrained` in eval mode, with eager attention for a Dinov2Model."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        own = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type") is not None
        options = {"attn_implementation": "eager"} if own else {}
        return transformers.AutoModel.from_pretrained(folder, local_files_only=True, **options).eval()
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
