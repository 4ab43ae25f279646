"""Compatibility: names in earlier files, NumPy scalars in pickles, and a torchvision built for another torch."""

import pickle

import numpy as np
import torch

# accepted wherever a recipe is read, so that an earlier run continues with its own command and files
RENAMED_RECIPE_KEYS = {
    "augment.spare_first": "augment.skip_first",
    "crops.grey_prob": "crops.gray_prob",
    "method.pad_rows": "method.pad_multiple",
    "pooling.normalise": "pooling.normalize",
    "pooling.weight_start": "pooling.weight_init",
}
# options of an evaluation, as in evaluate.also
RENAMED_EVALUATION_OPTIONS = {
    "attentive": {"normalise": "normalize", "weight_start": "weight_init"},
    "logistic": {"normalise": "normalize"},
}

# parts of tensor names in checkpoints
RENAMED_TENSORS = {"decoder.neighbours.": "decoder.neighbors."}
# numbers in metrics.jsonl
RENAMED_METRICS = {"center_move": "center_shift", "feature_twins": "feature_duplicates"}
# kinds of alarms in metrics.jsonl
RENAMED_ALARMS = {
    "same": "student_equals_teacher",
    "teacher": "stale_teacher",
    "stuck": "loss_at_log_k",
    "uniform": "uniform_targets",
    "point": "single_prototype",
    "patch_uniform": "uniform_patch_targets",
    "patch_point": "single_patch_prototype",
    "flat": "constant_features",
    "twins": "duplicate_features",
    "line": "rank_collapse",
    "masks": "identical_masks",
}

_declared = []


def present_names(section: str, options: dict[str, object]) -> dict[str, object]:
    """Return the options of a recipe section, as an exported model stores them, under their present names."""
    renamed = {key: RENAMED_RECIPE_KEYS.get(f"{section}.{key}", key).removeprefix(f"{section}.") for key in options}
    return {renamed[key]: value for key, value in options.items()}


def rename_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give tensors of a checkpoint their present names."""
    renamed = {}
    for name, tensor in tensors.items():
        for before, after in RENAMED_TENSORS.items():
            name = name.replace(before, after)
        renamed[name] = tensor
    return renamed


def ready_torchvision() -> None:
    """Make `import torchvision` work where its compiled part does not load; call before importing it or timm."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # The Python part registers shapes for two operators and fails where they are not declared; nothing calls them.
        library = torch.library.Library("torchvision", "FRAGMENT")
        _declared.append(library)  # the declaration ends with the last reference
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


def plain_scalar(dtype, data=b""):
    """Restore a NumPy scalar (a number or a text) from its bytes in a pickle.

    Raises UnpicklingError for anything else.
    """
    data = data.encode("latin1") if isinstance(data, str) else data
    if getattr(dtype, "kind", "V") not in "biufcSU":
        raise pickle.UnpicklingError("an object in place of a number")
    return np.frombuffer(data, dtype=np.dtype(dtype.str), count=1)[0]
