"""What the teacher says about one batch, or about one micro-batch of it, before the student looks."""

from typing import NamedTuple

from torch import Tensor

from maskwise.methods.masking import Hidden


class Lesson(NamedTuple):
    """The teacher's side of a (micro-)batch; bottlenecks rather than logits, since the last layer can make those in pieces.

    pooled [G * B, D] are its features, z [G * B, d] their bottlenecks, hidden what the student will not see, rows [M] the
    hidden patches among all and patch_z [M, d] their bottlenecks. `aims` [G * B, K] and `patch_aims` [M, K] hold
    distributions that only the whole batch could give (Sinkhorn), else None. `tokens` is the number of hidden patches of
    the whole batch of all ranks where the loss divides by it, and `parts` the number of micro-batches of this step.
    """

    pooled: Tensor
    z: Tensor
    hidden: Hidden
    rows: Tensor | None = None
    patch_z: Tensor | None = None
    aims: Tensor | None = None
    patch_aims: Tensor | None = None
    tokens: Tensor | None = None
    parts: int = 1
