"""Networks in one flat state dict, told apart by the beginnings of their keys.

Sources: MoCo v3 (moco/builder.py), DINOv2 (dinov2/train/ssl_meta_arch.py), lightly (examples, benchmarks),
lightly-train (_methods, _models), solo-learn (solo/methods/base.py).
"""

from __future__ import annotations

from torch import Tensor

from maskwise.nn.backbones.pretrained import strip_prefixes

PAIRS = (  # project, beginning of the averaged network's keys, beginning of the trained network's
    ("dinov2", "teacher.", "student."),
    ("moco_v3", "momentum_encoder.", "base_encoder."),
    ("moco", "encoder_k.", "encoder_q."),
    ("solo_learn", "momentum_backbone.", "backbone."),
    ("solo_learn", "momentum_encoder.", "encoder."),
    ("lightly", "teacher_backbone.", "student_backbone."),
    ("lightly", "backbone_momentum.", "backbone."),
    ("lightly", "backbone.", "student_backbone."),
    ("lightly", "backbone.", "query_backbone."),
    ("lightly_train", "teacher_embedding_model.", "student_embedding_model."),
    ("lightly_train", "teacher_embedding_model_wrapper.", "student_embedding_model_wrapper."),
)
SINGLE = (  # project, beginning of the only network's keys
    ("dinov2", "teacher."),
    ("dinov2", "student."),
    ("moco_v3", "base_encoder."),
    ("moco", "encoder_q."),
    ("lightly_train", "student_embedding_model."),
    ("lightly_train", "embedding_model."),
)
MARKERS = ("patch_embed.proj.weight", "conv1.weight", "0.weight", "conv_stem.weight", "stem.0.weight")
WRAPPERS = ("model_wrapper.", "wrapped_model.", "_model.", "_features.", "vit.", "model.", "encoder.")
HEAD, HEADS = "head.", {"momentum_backbone.": "momentum_head", "backbone.": "head"}  # in the form of DINO's head
SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def split(state: dict[str, Tensor]) -> tuple[str, dict[str, dict[str, Tensor]], dict[str, list[str]]]:
    """Return the project, the networks by role ("only" for a single one), and the keys of other parts by name.

    The keys of a network lose their beginning; a projection head in the form of DINO's keeps `head.`.
    """
    found = [name for name in PAIRS if all(any(key.startswith(start) for key in state) for start in name[1:])]
    if found:
        project, *starts = found[0]
        roles = dict(zip(("teacher", "student"), starts))
    else:
        single = [name for name in SINGLE if any(key.startswith(name[1]) for key in state)]
        if not single:
            network, others = inside(state)
            return project_of(others), {"only": network}, by_part(others)
        project, start = single[0]
        roles = {start.removesuffix("."): start} if project == "dinov2" else {"only": start}
    networks, parts = {}, by_part([key for key in state if not key.startswith(tuple(roles.values()))])
    for role, start in roles.items():
        part = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        networks[role], left = inside(strip_prefixes(part, ("module",)))
        for name, keys in by_part(left).items():
            parts.setdefault(name, []).extend(start + key for key in keys)
    if project == "solo_learn":
        move_heads(networks, roles, state, parts)
    return project, networks, parts


def by_part(keys: list[str]) -> dict[str, list[str]]:
    """Group keys by the part of the training that they begin with, such as "projector"."""
    names = dict.fromkeys(key.partition(".")[0] for key in keys)
    return {name: [key for key in keys if key.partition(".")[0] == name] for name in names}


def inside(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Take a network out of its wrappers; also return the keys beside it."""
    others = []
    if any(key.startswith("backbone.") for key in state):
        others = [key for key in state if not key.startswith(("backbone.", HEAD))]
        state = strip_prefixes({key: value for key, value in state.items() if key not in others})
    while wrapper := next((name for name in WRAPPERS if _wraps(name, state)), None):
        beside = [key for key in state if not key.startswith((wrapper, HEAD)) and key != "mask_token"]
        others += beside
        state = {key.removeprefix(wrapper): value for key, value in state.items() if key not in beside}
    if "0.weight" in state and any(key.startswith("4.0.conv1.") for key in state):  # children of torchvision's ResNet
        state = {
            f"{SEQUENTIAL.get(key.partition('.')[0], key.partition('.')[0])}.{key.partition('.')[2]}": value
            for key, value in state.items()
        }
    return state, others


def _wraps(wrapper: str, state: dict[str, Tensor]) -> bool:
    """Return whether a network stands below this name, perhaps inside further wrappers."""
    inner = [key.removeprefix(wrapper) for key in state if key.startswith(wrapper)]
    return any(key in MARKERS or key.startswith(WRAPPERS) and key.endswith(MARKERS) for key in inner)


def move_heads(networks: dict, roles: dict[str, str], state: dict[str, Tensor], parts: dict[str, list[str]]) -> None:
    """Give solo-learn's networks the DINO heads that stand beside them, in place."""
    for role, start in roles.items():
        part = HEADS.get(start, "")
        if any(key.startswith(f"{part}.last_layer.") for key in parts.get(part, ())):
            heads = parts.pop(part)
            networks[role] |= {HEAD + key.removeprefix(f"{part}."): state[key] for key in heads}


def project_of(others: list[str]) -> str:
    """Return the project that the parts beside a single network are named by; "" for none."""
    if any(key.startswith("projector.") for key in others) and any(key.startswith("classifier.") for key in others):
        return "solo_learn"
    return "lightly" if any(key.startswith("projection_head.") for key in others) else ""
