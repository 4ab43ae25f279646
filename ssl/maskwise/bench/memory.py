"""Estimate the memory of a training step from the tensors that autograd saves, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


class SavedTensors:
    """Context manager that counts the storages autograd saves, without parameters and inputs; see `.bytes`."""

    def __init__(self, *known: Tensor):
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.storages: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)  # a freed address could be reused
        return tensor

    @property
    def bytes(self) -> int:
        """Bytes of all saved storages."""
        return sum(self.storages.values())

    def __enter__(self) -> SavedTensors:
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.hooks.__exit__(*exception)


def estimate(trainer, global_crops: Tensor, local_crops: Tensor | None, precision: str = "bf16") -> dict[str, int]:
    """Bytes of one micro-batch of these normalized crops: saved activations, weights, gradients, moments, crops.

    CPU kernels save the tensors that GPU kernels save, up to a few numbers per token; temporary buffers of single
    operations and the allocator's reserve are not included.
    """
    method = trainer.method
    samples = len(global_crops) // 2
    own = [*method.parameters(), *method.buffers()]
    saved = SavedTensors(*own, global_crops, *([] if local_crops is None else [local_crops]))
    with saved, torch.autocast(global_crops.device.type, torch.bfloat16, enabled=precision == "bf16"):
        method(global_crops, local_crops, step=0, epoch=0, sample_ids=torch.arange(samples))
    trained = sum(p.numel() * p.element_size() for p in method.parameters() if p.requires_grad)
    everything = sum(tensor.numel() * tensor.element_size() for tensor in own)
    given = [crops for crops in (global_crops, local_crops) if crops is not None]
    sizes = {
        "activations": saved.bytes,
        "weights": everything,
        "gradients": trained,
        "moments": 2 * trained,
        "crops": sum(crops.numel() * crops.element_size() for crops in given),
    }
    return {**sizes, "total": sum(sizes.values())}
