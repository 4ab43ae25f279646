"""`HubEncoder`: an encoder with huggingface_hub's from_pretrained, save_pretrained and push_to_hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from maskwise.export import hub_repository, load, write
from maskwise.nn.encoder import Encoder
from maskwise.nn.tokens import Features


class HubEncoder(
    nn.Module, ModelHubMixin, library_name="maskwise", tags=["maskwise"], pipeline_tag="image-feature-extraction"
):
    """An encoder, pooling included, with the Hub methods of ModelHubMixin.

    Writes the exported folder of `maskwise.export` and reads what `maskwise.load` reads; raises UserError as they do.
    Attributes: encoder.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, mask: Tensor | None = None, **options) -> Features:
        """Run the encoder: float, normalized images [B, 3, H, W] -> Features."""
        return self.encoder(images, mask, **options)

    @property
    def transform(self):
        """The encoder's image transform."""
        return self.encoder.transform

    def _save_pretrained(self, save_directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=save_directory) as temporary:
            exported = write.write(self.encoder, Path(temporary) / save_directory.resolve().name)
            files = {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()}
            for name in sorted(files):  # each file is replaced as a whole
                (save_directory / name).parent.mkdir(parents=True, exist_ok=True)
                (exported / name).replace(save_directory / name)
            for name in set(map(Path, hub_repository.REPLACED)) - files:
                (save_directory / name).unlink(missing_ok=True)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id,
        revision=None,
        cache_dir=None,
        force_download=False,
        local_files_only=False,
        token=None,
        **options,
    ):
        options.pop("config", None)
        if Path(model_id).is_dir():
            return cls(load.load(model_id, **options)).eval()
        folder = hub_repository.fetch(
            model_id,
            revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls(load.load(folder, **options)).eval()
