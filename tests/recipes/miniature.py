"""Shipped recipes at the size of a test: one table of what may be changed, so that everything else is the recipe's own."""

import functools

from maskwise.recipe import Recipe, read_recipe, shipped

SIZES = (
    "crops.global_size=32", "crops.local_size=16", "backbone.image_size=32", "backbone.patch_size=8",
    "backbone.embed_dim=48", "backbone.depth=2", "backbone.num_heads=3",
    "head.prototypes=64", "head.hidden=64", "head.bottleneck=16",
    "train.batch_size=8", "evaluate.knn_every=0", "evaluate.pictures_every=0", "speed.workers=0",
)  # fmt: skip
IMAGES = ("data=shapes", "data.count=16", "data.size=40")
WITHOUT_START = ("method.start_from=null", "method.head_warmup_epochs=null")
# Recipes whose parts are still to come, and what lets their other keys be read meanwhile.
NOT_YET = {
    "dino/resnet50_100ep": ("pooling=simpool",),
    "ibot/swint14_300ep": ("pooling=simpool",),
    "ibot/swint7_300ep": ("pooling=simpool",),
    "simpool/convnext_small_dino": (),
    "simpool/resnet50_dino": (),
}
RECIPES = shipped()
RUNNABLE = [name for name in RECIPES if name not in NOT_YET]


@functools.lru_cache
def resolved(name: str) -> Recipe:
    """A shipped recipe, its model not tried (the miniature is)."""
    return read_recipe(name, *NOT_YET.get(name, ()), try_model=False)


def miniature(name: str, *more: str) -> Recipe:
    """A shipped recipe made small, nothing but the sizes changed; one that continues a model begins from nothing (tests/export continues them)."""
    return read_recipe(name, *IMAGES, *SIZES, *(WITHOUT_START if name.startswith("continue/") else ()), *more)
