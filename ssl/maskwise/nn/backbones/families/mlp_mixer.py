"""timm's MLP-Mixer and ResMLP: one stage of blocks that mix the positions of a map of one size."""

from __future__ import annotations

import torch
from timm.models import mlp_mixer
from torch import Tensor, nn

from maskwise.nn.backbones.families.base import FeatureMapFamily, scale_residual


class Affine(nn.Module):
    """ResMLP's last norm for any leading axes: x [..., D] -> alpha x + beta; timm's takes [B, N, D] only."""

    def __init__(self, norm: mlp_mixer.Affine):
        super().__init__()
        self.alpha, self.beta = norm.alpha, norm.beta  # [1, 1, D] each

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return torch.addcmul(self.beta[0, 0], self.alpha[0, 0], x)


class MLPMixerFamily(FeatureMapFamily):
    """timm's MlpMixer; layers over the positions have as many weights as there are positions."""

    model_class = mlp_mixer.MlpMixer
    block_classes = (mlp_mixer.ResBlock, mlp_mixer.MixerBlock)
    timm_names = {"image_size": "img_size"}
    shallow_arguments = {"num_blocks": 1}
    # `nlhb` belongs to the classifier
    set_by_name = frozenset({"patch_size", "embed_dim", "num_blocks", "mlp_ratio", "block_layer", "norm_layer", "nlhb"})
    fixed_size = True
    supports_masking = True

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict to timm's current keys."""
        return mlp_mixer.checkpoint_filter_fn(state, model)

    def stages(self, model: nn.Module) -> list:
        """Return the blocks of the one stage."""
        return [model.blocks]

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules that a backbone adopts, and the final norm."""
        norm = Affine(model.norm) if isinstance(model.norm, mlp_mixer.Affine) else model.norm
        return {"stem": model.stem, "blocks": model.blocks, "norm": norm}

    def widths(self, model: nn.Module) -> list[int]:
        """Return the channels after the stem and after the blocks."""
        return [model.embed_dim] * 2

    def strides(self, model: nn.Module) -> tuple[int, int]:
        """Return the stem's patch in pixels, which is the total stride, twice."""
        return (model.stem.patch_size[0],) * 2

    def divisor(self, model: nn.Module) -> int:
        """Return the patch size, the divisor of image sides."""
        return model.stem.patch_size[0]

    def stem(self, model: nn.Module, images: Tensor) -> Tensor:
        """Embed the patches of images [B, C, H, W] -> [B, h, w, D]."""
        return model.stem.norm(model.stem.proj(images).permute(0, 2, 3, 1))

    def run_block(self, block: nn.Module, x: Tensor, factors: Tensor | None, cache: dict) -> Tensor:
        """Run a block on x [B, h, w, D]; `factors` [2, B, 1, 1] scale its residual branches."""
        mixer = isinstance(block, mlp_mixer.MixerBlock)
        mix_positions = block.mlp_tokens if mixer else block.linear_tokens
        tokens = block.norm1(x).flatten(1, 2).transpose(1, 2)  # [B, D, N]
        residual = mix_positions(tokens).transpose(1, 2).unflatten(1, x.shape[1:3])
        x = x + scale_residual(residual if mixer else block.ls1 * residual, factors, 0)
        residual = block.mlp_channels(block.norm2(x))
        return x + scale_residual(residual if mixer else block.ls2 * residual, factors, 1)

    def to_map(self, x: Tensor) -> Tensor:
        """Return the stage's output as [B, D, h, w]."""
        return x.permute(0, 3, 1, 2)
