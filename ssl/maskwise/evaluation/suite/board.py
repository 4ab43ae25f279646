"""Numbers and pictures of several evaluations for TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

from maskwise.evaluation.report import Report


def board(reports: Mapping[str, Report], out: Path) -> None:
    """Write the numbers and pictures for TensorBoard to out/tensorboard."""
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as writer:
        for task, report in reports.items():
            for name, value in report.numbers.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    writer.add_scalar(f"{task}/{name}", value, 0, walltime=time.time())
        for path in sorted((out / "pictures").glob("*.png")):
            with Image.open(path) as picture:
                writer.add_image(path.stem, np.array(picture), 0, dataformats="HWC")
