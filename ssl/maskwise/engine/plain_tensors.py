"""Tensors as safetensors writes them: on the CPU, contiguous, each with memory of its own."""

from torch import Tensor


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors that share no memory, so that every alias has an entry of its own."""
    result, seen = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result
