"""Numbers of attention heads of published vision transformers; weights do not tell them."""

from __future__ import annotations

from torch import Tensor

HEADS = {  # width, depth -> heads in the code of DINO, iBOT, MAE, MoCo v3, DINOv2, DeiT and timm
    (192, 12): 3,
    (384, 12): 6,
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 32): 16,
    (1408, 40): 16,
    (1536, 40): 24,
    (1664, 48): 16,
}
DINOV3_HEADS = {**HEADS, (1280, 32): 20, (4096, 40): 32}
MOCO_V3_HEADS = {**HEADS, (384, 12): 12}
ARCHITECTURES = {  # --arch in the code of DINO, iBOT and SimPool, of any depth: width -> heads
    "vit_tiny": {192: 3},
    "vit_small": {384: 6},
    "vit_base": {768: 12},
    "vit_large": {1024: 16},
}
# MoCo v3's ViT-S, and the ViT-T and ViT-S of solo-learn's MAE and MoCo v3, have 12 heads; with a table of sines and
# cosines these widths are therefore not certain.
UNCERTAIN_WIDTHS = (192, 384)


def heads_of(width: int, depth: int, table: Tensor | None = None, project: str = "", arch: str = "") -> int | None:
    """Return the number of heads of the published network of this size, None if there is none or several.

    `table` is the position table [1, 1 + N, D], whose first row is zero if it is made of sines and cosines. `arch`
    is the name in the run's arguments; it tells the heads of a network of its width and another depth.
    """
    if project in ("dinov3", "moco_v3"):
        return {"dinov3": DINOV3_HEADS, "moco_v3": MOCO_V3_HEADS}[project].get((width, depth))
    if width in UNCERTAIN_WIDTHS and table is not None and not bool(table[:, 0].any()):
        return None
    of_arch = ARCHITECTURES.get(arch.replace("deit", "vit"), {})
    return HEADS.get((width, depth), of_arch.get(width))
