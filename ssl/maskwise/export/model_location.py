"""Location of the model that method.start_from names: a path, timm's local cache, or the Hub."""

from __future__ import annotations

from pathlib import Path

import torch

from maskwise.errors import UserError

KEY = "method.start_from"
TIMM = "timm:"  # beginning of a timm name in place of a path


def locate(name: str, key: str = KEY) -> tuple[Path, str | None]:
    """Return the file or folder of an initial model, and its timm name if a timm name was given.

    Only hub: names use the network; messages name `key` of the recipe. Raises UserError if the model is neither on disk
    nor in a cache.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path, None
    if name.startswith(("hub:", "hf-hub:")):
        from maskwise.export import hub_repository  # huggingface_hub is slow to import

        return hub_repository.fetch(*hub_repository.parse_name("hub:" + name.partition(":")[2])), None
    model = name.removeprefix(TIMM)
    import timm

    if timm.is_model(model.partition(".")[0]) and "/" not in model:
        return cached_timm_weights(model, f"{key}: ", f"{key}=hub:"), model
    raise UserError(
        f"{key}: {name} does not exist; give a run folder, an exported folder, a weights file, a timm name, "
        "or hub:OWNER/NAME"
    )


def cached_timm_weights(model: str, at: str = "", hub: str = "hub:") -> Path:
    """Return a timm model's pretrained weights in the Hub's or torch's local cache; raises UserError without them.

    A message begins with `at` and names the repository after `hub`.
    """
    import huggingface_hub
    import timm

    from maskwise.nn.backbones.timm_registry import check_name

    check_name(model.partition(".")[0])
    try:
        config = timm.models.get_pretrained_cfg(model)
    except RuntimeError:  # an unknown tag
        config = None
    if config is None or not config.has_weights:
        tags = ", ".join(timm.list_pretrained(f"{model.partition('.')[0]}.*")[:4])
        remedy = f"; it has {tags}" if tags else ": give a file"
        raise UserError(f"{at}timm has no pretrained weights of {model}{remedy}")
    repository = config.hf_hub_id
    if repository:
        for file in filter(None, (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")):
            cached = huggingface_hub.try_to_load_from_cache(repository, file)
            if isinstance(cached, str):
                return Path(cached)
    if config.url:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]
        if cached.is_file():
            return cached
    remedy = f"{hub}{repository} downloads them" if repository else "give a file"
    raise UserError(
        f"{at}timm's weights of {model} are not in the local cache and a timm name never uses the network; {remedy}"
    )
