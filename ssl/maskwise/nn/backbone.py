"""timm vision transformers with a forward of our own: any image size, mask token, keyed drop path, the CLS row."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.functional import attention as rows
from maskwise.functional.errors import UserError
from maskwise.functional.resample import position_table
from maskwise.nn.drop_path import DropPath
from maskwise.nn.tokens import Tokens


def _ready_torchvision() -> None:
    """Let timm import a torchvision whose compiled part does not fit this torch, as beside a CPU-only torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # its Python part only registers shapes of two operators; once they are declared it imports, and nothing here calls them
        global _declared
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


_ready_torchvision()
import timm  # noqa: E402
from timm.layers import Attention, PatchEmbed  # noqa: E402
from timm.models import vision_transformer as timm_vit  # noqa: E402

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FALLBACK = "vit_small_patch16_224"
OWN_NAMES = {
    "num_classes": "there is no classifier",
    "global_pool": "the encoder's pooling does that",
    "img_size": "say image_size",
    "drop_path_rate": "say drop_path",
    "pretrained": "say weights=FILE",
    "dynamic_img_size": "any size passes anyway",
    "dynamic_img_pad": "resize the images instead",
    "drop_rate": "only drop_path is drawn by key",
    "pos_drop_rate": "only drop_path is drawn by key",
    "patch_drop_rate": "only drop_path is drawn by key",
    "proj_drop_rate": "only drop_path is drawn by key",
    "attn_drop_rate": "only drop_path is drawn by key",
    "weight_init": "the initialisation is the reference's",
    "fix_init": "the initialisation is the reference's",
}
CLASSIFIER = ("head.", "head_dist.", "attn_pool.", "pre_logits.", "fc_norm.")


