"""The patches that a Hint masking reveals."""

import torch

from maskwise.methods.masking import MASKINGS


def revealed(masking, steps, images, grid=(4, 4), views=2):
    """Count the patches that a masking reveals, against attmask_high of the same draws, in each step's batch."""
    high = MASKINGS["attmask_high"](masking.ratio, masking.var, masking.prob, masking.ratio_per, masking.seed)
    counts = []
    for step in steps:
        attention = torch.rand(views * images, 1, grid[0] * grid[1], generator=torch.Generator().manual_seed(step))
        options = {"step": step, "sample_ids": torch.arange(images), "views": views}
        whole, hint = high(attention, grid, **options), masking(attention, grid, **options)
        assert not (hint & ~whole).any(), "a hint only reveals"
        counts.append(int((whole & ~hint).sum()))
    return counts
