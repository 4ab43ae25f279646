"""Self-supervised vision pretraining that chooses what to hide; the public names, imported on first use."""

import sys
from types import ModuleType

import maskwise.export  # empty until one of its modules is asked for

__version__ = "0.2.0.dev0"

HOMES = {
    "load": "maskwise.export.load",
    "push_to_hub": "maskwise.export.release",
    "read_recipe": "maskwise.recipe.reading",
    "train": "maskwise.build",
    "evaluate": "maskwise.api",
    "embed": "maskwise.build.embedding",
    "look": "maskwise.api",
    "Embedder": "maskwise.build.embedder",
    "Backbone": "maskwise.nn",
    "Encoder": "maskwise.nn",
    "Features": "maskwise.nn",
    "Tokens": "maskwise.nn",
    "Pooled": "maskwise.nn",
    "SimPool": "maskwise.nn",
    "ProjectionHead": "maskwise.nn",
    "DINO": "maskwise.methods",
    "IBOT": "maskwise.methods",
    "Report": "maskwise.evaluation.report",
}
__all__ = [*HOMES, "export", "__version__"]


class Exporting(ModuleType):
    """The package `maskwise.export`, which is also the function of that name."""

    def __call__(self, model, folder, **options):
        """Write an encoder, or what `maskwise.load` accepts, as a folder; returns it.

        Options: those of `maskwise.export.release.export`.
        """
        from maskwise.export.release import export

        return export(model, folder, **options)


sys.modules["maskwise.export"].__class__ = Exporting


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module 'maskwise' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
