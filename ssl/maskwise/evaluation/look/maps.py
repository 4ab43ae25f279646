"""Everything that is drawn of one image: attention of every head, masks, boxes, patch tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskwise.evaluation.discovery import DiscoveryOptions, Padded, found_boxes, source_of
from maskwise.evaluation.features import views
from maskwise.evaluation.features.extract import evaluating
from maskwise.evaluation.suite.attention_sheets import normalized, visible
from maskwise.functional.attention import patch_attention
from maskwise.imaging.resize import resize_image
from maskwise.methods.masking import MASKINGS, ViewKeys
from maskwise.nn.encoder import pooling_name

RATIOS = [step / 100 for step in range(101)]  # for which masks are drawn
DRAWN = ("attmask_high", "attmask_low", "attmask_hint", "block", "random")
BOXES = {"lost": "LOST", "dino_seg": "DINO-seg"}


@dataclass
class Layer:
    """Attention of one block's class token, or of the pooling: heads float32 [H, N], and one map of them, [N]."""

    title: str
    heads: Tensor
    merged: Tensor


@dataclass
class Maps:
    """Results of a model for one image, on the CPU.

    image uint8 [h, w, 3] as the model sees it; original (height, width) of the file; grid (rows, columns) of N patches;
    layers: attention, the first block's first, that which maskings follow last, [] without any; tokens float32 [N, D],
    patch tokens after the final norm, scaled to length 1; boxes by method, (x0, y0, x1, y1) in pixels of `image`;
    masks by name, bool [101, N], one for each ratio of RATIOS.
    """

    name: str
    image: np.ndarray
    original: tuple[int, int]
    grid: tuple[int, int]
    layers: list[Layer]
    tokens: Tensor
    boxes: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def guide(self) -> Tensor | None:
        """Return the attention that maskings follow, [N], or None."""
        return self.layers[-1].merged if self.layers else None


def maps_of(encoder, image: Tensor, name: str = "image", number: int = 0, *, side: int | None = None) -> Maps:
    """Run an encoder on a whole image [C, H, W], whatever its aspect, and collect its maps.

    side: the image is resized to about side x side pixels at its own aspect, by default as many as the model was made
    for. number: the key of the draws of masks. Memory grows with the number of patches, not with its square: of every
    block only the class token's row is computed. Raises UserError where the model does not take such a size.
    """
    size = whole_size(encoder, tuple(image.shape[-2:]), side)
    resized = resize_image(image, size)
    if resized.is_floating_point():
        resized = (resized.clamp(0, 1) * 255).round().to(torch.uint8)
    inputs = normalized(encoder, resized[None])
    chosen = DiscoveryOptions()
    source = source_of(encoder, chosen)
    with evaluating(encoder), torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        features = Padded(encoder, source)(inputs, attention=True, keys=True)
        patches = features.patches
        if source == "pooling" and encoder.norm_order == "after":
            patches = encoder.norm(patches)
        rows = class_rows(encoder, inputs)
        boxes = boxes_of(encoder, features, size, chosen)
    grid = tuple(features.grid)
    maps = Maps(
        name=name,
        image=visible(resized[None])[0].permute(1, 2, 0).cpu().numpy(),
        original=tuple(image.shape[-2:]),
        grid=grid,
        layers=layers_of(encoder, rows, features.attention),
        tokens=F.normalize(patches[0].float().cpu(), dim=1),
        boxes=boxes,
    )
    maps.masks = masks_of(maps.guide, grid, number)
    return maps


def whole_size(encoder, size: tuple[int, int], side: int | None = None) -> tuple[int, int]:
    """Return the size (h, w) at which a model sees a whole image of `size`: the same aspect, whole patches.

    Its area is about that of a square of `side` pixels. A network that takes one size only gets that size.
    """
    backbone = getattr(encoder, "backbone", None)
    only = getattr(encoder, "only_size", None)
    if only is None and getattr(getattr(backbone, "family", None), "fixed_size", False):
        only = backbone.image_size
    if only is not None:
        return tuple(only)
    area = side * side if side is not None else encoder.image_size[0] * encoder.image_size[1]
    divisor = getattr(getattr(backbone, "family", None), "divisor", None)
    units = [max(unit, divisor(backbone) if divisor else 1) for unit in views.patch_of(encoder)]
    scale = (area / (size[0] * size[1])) ** 0.5
    height, width = (max(1, round(length * scale / unit)) * unit for length, unit in zip(size, units))
    return height, width


def class_rows(encoder, inputs: Tensor) -> Tensor | None:
    """Return the class token's attention in every block, [depth, H, N], or None without one."""
    backbone = getattr(encoder, "backbone", None)
    if not getattr(backbone, "has_class_token", False) or not hasattr(backbone, "class_attention"):
        return None
    return backbone.class_attention(inputs)[0].float().cpu()


def layers_of(encoder, rows: Tensor | None, attention: Tensor | None) -> list[Layer]:
    """Return the layers of attention: blocks first, then that of the pooling, [1, H, N], unless it is the last block's.

    Without attention of the pooling no masking follows one, and no block is shown.
    """
    if attention is None:
        return []
    queries = getattr(encoder.pooling, "k", 1)
    own = Layer(layer_title(encoder.pooling), attention[0].float().cpu(), patch_attention(attention, queries)[0].cpu())
    if rows is None:
        return [own]
    blocks = [Layer(f"block {i + 1}", heads, patch_attention(heads[None])[0]) for i, heads in enumerate(rows)]
    if "cls_attention" in encoder.pooling.needs:
        own.title = blocks.pop().title
    return [*blocks, own]


def layer_title(pooling) -> str:
    """Return the name of a pooling's attention."""
    name = pooling_name(pooling)
    return {"cls": "class token", "simpool": "SimPool"}.get(name, name)


def boxes_of(encoder, features, size: tuple[int, int], chosen: DiscoveryOptions) -> dict:
    """Return the boxes of LOST and DINO-seg in pixels of the image, without empty ones; {} without SciPy."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        return {}
    methods = ("lost", "dino_seg") if features.attention is not None else ("lost",)
    patch = tuple(length / cells for length, cells in zip(size, features.grid))
    found = found_boxes(encoder, features, size, patch, chosen, methods)
    found = {BOXES[name]: found[name].tolist() for name in methods}
    return {name: tuple(box) for name, box in found.items() if box[2] > box[0] and box[3] > box[1]}


def masks_of(guide: Tensor | None, grid: tuple[int, int], number: int) -> dict[str, Tensor]:
    """Return the masks that each masking draws for image `number` at every ratio of RATIOS, bool [101, N].

    guide [N]: the attention; without it those that follow one are left out.
    """
    count = len(RATIOS)
    keys = ViewKeys(0, 0, torch.full((count,), number), torch.zeros(count, dtype=torch.int64))
    per_view = None if guide is None else guide.expand(count, 1, -1)
    masks = {}
    for name in DRAWN:
        if guide is None and MASKINGS[name].needs_attention:
            continue
        masking = MASKINGS[name](ratio=0.0, var=0.0, prob=1.0)
        masking.ratios = lambda keys, draw=0: RATIOS  # one image at every ratio, as if these had been drawn
        masks[name] = masking.choose_patches(per_view, grid, keys, torch.device("cpu")).mask
    return masks
