"""Communication of ranks that train a probe together: gradients and the list of unreadable images."""

import torch
from torch import nn


def sum_gradients(module: nn.Module, world) -> None:
    """Add the gradients of all ranks in place, in one message; unused parameters get zeros for equal message sizes."""
    if world is None or world.size == 1:
        return
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    total = world.all_sum(torch.cat([parameter.grad.flatten() for parameter in trained]))
    for parameter, part in zip(trained, total.split([parameter.numel() for parameter in trained])):
        parameter.grad.copy_(part.view_as(parameter))


def gather_all(corrupt: dict[str, str], world) -> dict[str, str]:
    """Return the unreadable images of all ranks, name -> reason."""
    if world is None or world.size == 1:
        return corrupt
    return {name: reason for part in world.gather_objects(corrupt) for name, reason in part.items()}