class Backbone(nn.Module):
    """A timm VisionTransformer as a maker of tokens: images -> Tokens, before the final norm.

    Any image whose sides are multiples of the patch passes; the position table is resampled by `position` ("offset",
    "size" or "offset_always", see functional.resample). `class_token` None keeps the model's own choice. `drop_path` is
    the last block's rate. `mask_token` adds the token that replaces hidden patches. `weights` is a local file of
    pretrained weights; without it all weights are drawn as attmask.md 1.1 says. Further timm arguments pass through.
    Attributes: dim, depth, num_heads, patch_size (h, w), image_size (h, w), has_class_token, has_mask_token, mean, std.
    Raises UserError for a name that timm lacks, a model of another family, an argument or a file that does not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        class_token: bool | None = None,
        position: str = "offset",
        drop_path: float = 0.0,
        mask_token: bool = False,
        weights: str | Path | None = None,
        **timm_args,
    ):
        super().__init__()
        if position not in ("offset", "size", "offset_always"):
            raise UserError(f"backbone.position={position!r} is unknown: choose offset, size or offset_always")
        if not 0 <= drop_path < 1:
            raise UserError(f"backbone.drop_path={drop_path} is not a rate: choose one from 0 to below 1")
        model = _build(name, image_size, patch_size, class_token, timm_args)
        self.name, self.position, self.timm_args = name, position, timm_args
        self.class_token = class_token
        self.dim, self.depth = model.embed_dim, len(model.blocks)
        self.num_heads = model.blocks[-1].attn.num_heads
        self.patch_size, self.image_size = tuple(model.patch_embed.patch_size), tuple(model.patch_embed.img_size)
        if any(side % patch for side, patch in zip(self.image_size, self.patch_size)):
            raise UserError(f"image_size {_by(self.image_size)} is not a multiple of the patch {_by(self.patch_size)}: choose a multiple")
        self.table_grid = self.grid_for(self.image_size)
        self.has_class_token = model.cls_token is not None
        self.num_prefix = model.num_prefix_tokens
        self.table_prefix = 0 if model.no_embed_class else self.num_prefix
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        if weights is None:
            _initialise(model)
        else:
            _load(model, weights, self.table_prefix, self.table_grid)
            self.mean, self.std = (tuple(model.pretrained_cfg.get(key) or default) for key, default in (("mean", self.mean), ("std", self.std)))
        self.patch_embed, self.norm_pre, self.blocks, self.norm = model.patch_embed, model.norm_pre, model.blocks, model.norm
        self.cls_token, self.reg_token, self.pos_embed = model.cls_token, model.reg_token, model.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, self.dim)) if mask_token else None
        self.drop_path = DropPath(self.depth, drop_path)
        self._handed: tuple[nn.Module] | None = None

    @property
    def has_mask_token(self) -> bool:
        """Whether hidden patches have a learned token; without one they are replaced by zeros, its first value."""
        return self.mask_token is not None

    def spec(self) -> dict:
        """The arguments that build this backbone again, weights aside; JSON-able where the timm arguments are."""
        return {
            "name": self.name,
            "image_size": [side * patch for side, patch in zip(self.table_grid, self.patch_size)],
            "patch_size": list(self.patch_size),
            "class_token": self.class_token,
            "position": self.position,
            "drop_path": self.drop_path.rate,
            "mask_token": self.has_mask_token,
            **self.timm_args,
        }

    def grid_for(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """The patch grid (h, w) of images of that size in pixels."""
        return image_hw[0] // self.patch_size[0], image_hw[1] // self.patch_size[1]

    def take_norm(self) -> nn.Module:
        """Hand the final norm to whoever orders pooling and norm; encoders that share a backbone share it too."""
        if self._handed is None:
            self._handed = (self.norm,)  # in a tuple: remembered, but no longer a part of this module
            self.norm = nn.Identity()
        return self._handed[0]

    def freeze_as_teacher_(self) -> Backbone:
        """Make this a teacher's backbone in place: no mask token, no drop path, no gradients (attmask.md 1.1)."""
        self.mask_token = None
        self.drop_path.rate = 0.0
        return self.requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        attention: bool = False,
        keys: bool = False,
        layers: tuple[int, ...] = (),
        drop_key: Tensor | None = None,
    ) -> Tokens:
        """Float images [B, 3, H, W], bool mask [B, N] (True = hidden) -> Tokens.

        `attention` adds the class token's row of the last block, `keys` that block's keys, `layers` the outputs of the
        blocks of these indices (negative from the end). `drop_key` int64 [B] draws the drop path of each row.
        Raises UserError for images whose sides are not multiples of the patch.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size[0] or width % self.patch_size[1]:
            raise UserError(f"images of {height}x{width} pixels do not divide into patches of {_by(self.patch_size)}: resize or crop them to a multiple")
        grid = self.grid_for((height, width))
        x = self.norm_pre(self._embed(images, mask, grid))
        factors = self.drop_path(x.shape[0], x, drop_key)
        wanted = {layer % self.depth for layer in layers}
        stages: dict[int, Tensor] = {}
        row = last_keys = None
        for i, block in enumerate(self.blocks):
            last = i == self.depth - 1
            residual, q, k = attend(block.attn, block.norm1(x))
            if last and attention and self.has_class_token:
                row = rows.cls_row(q[:, :, 0], k, block.attn.scale)[..., self.num_prefix :]
            if last and keys:
                last_keys = k.transpose(1, 2).flatten(2)[:, self.num_prefix :]
            residual = block.ls1(residual)
            x = x + (residual if factors is None else residual * factors[i, 0])
            residual = block.ls2(block.mlp(block.norm2(x)))
            x = x + (residual if factors is None else residual * factors[i, 1])
            if i in wanted:
                stages[i] = x
        chosen = tuple(stages[layer % self.depth] for layer in layers) if layers else None
        return Tokens(x[:, self.num_prefix :], x[:, : self.num_prefix], grid, row, last_keys, chosen)

    def _embed(self, images: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        x = self.patch_embed.norm(self.patch_embed.proj(images).flatten(2).transpose(1, 2))
        if mask is None and self.has_mask_token and self.training:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)  # the token is in every graph: no rank waits for its gradient
        if mask is not None:
            token = self.mask_token.to(x.dtype) if self.has_mask_token else x.new_zeros(())
            x = torch.where(mask.unsqueeze(-1), token, x)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            return torch.cat([*prefix, x], dim=1)
        own, patches = self.pos_embed.split((self.table_prefix, self.pos_embed.shape[1] - self.table_prefix), dim=1)
        x = x + position_table(patches, self.table_grid, grid, self.position)
        if not prefix:
            return x
        front = torch.cat(prefix, dim=1)
        return torch.cat([front + own if self.table_prefix else front, x], dim=1)


BACKBONES = {"vision_transformer": Backbone}


def attend(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One timm attention layer, giving its output [B, T, D] and the q and k [B, H, T, d] that made it.

    The kernel is the fused one unless the layer's `fused_attn` is off. Forward and backward of two ViT-S blocks on one
    CPU core (torch 2.13, float32, 17 to 577 tokens) took 1 to 13 % longer with explicit matrices, so length does not choose.
    """
    batch, length, _ = x.shape
    q, k, v = attn.qkv(x).reshape(batch, length, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.fused_attn:
        mixed = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
    else:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        mixed = logits.softmax(dim=-1, dtype=wide).to(v.dtype) @ v
    mixed = attn.norm(mixed.transpose(1, 2).reshape(batch, length, -1))
    gate = getattr(attn, "gate", None)
    return attn.proj(mixed if gate is None else mixed * gate(x).sigmoid()), q, k


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _build(name, image_size, patch_size, class_token, timm_args) -> timm_vit.VisionTransformer:
    """The bare timm model, or one line on why there is none."""
    _check_name(name)
    taken = sorted(set(timm_args) & set(OWN_NAMES))
    if taken:
        raise UserError(f"backbone.{taken[0]} is not to be set: {OWN_NAMES[taken[0]]}")
    options = {"img_size": image_size, "patch_size": patch_size, "class_token": class_token}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items() if value is not None}
    plain = {"num_classes": 0, "global_pool": "", "fc_norm": False, "dynamic_img_size": False, "weight_init": "skip", "fix_init": False}
    if _family(name) not in ("vision_transformer", "deit"):
        _refuse(name, _misfit(_probe(name)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of its own renamed models
            model = timm.create_model(name, pretrained=False, **plain, **options, **timm_args)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        _refuse(name, _misfit(_probe(name)))
        first = str(error).splitlines()[0].removeprefix("VisionTransformer.__init__() ") if str(error) else type(error).__name__
        raise UserError(f"timm cannot build {name} with {_said(options, timm_args)}: {first}") from None
    _refuse(name, _misfit(model))
    return model


def _said(*options: dict) -> str:
    return ", ".join(f"{key}={value}" for each in options for key, value in each.items()) or "these arguments"


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"one it has is {FALLBACK}"
    raise UserError(f"timm has no model {name!r}; {hint}")


def _family(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def _probe(name: str, **options):
    """The model as timm builds it by default, without memory; None where it cannot be built so."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=False, **options)
    except Exception:  # whatever a model of another family raises without storage, it is not one of ours
        return None


def _misfit(model) -> str | None:
    """What keeps a timm model from being a backbone here; None if nothing does."""
    if model is None:
        return "it is of another family"
    if type(model) is not timm_vit.VisionTransformer:
        return f"its class is {type(model).__name__}"
    for block in model.blocks:
        if type(block) is not timm_vit.Block:
            return f"its blocks are {type(block).__name__}"
        if type(block.attn) is not Attention:
            return f"its attention is {type(block.attn).__name__}"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its stem is {type(model.patch_embed).__name__}"
    return None


def _refuse(name: str, reason: str | None) -> None:
    if reason is None:
        return
    names = [each for each in timm.list_models() if _family(each) in ("vision_transformer", "deit")]
    near = (each for each in difflib.get_close_matches(name, names, 8, 0.6) if _misfit(_probe(each, depth=1)) is None)
    raise UserError(
        f"{name} is not supported: {reason}; backbones are VisionTransformers of plain Blocks on a PatchEmbed stem, the nearest is {next(near, FALLBACK)}"
    )


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """Draw weights as attmask.md 1.1; norms, layer scales and the patch convolution keep the framework's values."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for table in (model.cls_token, model.reg_token, model.pos_embed):
        if table is not None:
            nn.init.trunc_normal_(table, std=0.02)


def read_tensors(path: str | Path, allowed: list | None = None) -> dict:
    """The content of a weights file: safetensors, or torch's format with tensors and `allowed` classes only.

    Raises UserError for a missing or unreadable file and for one that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file {path}: check the path (files are local; nothing is downloaded)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(allowed or []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and OS errors alike: the file is of no use
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "Weights only load failed" in first or "Unsupported" in str(error):
            asked = re.search(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.]+)|GLOBAL ([\w.]+)", str(error))
            first = f"it holds more than tensors{f' ({asked[1] or asked[2]})' if asked else ''} and would run code on loading"
        raise UserError(f"cannot read weights from {path}: {first}; give a .safetensors file or a state dict saved by torch") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors: give a state dict")
    return content


def strip_prefixes(state: dict, prefixes: tuple[str, ...] = ("module.", "_orig_mod.", "backbone.")) -> dict:
    """State dict with wrappers' names taken off the front of its keys, however often they are there."""
    stripped = {}
    for key, value in state.items():
        while any(key.startswith(prefix) for prefix in prefixes):
            key = key.partition(".")[2]
        stripped[key] = value
    return stripped


def mismatch(missing, unexpected) -> str:
    """What a strict load found wrong, short enough for one line."""
    parts = []
    for what, keys in (("lacks", sorted(missing)), ("has unknown", sorted(unexpected))):
        if keys:
            parts.append(f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""))
    return " and ".join(parts)


def _load(model, path: str | Path, table_prefix: int, table_grid: tuple[int, int]) -> None:
    """Load pretrained weights strictly; classifier layers are left out, the position table fits any grid."""
    content = read_tensors(path)
    state = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    state = {key: value for key, value in strip_prefixes(state).items() if isinstance(value, Tensor)}
    native = "patch_embed.proj.weight" in state and "mask_token" not in state
    table = state.pop("pos_embed", None) if native else None
    try:
        state = timm_vit.checkpoint_filter_fn(state, model)
    except Exception as error:  # timm guesses foreign layouts by their keys
        raise UserError(f"cannot read weights from {path}: timm does not know this layout ({type(error).__name__}: {error})") from None
    if "norm.weight" not in state:
        state = {key.replace("fc_norm.", "norm.", 1) if key.startswith("fc_norm.") else key: value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER) and key not in ("mask_token", "dist_token")}
    if model.cls_token is None:
        state.pop("cls_token", None)
    if table is not None and model.pos_embed is not None:
        state["pos_embed"] = fit_table(table, table_prefix, table_grid, path)
    own = model.state_dict()
    wrong = mismatch(own.keys() - state.keys(), state.keys() - own.keys())
    if wrong:
        raise UserError(f"{path} does not fit this backbone: it {wrong}; check backbone.name, patch_size and class_token")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(f"{path} does not fit this backbone: {key} is {list(value.shape)} there and {list(own[key].shape)} here; check backbone.name")
    model.load_state_dict(state)


def fit_table(table: Tensor, prefix: int, grid: tuple[int, int], path: str | Path) -> Tensor:
    """A stored position table [1, P' + h'*w', D] as [1, prefix + h*w, D]: surplus prefix rows dropped, resampled by size."""
    rows_there = table.shape[1]
    if rows_there == prefix + grid[0] * grid[1]:
        return table
    for there in (prefix, 1, 0):
        side = math.isqrt(max(0, rows_there - there))
        if side * side == rows_there - there and there >= prefix:
            patches = position_table(table[:, there:], (side, side), grid, "size")
            return torch.cat([table[:, :prefix], patches], dim=1)
    raise UserError(f"{path}: a position table of {rows_there} rows does not fit {prefix} prefix tokens and a square grid")
