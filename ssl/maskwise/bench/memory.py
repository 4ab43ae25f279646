"""Bytes that a step's backward pass keeps, counted on any device: what a GPU would need, before there is one."""

from __future__ import annotations

import torch
from torch import Tensor


class Kept:
    """While entered, counts the storages that autograd saves, parameters and inputs left out; `.bytes` at the end."""

    def __init__(self, *known: Tensor):
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.storages: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)  # an address that is freed could be given out twice
        return tensor

    @property
    def bytes(self) -> int:
        """Bytes of all storages seen so far."""
        return sum(self.storages.values())

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.hooks.__exit__(*exception)


def estimate(trainer, global_crops: Tensor, local_crops: Tensor | None, precision: str = "bf16") -> dict[str, int]:
    """Bytes of one micro-batch of these normalised crops: saved activations, weights and gradients, moments, crops.

    Kernels of a CPU save what those of a GPU save, but for a few numbers a token; buffers that live inside one operation
    and the allocator's spare room come on top.
    """
    method = trainer.method
    samples = len(global_crops) // 2
    own = [*method.parameters(), *method.buffers()]
    with Kept(*own, global_crops, *([] if local_crops is None else [local_crops])) as kept:
        with torch.autocast(global_crops.device.type, torch.bfloat16, enabled=precision == "bf16"):
            method(global_crops, local_crops, step=0, epoch=0, sample_ids=torch.arange(samples))
        saved = kept.bytes
    trained = sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    everything = sum(tensor.numel() * tensor.element_size() for tensor in own)
    crops = sum(each.numel() * each.element_size() for each in (global_crops, local_crops) if each is not None)
    found = {"activations": saved, "weights": everything, "gradients": trained, "moments": 2 * trained, "crops": crops}
    return {**found, "total": sum(found.values())}
