"""The user's cache folder."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the user's cache folder for maskwise; None where caching is off or there is no home folder.

    `MASKWISE_CACHE`, else `XDG_CACHE_HOME`/maskwise, else ~/.cache/maskwise; `MASKWISE_CACHE=none` switches it off.
    """
    setting = os.environ.get("MASKWISE_CACHE")
    if setting == "none":
        return None
    if setting:
        return Path(setting)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskwise"
    except RuntimeError:  # no home folder
        return None
