"""Bytes that a rank hands to the collectives of one training step, from method and recipe.

Symbols as in docs/performance.md: R ranks, B images of a rank, V global crops of an image, D width of the encoder,
d bottleneck and K prototypes of the head, A micro-batches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.errors import UserError
from maskwise.methods.base import Method
from maskwise.methods.student_teacher import StudentTeacher
from maskwise.recipe.recipe import Recipe

MIB = 1 << 20
BUCKET_LIMITS = (1 * MIB, 25 * MIB)  # of DDP: the first bucket, all others
ITERATIONS = 3  # of Sinkhorn-Knopp
CAUSES = 3  # of a skipped step: loss, gradient, center
FLOAT32, FLOAT64, INT64 = 4, 8, 8


class Collective(NamedTuple):
    """A kind of collective, the ranks that take part in it, and its purpose."""

    purpose: str
    kind: str  # all_reduce, all_gather or reduce_scatter
    ranks: int


class Volume(NamedTuple):
    """Calls and payload bytes per step and rank."""

    calls: int
    bytes: int


Traffic = dict[Collective, Volume]


def step_traffic(
    recipe: Recipe, method: Method, ranks: int, *, nodes: int = 1, packed: bool = False, loop: bool = False
) -> Traffic:
    """Return the traffic of a step in which nothing is logged, evaluated or saved.

    The payload of an all-reduce is the tensor, of an all-gather its output, of a reduce-scatter its input. nodes: of
    `speed.shard=hsdp`. packed: global and local crops pass the student in one call, as on GPUs. loop: with the signal
    to stop that the loop exchanges after each step. Raises UserError for batch norm, whose statistics are not counted.
    """
    if any(isinstance(part, _BatchNorm) for part in method.student.modules()):
        raise UserError("the bytes of synchronized batch norms are not counted: choose a network without batch norm")
    if ranks == 1:
        return {}
    entries = [*method_entries(recipe, method, ranks), ("non-finite steps", "all_reduce", ranks, CAUSES * INT64)]
    if recipe.speed.shard == "none":
        sizes = bucket_sizes(reversed([parameter.nbytes for parameter in trainable(method)]))
        entries += [("gradients", "all_reduce", ranks, size) for size in sizes]
    else:
        entries += sharded_entries(recipe, method, ranks, nodes if recipe.speed.shard == "hsdp" else 1, packed)
    if loop:
        entries.append(("stop signal", "all_reduce", ranks, INT64))
    return summed(entries)


def summed(entries) -> Traffic:
    """Return the traffic of single calls (purpose, kind, ranks, bytes)."""
    calls: dict[Collective, list[int]] = defaultdict(list)
    for purpose, kind, ranks, size in entries:
        calls[Collective(purpose, kind, ranks)].append(size)
    return {collective: Volume(len(sizes), sum(sizes)) for collective, sizes in sorted(calls.items())}


def as_rows(traffic: Traffic) -> list[dict]:
    """Return traffic as rows of a file of results."""
    return [{**collective._asdict(), **volume._asdict()} for collective, volume in traffic.items()]


def wire_bytes(traffic: Traffic) -> float:
    """Return the bytes that a rank sends by ring algorithms, without headers."""
    return sum(ring_share(collective) * volume.bytes for collective, volume in traffic.items())


def ring_share(collective: Collective) -> float:
    """Return sent bytes over payload: (R - 1) / R, twice that for an all-reduce."""
    ranks = collective.ranks
    return (2 if collective.kind == "all_reduce" else 1) * (ranks - 1) / ranks


def trainable(method: nn.Module) -> list[nn.Parameter]:
    """Return the parameters with gradients, in order of registration."""
    return [parameter for parameter in method.parameters() if parameter.requires_grad]


def bucket_sizes(gradients, limits: tuple[int, int] = BUCKET_LIMITS) -> list[int]:
    """Return the bytes of DDP's buckets for gradients (bytes) in the order in which they become ready.

    A bucket is closed by the gradient that reaches its limit.
    """
    sizes, filled = [], 0
    for gradient in gradients:
        filled += gradient
        if filled >= limits[min(len(sizes), 1)]:
            sizes.append(filled)
            filled = 0
    return [*sizes, filled] if filled else sizes


def method_entries(recipe: Recipe, method: Method, ranks: int) -> list[tuple]:
    """Return the calls of the method itself: centers, Sinkhorn-Knopp, KoLeo, number of patches."""
    if not isinstance(method, StudentTeacher):
        return []
    head, entries = method.student.head, []
    patches = method.has_patch_loss
    prototypes = [head.prototypes]
    if patches:
        prototypes += [head.patch_prototypes or head.prototypes] * (2 if method.visible_weight else 1)
    if method.targets == "sinkhorn":
        sizes = [2 * k * FLOAT64 for k in prototypes] + [k * FLOAT64 for k in prototypes]
        entries += [("Sinkhorn-Knopp", "all_reduce", ranks, size) for size in sizes * ITERATIONS]
    else:  # mean bottlenecks: the last layer is linear
        size = (1 + patches) * head.bottleneck * FLOAT32
        entries += [("centers", "all_reduce", ranks, size)] * recipe.train.accumulate
    if method.koleo:
        views, images = method.views, recipe.train.batch_size  # of all ranks
        entries.append(("KoLeo", "all_reduce", ranks, views * images * method.student.encoder.dim * FLOAT32))
    if patches and method.patch_loss == "token":
        entries += [("number of patches", "all_reduce", ranks, FLOAT32)] * (len(prototypes) - 1)
    return entries


def sharded_entries(recipe: Recipe, method: Method, ranks: int, nodes: int, packed: bool) -> list[tuple]:
    """Return the calls of FSDP2: weights gathered, gradients reduced, norms summed.

    Weights outside the blocks are gathered once per micro-batch. A block of the student is gathered for each pass
    forward and backward, and one of the teacher for each pass. Without micro-batches FSDP2 also prefetches the last
    block of the teacher, which ran before the student's first, at the end of the backward pass.
    """
    shards, accumulate = ranks // nodes, recipe.train.accumulate
    student, teacher = blocks(method.student.encoder.backbone), blocks(method.teacher.encoder.backbone)
    in_blocks = {parameter for block in (*student, *teacher) for parameter in block.parameters()}
    others = [parameter for parameter in method.parameters() if parameter not in in_blocks]
    passes = 1 if packed or not recipe.crops.local_number else 2

    gathers = [others] * accumulate
    for block in student:
        gathers += [list(block.parameters())] * (2 * passes * accumulate)
        if method.koleo and accumulate > 1:  # features of the global crops before the loss
            gathers += [list(block.parameters())] * accumulate
    for block in teacher:
        gathers += [list(block.parameters())] * accumulate
    if accumulate == 1:
        gathers += [list(block.parameters()) for block in teacher[-1:]]
    reduced = [*(list(block.parameters()) for block in student), [p for p in others if p.requires_grad]] * accumulate

    entries = [("weights", "all_gather", shards, padded_bytes(group, shards)) for group in gathers]
    for group in reduced:
        size = padded_bytes(group, shards)
        entries.append(("gradients", "reduce_scatter", shards, size))
        if nodes > 1:
            entries.append(("gradients", "all_reduce", nodes, size // shards))
    tensors = trainable(method)
    entries.append(("gradient norms", "all_reduce", shards, len(tensors) * FLOAT64))
    if recipe.optimizer.name == "lars":
        entries += [("gradient norms", "all_reduce", shards, 2 * FLOAT64) for tensor in tensors if tensor.ndim > 1]
    return entries


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, which FSDP2 gathers one by one."""
    children = dict(backbone.named_children()).get("blocks", ())
    return [block for block in children if not isinstance(block, nn.Sequential)]


def padded_bytes(parameters: list[Tensor], shards: int) -> int:
    """Return the bytes of tensors whose rows are padded to a multiple of the shards."""
    return sum(
        shards * math.ceil(len(parameter) / shards) * math.prod(parameter.shape[1:]) * parameter.element_size()
        for parameter in parameters
    )
