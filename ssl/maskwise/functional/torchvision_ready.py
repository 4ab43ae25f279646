"""Importing a torchvision whose compiled part does not fit this torch, as beside a CPU-only torch."""

import torch

_declared = []


def ready_torchvision() -> None:
    """Make `import torchvision` work; to be called before it, or timm, is imported."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # its Python part only registers shapes of two operators; once they are declared it imports, and nothing here calls them
        library = torch.library.Library("torchvision", "FRAGMENT")
        _declared.append(library)  # dropped with its last reference
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
