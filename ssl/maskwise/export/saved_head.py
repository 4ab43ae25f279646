"""Loading of a run's projection head from its last checkpoint."""

from __future__ import annotations

from maskwise.errors import UserError
from maskwise.export import run_checkpoint
from maskwise.export.formats import projection_heads
from maskwise.nn.backbones.weights_file import read_tensors
from maskwise.nn.heads import ProjectionHead


def load_head(run, weights: str = "teacher") -> ProjectionHead:
    """Load the projection head of a run folder, in eval mode; widths are inferred from its tensors.

    Raises UserError for a folder without one.
    """
    checkpoint = run_checkpoint.find(run)
    if checkpoint is None:
        raise UserError(f"{run} holds no checkpoint with a projection head; give a run folder")
    file = checkpoint.model
    prefix = f"{weights}.head."
    state = {key[len(prefix) :]: value for key, value in read_tensors(file).items() if key.startswith(prefix)}
    try:
        head = ProjectionHead(**projection_heads.arguments(state))
        head.load_state_dict(state)
    except (projection_heads.IncompatibleHead, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} holds no {weights} head that can be read ({reason}); give a run folder") from None
    return head.eval()
