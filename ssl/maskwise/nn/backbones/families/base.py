"""Base classes of the backbone families: adapters between timm's model classes and the forward passes here.

A family holds no weights and no state: every method takes the timm model, or the backbone that adopted its parts
under the same names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

from timm.layers import PatchEmbed
from torch import Tensor, nn

from maskwise.nn.backbones.varlen_attention import Rows, Shapes


class Family(ABC):
    """Adapter for one timm model class.

    What is supported:
        model_class: the timm class; subclasses of it are refused.
        block_classes: accepted classes of the blocks.
        attention_classes: accepted classes of a block's `attn`.
        stem_classes: accepted classes of the model's `patch_embed`.
        block_parts: accepted classes of further attributes of a block, by name.
    How models are built:
        timm_names: backbone arguments that the family takes -> timm's name, None where timm has no such argument.
        timm_arguments: arguments that every model is built with.
        shallow_arguments: arguments that give the smallest model with all kinds of blocks.
        set_by_name: timm arguments that are part of a model's name.
        extra_arguments: arguments that timm lacks -> their type; see `constructor_arguments`, `apply_extra_arguments`.
        timm_pooling: the `global_pool` of exported models.
    How models run:
        branches: residual branches per block, each with its own drop path.
        supports_masking: whether a mask token can replace patches.
    """

    model_class: type[nn.Module]
    block_classes: tuple[type, ...]
    attention_classes: tuple[type, ...] = ()
    stem_classes: tuple[type, ...] = (PatchEmbed,)
    block_parts: Mapping[str, tuple[type, ...]] = {}

    timm_names: Mapping[str, str | None] = {}
    timm_arguments: Mapping[str, object] = {"num_classes": 0, "drop_path_rate": 0.0}
    shallow_arguments: Mapping[str, object] = {}
    set_by_name: frozenset[str] = frozenset()
    extra_arguments: Mapping[str, type] = {}
    timm_pooling = "avg"

    branches = 2
    supports_masking = False

    @abstractmethod
    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """Return the residual blocks in order."""

    def translate(self, state: dict, model: nn.Module) -> dict:
        """Rename a pretrained state dict to timm's current keys."""
        return state

    def drop_class_token(self, model: nn.Module) -> None:
        """Remove the class token in place where timm has no argument for it."""

    def constructor_arguments(self, sizes: dict, extra: dict) -> tuple[dict, dict]:
        """Return image_size, patch_size and class_token, and timm's arguments that follow from `extra_arguments`."""
        return sizes, {}

    def apply_extra_arguments(self, model: nn.Module, **arguments) -> None:
        """Apply `extra_arguments` in place."""


class TransformerFamily(Family):
    """Family of transformers with one token sequence: [B, T, D] with T prefix and patch tokens.

    recomputes_elementwise: `recompute` saves memory in the branches (speed.checkpointing=elementwise).
    supports_packing: the branches take `shapes`, batches of several lengths packed into one sequence.
    """

    supports_masking = True
    recomputes_elementwise = False
    supports_packing = False

    def rope(self, embedding: nn.Module | None, cache: dict, grid: tuple[int, int], num_prefix: int) -> Tensor | None:
        """Return the rotary table of all tokens for a grid; None without rotary position embedding."""
        return None

    @abstractmethod
    def attention_branch(
        self,
        block: nn.Module,
        x: Tensor,
        rope: Tensor | None,
        index: int,
        *,
        recompute: bool = False,
        shapes: Shapes | None = None,
        rows: Rows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the attention residual of block `index`, before drop path.

        x is [B, T, D], or [tokens, D] with `shapes`. Returns the residual, shaped like x, and q, k and k before
        rotation, [B, H, T, d]; with `shapes` these three are packed or those of the first batch. With `rows` only the
        first tokens of each sequence have a residual and a q (`varlen_attention.first_rows`).
        """

    @abstractmethod
    def mlp_branch(self, block: nn.Module, x: Tensor, *, recompute: bool = False) -> Tensor:
        """Compute the MLP residual of x, before drop path."""


class FeatureMapFamily(Family):
    """Family of networks with stages of feature maps.

    fixed_size: layers over the patches fix the image size.
    channels_last: weights and maps are kept in channels-last memory, which convolutions on CPUs and GPUs prefer.
    classifier_prefixes: state-dict keys of the classifier, left out of pretrained files.
    `x` in the methods below is whatever passes between the family's blocks; `to_map` turns it into [B, C, h, w].
    """

    fixed_size = False
    channels_last = False
    classifier_prefixes: tuple[str, ...] = ("head.",)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the residual blocks in order."""
        return [block for stage in self.stages(model) for block in stage]

    @abstractmethod
    def stages(self, model: nn.Module) -> list[Iterable[nn.Module]]:
        """Return the blocks of each stage."""

    @abstractmethod
    def parts(self, model: nn.Module) -> dict[str, nn.Module | nn.Parameter | None]:
        """Return the modules and parameters that a backbone adopts, by timm's names, and the final norm."""

    @abstractmethod
    def widths(self, model: nn.Module) -> list[int]:
        """Return the channels after the stem and after each stage."""

    @abstractmethod
    def strides(self, model: nn.Module) -> tuple:
        """Return the stem's patch in pixels (1 where the mask grid needs none) and the total stride."""

    def grid_side(self, side: int, stem_patch, stride: int) -> int:
        """Return the last map's side for an image side in pixels."""
        return side // stride

    def divisor(self, model: nn.Module) -> int:
        """Return the number of pixels that image sides must be multiples of."""
        return 1

    def check_size(self, model: nn.Module, image_hw: tuple[int, int]) -> None:
        """Raise UserError for image sizes with further restrictions."""

    def position_table(self, model: nn.Module, image_hw: tuple[int, int]) -> Tensor | None:
        """Return the position table for an image size, [1, D, h, w]; None without one."""
        return None

    @abstractmethod
    def stem(self, model: nn.Module, images: Tensor):
        """Run the stem on images [B, C, H, W]."""

    def enter_stage(self, model: nn.Module, stage: int, x):
        """Run the layers before a stage's blocks."""
        return x

    @abstractmethod
    def run_block(self, block: nn.Module, x, factors: Tensor | None, cache: dict):
        """Run a block; drop path `factors` [branches, B, 1, 1] scale its residual branches."""

    def leave_last_stage(self, model: nn.Module, x):
        """Run the layers after the last stage's blocks."""
        return x

    def to_map(self, x) -> Tensor:
        """Return a stage's output as [B, C, h, w]."""
        return x


def scale_residual(residual: Tensor, factors: Tensor | None, branch: int) -> Tensor:
    """Multiply the residual [B, ., ., .] of a branch by its drop path factors [branches, B, 1, 1]; None keeps it."""
    return residual if factors is None else residual * factors[branch].unsqueeze(-1)


def call_block(block: nn.Module, function: Callable, *arguments):
    """Return function(*arguments), which uses the block's weights; a sharded block gathers them for the call."""
    gathered = getattr(block, "gathered", None)  # added by distributed.fsdp
    return function(*arguments) if gathered is None else gathered(function, *arguments)
