"""The projection head of a run, read back from its last checkpoint."""

from __future__ import annotations

from pathlib import Path

from maskwise.export import heads
from maskwise.functional.errors import UserError
from maskwise.nn.backbone import read_tensors
from maskwise.nn.heads import ProjectionHead


def load_head(run, weights: str = "teacher") -> ProjectionHead:
    """The head of a run folder, in eval mode; its widths are read from the tensors. Raises UserError where there is none."""
    last = Path(run) / "checkpoints" / "last"
    if not last.is_file():
        raise UserError(f"{run} holds no checkpoint to read a head from; give a run folder")
    file = last.parent / last.read_text().strip() / "model.safetensors"
    front = f"{weights}.head."
    state = {key[len(front) :]: value for key, value in read_tensors(file).items() if key.startswith(front)}
    try:
        head = ProjectionHead(**heads.arguments(state))
        head.load_state_dict(state)
    except (heads.Unfit, RuntimeError) as error:
        raise UserError(f"{file} holds no {weights} head that can be read ({str(error).splitlines()[0]}); give a run folder") from None
    return head.eval()
