"""A vision transformer with a class token as transformers' Dinov2Model, with or without registers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwise.export.timm_layout import TimmLayout, resized_to
from maskwise.nn.transformer import TransformerBackbone
from maskwise.nn.encoder import Encoder

WEIGHTS, INDEX = "transformers.safetensors", "model.safetensors.index.json"
BLOCK = {  # timm's names of a block's tensors and Dinov2's; q, k and v are cut apart
    "norm1": "norm1", "attn.proj": "attention.output.dense", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def dinov2(encoder: Encoder, layout: TimmLayout) -> tuple[dict, dict[str, Tensor]] | None:
    """config.json's fields and the tensors of a Dinov2Model equal to this encoder's backbone; None where none is equal.

    None without a class token, on grids that are not square, and where blocks hold more than Dinov2's do.
    """
    backbone = encoder.backbone
    if not isinstance(backbone, TransformerBackbone) or backbone.kind != "VisionTransformer" or not backbone.has_class_token or not _plain(encoder):
        return None
    source = dict(layout.tensors)
    heads, dim = backbone.num_heads, backbone.dim
    hidden = source["blocks.0.mlp.fc1.weight"].shape[0]
    tensors = _embeddings(source, backbone, encoder)
    for i in range(backbone.depth):
        front, back = f"encoder.layer.{i}.", f"blocks.{i}."
        for theirs, ours in (("weight", "weight"), ("bias", "bias")):
            cut = source.pop(f"{back}attn.qkv.{ours}", None)
            for name, part in zip(("query", "key", "value"), () if cut is None else cut.chunk(3)):
                tensors[f"{front}attention.attention.{name}.{theirs}"] = part
            for ours_name, name in BLOCK.items():
                value = source.pop(f"{back}{ours_name}.{ours}", None)
                if value is None and ours == "bias":
                    value = source_like(tensors[f"{front}{name}.weight"])
                tensors[f"{front}{name}.{theirs}"] = value
        for which in ("1", "2"):
            tensors[f"{front}layer_scale{which}.lambda1"] = source.pop(f"{back}ls{which}.gamma", torch.ones(dim))
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
        "layer_norm_eps": 1e-6,
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


def source_like(weight: Tensor) -> Tensor:
    """The bias of zeros that equals none."""
    return torch.zeros(weight.shape[0], dtype=weight.dtype)


def _plain(encoder: Encoder) -> bool:
    """Whether the blocks compute what Dinov2's do, beside the names of their tensors."""
    backbone = encoder.backbone
    square = encoder.image_size[0] == encoder.image_size[1] and backbone.patch_size[0] == backbone.patch_size[1]
    hidden = getattr(getattr(backbone.blocks[0].mlp, "fc1", None), "out_features", 0)
    if not square or hidden == 0 or hidden % backbone.dim or backbone.patch_embed.proj.in_channels != 3:
        return False
    norms = [encoder.norm, *(norm for block in backbone.blocks for norm in (block.norm1, block.norm2))]
    if not all(isinstance(norm, nn.LayerNorm) and norm.eps == 1e-6 and norm.bias is not None for norm in norms):
        return False
    for block in backbone.blocks:
        attn, mlp = block.attn, block.mlp
        gelu = isinstance(getattr(mlp, "act", None), nn.GELU) and mlp.act.approximate == "none"
        plain = all(isinstance(part, nn.Identity) for part in (attn.q_norm, attn.k_norm, attn.norm, getattr(mlp, "norm", nn.Identity())))
        if not gelu or not plain or getattr(attn, "gate", None) is not None:
            return False
        if attn.head_dim * attn.num_heads != backbone.dim or abs(attn.scale - attn.head_dim**-0.5) > 1e-12:
            return False
    return isinstance(backbone.norm_pre, nn.Identity) and isinstance(backbone.patch_embed.norm, nn.Identity)


def _embeddings(source: dict[str, Tensor], backbone: TransformerBackbone, encoder: Encoder) -> dict[str, Tensor]:
    """Taken out of `source`. Dinov2's table has a row for the class token and none for registers, which take theirs along."""
    rows = backbone.grid_for(encoder.image_size)[0] ** 2
    table = source.pop("pos_embed", None)
    own, patches = torch.zeros(1, 0, backbone.dim), torch.zeros(1, rows, backbone.dim)
    if table is not None:
        own, patches = table.split((backbone.table_prefix, rows), dim=1)
    own = torch.cat([own, own.new_zeros(1, backbone.num_prefix - own.shape[1], backbone.dim)], dim=1)
    weight = source.pop("patch_embed.proj.weight")
    bias = source.pop("patch_embed.proj.bias", None)
    mask = encoder.state_dict().get("backbone.mask_token")
    found = {
        "embeddings.cls_token": source.pop("cls_token"),
        "embeddings.mask_token": torch.zeros(1, backbone.dim) if mask is None else mask.detach().cpu().reshape(1, -1),
        "embeddings.position_embeddings": torch.cat([own[:, :1], patches], dim=1),
        "embeddings.patch_embeddings.projection.weight": weight,
        "embeddings.patch_embeddings.projection.bias": source_like(weight) if bias is None else bias,
    }
    registers = source.pop("reg_token", None)
    if registers is not None:
        found["embeddings.register_tokens"] = registers + own[:, 1:]
    return found


def preprocessor(encoder: Encoder) -> dict:
    """preprocessor_config.json: short side, centre crop, mean and std as `Encoder.transform` has them."""
    height, width = encoder.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resized_to(encoder)},
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
    """model.safetensors.index.json: every tensor stands in the one file beside it, which timm then does not mistake for its own."""
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    return json.dumps({"metadata": {"total_size": size}, "weight_map": {key: WEIGHTS for key in sorted(tensors)}}, indent=2) + "\n"


def open_transformers(folder: Path) -> nn.Module:
    """The folder's model as `AutoModel.from_pretrained` gives it, attentions on where it has any, in eval mode."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        own = json.loads((Path(folder) / "config.json").read_text()).get("model_type") is not None
        options = {"attn_implementation": "eager"} if own else {}
        return transformers.AutoModel.from_pretrained(folder, local_files_only=True, **options).eval()
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
