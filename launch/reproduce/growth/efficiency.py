"""Efficiency of data-parallel training on many GPUs, calculated from the traffic of a step: nothing is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launch.reproduce.growth.traffic import BUCKET_LIMITS, Collective, bucket_sizes, ring_share, step_traffic, trainable
from maskwise.errors import UserError
from maskwise.methods.base import Method
from maskwise.recipe.recipe import Recipe

NODE = 8  # GPUs
NVLINK = 450e9  # bytes per second and direction of a GPU: NVLink 4


@dataclass(frozen=True)
class Interconnect:
    """A network between nodes: bytes per second and direction of a node, seconds of a hop (assumed)."""

    title: str
    node_bytes: float
    hop: float


INTERCONNECTS = {
    "NDR": Interconnect("InfiniBand NDR, 400 Gb/s per GPU", NODE * 50e9, 5e-6),
    "HDR": Interconnect("InfiniBand HDR, 200 Gb/s per GPU", NODE * 25e9, 5e-6),
    "100 GbE": Interconnect("Ethernet, 100 Gb/s per node", 12.5e9, 30e-6),
    "25 GbE": Interconnect("Ethernet, 25 Gb/s per node", 3.125e9, 30e-6),
}


@dataclass(frozen=True)
class Assumptions:
    """Numbers of the model that are not measured here."""

    rate: float = 0.8  # of the line rate, reached by large collectives
    backward: float = 0.5  # of a step without communication
    call: float = 10e-6  # seconds of a collective besides hops and bytes
    nvlink_hop: float = 1e-6  # seconds
    host_hop: float = 50e-6  # seconds of a hop between hosts, gloo over TCP


def collective_seconds(size: float, collective: Collective, link: Interconnect, assumed: Assumptions) -> float:
    """Return the time of one call of `size` bytes: ring bandwidth, tree latency (Sanders et al. 2009).

    All GPUs of a node take part, so that a node's network cards share the bytes of one ring per GPU.
    """
    ranks = collective.ranks
    nodes = math.ceil(ranks / NODE)
    bandwidth = NVLINK if nodes == 1 else min(NVLINK, link.node_bytes)
    hops = math.log2(min(ranks, NODE)) * assumed.nvlink_hop + math.log2(nodes) * link.hop
    there_and_back = 2 if collective.kind == "all_reduce" else 1
    return ring_share(collective) * size / (assumed.rate * bandwidth) + there_and_back * hops + assumed.call


def buckets(method: Method) -> list[tuple[int, float]]:
    """Return bytes of DDP's buckets, and the share of the backward pass after which each is complete.

    Gradients are ready in reverse order of registration; the encoder's take time in proportion to their number, those
    of the head none.
    """
    tensors = list(reversed(trainable(method)))
    encoder = {parameter for parameter in method.student.encoder.parameters() if parameter.requires_grad}
    total, done, shares = sum(weight.nbytes for weight in encoder), 0, []
    for parameter in tensors:
        done += parameter.nbytes if parameter in encoder else 0
        shares.append(done / total)
    made, last, sizes = [], 0, [parameter.nbytes for parameter in tensors]
    for size in bucket_sizes(sizes, BUCKET_LIMITS):
        filled = 0
        while filled < size:
            filled += sizes[last]
            last += 1
        made.append((size, shares[last - 1]))
    return made


def predict(
    recipe: Recipe, method: Method, gpus: int, link: Interconnect, step_seconds: float, assumed: Assumptions
) -> dict[str, float]:
    """Return the efficiency of a step that takes `step_seconds` on one GPU: with buckets overlapped, and without.

    Overlapped: buckets are sent one after another, each from when its last gradient is ready, beside the backward pass,
    which they do not slow down; what is left after it, and every other collective, prolongs the step. Raises UserError
    for sharded weights.
    """
    if recipe.speed.shard != "none":
        raise UserError("efficiency is predicted for DDP: leave speed.shard out")
    traffic = step_traffic(recipe, method, gpus, packed=True)
    others = sum(
        volume.calls * collective_seconds(volume.bytes / volume.calls, collective, link, assumed)
        for collective, volume in traffic.items()
        if collective.purpose != "gradients"
    )
    backward, end, alone = assumed.backward * step_seconds, 0.0, 0.0
    for size, share in buckets(method):
        seconds = collective_seconds(size, Collective("gradients", "all_reduce", gpus), link, assumed)
        end, alone = max(end, share * backward) + seconds, alone + seconds
    exposed = max(0.0, end - backward) + others
    return {
        "efficiency": step_seconds / (step_seconds + exposed),
        "efficiency_without_overlap": step_seconds / (step_seconds + alone + others),
        "exposed_ms": 1e3 * exposed,
        "gradients_ms": 1e3 * alone,
        "others_ms": 1e3 * others,
        "stop_signal_on_host_ms": 1e3 * 2 * (gpus - 1) * assumed.host_hop,
    }
