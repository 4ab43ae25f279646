"""timm's MLP-Mixer and ResMLP as the backbone runs them: one stage of blocks that mix the places of a map of one size."""

from __future__ import annotations

import torch
from timm.models import mlp_mixer
from torch import Tensor, nn

CLASS = mlp_mixer.MlpMixer
BLOCKS = (mlp_mixer.ResBlock, mlp_mixer.MixerBlock)
MAPS = FIXED = True  # FIXED: layers over the places have as many weights as there are places
TAKES = {"image_size": "img_size"}
NAMED = {"patch_size", "embed_dim", "num_blocks", "mlp_ratio", "block_layer", "norm_layer", "nlhb"}  # what timm's names settle, and its classifier's
PLAIN = {"num_classes": 0, "drop_path_rate": 0.0}
CLASSIFIER = ("head.",)
MASKS = True
SHALLOW = {"num_blocks": 1}
translate = mlp_mixer.checkpoint_filter_fn


class Affine(nn.Module):
    """ResMLP's last norm over any leading axes: x [..., D] -> alpha x + beta, with the weights of timm's, which takes [B, N, D] only."""

    def __init__(self, norm: mlp_mixer.Affine):
        super().__init__()
        self.alpha, self.beta = norm.alpha, norm.beta  # [1, 1, D] each

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> the same."""
        return torch.addcmul(self.beta[0, 0], self.alpha[0, 0], x)


def blocks(model: nn.Module) -> list:
    """The blocks of a timm model, in order."""
    return list(model.blocks)


def stages(model: nn.Module) -> list:
    """The blocks of the one stage."""
    return [model.blocks]


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to keep, by timm's names, and the final norm."""
    norm = Affine(model.norm) if isinstance(model.norm, mlp_mixer.Affine) else model.norm
    return {"stem": model.stem, "blocks": model.blocks, "norm": norm}


def widths(model: nn.Module) -> list[int]:
    """Channels after the stem and after the blocks."""
    return [model.embed_dim] * 2


def strides(model: nn.Module) -> tuple[int, int]:
    """Pixels of the stem's patch, which is the total stride."""
    return (model.stem.patch_size[0],) * 2


def grid(side: int, patch: int, total: int) -> int:
    """Places along a side of so many pixels."""
    return side // total


def divisor(model: nn.Module) -> int:
    """What the sides of images must be multiples of."""
    return model.stem.patch_size[0]


def stem(model: nn.Module, images: Tensor) -> Tensor:
    """Images [B, C, H, W] -> embedded patches [B, h, w, D]."""
    return model.stem.norm(model.stem.proj(images).permute(0, 2, 3, 1))


def enter(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """Nothing stands before the blocks."""
    return x


def pass_block(block: nn.Module, x: Tensor, scale: Tensor | None, cache: dict) -> Tensor:
    """A block of x [B, h, w, D]; scale [2, B, 1, 1] scales its two residual branches."""
    plain = isinstance(block, mlp_mixer.MixerBlock)
    across = block.mlp_tokens if plain else block.linear_tokens
    residual = across(block.norm1(x).flatten(1, 2).transpose(1, 2)).transpose(1, 2).unflatten(1, x.shape[1:3])
    residual = residual if plain else block.ls1 * residual
    x = x + (residual if scale is None else residual * scale[0].unsqueeze(-1))
    residual = block.mlp_channels(block.norm2(x))
    residual = residual if plain else block.ls2 * residual
    return x + (residual if scale is None else residual * scale[1].unsqueeze(-1))


def to_map(x: Tensor) -> Tensor:
    """The stage's output as [B, D, H, W]."""
    return x.permute(0, 3, 1, 2)
