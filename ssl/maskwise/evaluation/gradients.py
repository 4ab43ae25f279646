"""What ranks that train a probe together tell each other: gradients, and which images were unreadable."""

import torch
from torch import nn


def sum_gradients(module: nn.Module, world) -> None:
    """Add the gradients of all ranks in place, in one message; a parameter that nothing used gets zeros, so that every rank sends as much."""
    if world is None or world.size == 1:
        return
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    whole = world.all_sum(torch.cat([parameter.grad.flatten() for parameter in trained]))
    for parameter, part in zip(trained, whole.split([parameter.numel() for parameter in trained])):
        parameter.grad.copy_(part.view_as(parameter))


def everybodys(corrupt: dict[str, str], world) -> dict[str, str]:
    """The unreadable images of all ranks, name -> reason."""
    if world is None or world.size == 1:
        return corrupt
    return {name: reason for some in world.gather_objects(corrupt) for name, reason in some.items()}
