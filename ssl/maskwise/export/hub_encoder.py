"""`HubEncoder`: an encoder with the three methods that huggingface_hub gives every library's models."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from maskwise.export import folder, hub, layouts
from maskwise.nn.encoder import Encoder
from maskwise.nn.tokens import Features


class HubEncoder(nn.Module, ModelHubMixin, library_name="maskwise", tags=["maskwise"], pipeline_tag="image-feature-extraction"):
    """An encoder, pooling included, with from_pretrained, save_pretrained and push_to_hub.

    What it writes is the exported folder of `maskwise.export`; what it reads is whatever `maskwise.load` reads.
    Attributes: encoder. Raises UserError as these do.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, mask: Tensor | None = None, **options) -> Features:
        """As the encoder: float, normalised images [B, 3, H, W] -> Features."""
        return self.encoder(images, mask, **options)

    @property
    def transform(self):
        """What makes an image file's pixels an input."""
        return self.encoder.transform

    def _save_pretrained(self, save_directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=save_directory) as place:
            made = folder.write(self.encoder, Path(place) / save_directory.resolve().name)
            for name in hub.REPLACED:
                (save_directory / name).unlink(missing_ok=True)
            shutil.copytree(made, save_directory, dirs_exist_ok=True)

    @classmethod
    def _from_pretrained(cls, *, model_id, revision=None, cache_dir=None, force_download=False, local_files_only=False, token=None, **options):
        options.pop("config", None)
        if Path(model_id).is_dir():
            return cls(layouts.load(model_id, **options)).eval()
        place = hub.fetch(model_id, revision, cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only, token=token)
        return cls(layouts.load(place, **options)).eval()
