"""Shared by the tests of feature-map backbones: images, perturbed weights, a check of all gradients."""

import torch
from torch import nn

from maskwise.nn import CLASSIFIERS


def images(side=64, count=2, width=None, dtype=torch.float64):
    return torch.randn(count, 3, side, width or side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def perturbed(module, by):
    """Add noise to all weights and running statistics; returns the module in float64 and eval mode."""
    module.double().eval()
    with torch.no_grad():
        for value in (*module.parameters(), *(b for name, b in module.named_buffers() if "running" in name)):
            value.add_(torch.rand_like(value) * by)
    return module


def assert_every_parameter_gets_a_gradient(encoder, classifier, **options):
    """Check one supervised batch of a float64 encoder with an entry of CLASSIFIERS."""
    head = CLASSIFIERS[classifier](encoder, 5, **options).double().train()
    features = encoder(images(count=4), layers=head.layers, drop_key=torch.arange(4))
    head.losses(features, torch.eye(5, dtype=torch.float64)[:4], nn.functional.cross_entropy, drop_key=torch.arange(4))[
        "loss"
    ].backward()
    for name, parameter in [*encoder.named_parameters(), *head.named_parameters()]:
        assert not parameter.requires_grad or parameter.grad is not None and parameter.grad.isfinite().all(), name
