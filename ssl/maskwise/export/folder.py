"""The exported folder: what is written into it, whole or not at all, and an encoder read back from it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from maskwise.functional.errors import UserError
from maskwise.nn.backbone import read_tensors
from maskwise.nn.encoder import Encoder

CONFIG, MODEL = "config.json", "model.safetensors"
FORMAT = "maskwise-encoder-1"


def write(encoder: Encoder, folder) -> None:
    """Write config.json and model.safetensors as a whole or not at all; an earlier export there is replaced.

    Raises UserError for a folder that holds something else or cannot be written.
    """
    from safetensors.torch import save_file

    with replacing(folder) as aside:
        tensors = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
        save_file(tensors, aside / MODEL, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps({"format": FORMAT, "encoder": encoder.spec()}, indent=2) + "\n")


@contextlib.contextmanager
def replacing(folder) -> Iterator[Path]:
    """A folder aside, put in the place of `folder` when the block ends well and removed when it does not.

    Raises UserError where `folder` holds something other than an export or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or spec_of(folder) is not None)):
        raise UserError(f"{folder} holds something other than an export: give a new folder")
    aside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield aside
        for file in sorted(aside.rglob("*")):
            _flush(file)
        aside.chmod(0o755)
        if folder.exists():
            old = aside.with_name(aside.name + ".old")
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}; give a folder that can be written") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)  # nothing is there after a success


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def spec_of(folder: Path) -> dict | None:
    """The encoder's spec in an exported folder, or None where there is none of ours."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return None
    return config["encoder"] if isinstance(config, dict) and config.get("format") == FORMAT else None


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The spec and the encoder's tensors of an exported folder."""
    return spec_of(folder), read_tensors(folder / MODEL)
