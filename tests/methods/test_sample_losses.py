"""Losses of single samples: each equals the loss of a batch that holds this sample alone."""

import pytest
import torch

from maskwise.build import trainer
from maskwise.distributed.world import World
from maskwise.methods.sample_losses import completed_teachers, sample_losses
from maskwise.recipe.reading import read_recipe

CASES = {
    "dino": ("method=dino", "masking=random"),
    "ibot": ("method.lambda2=0.5", "masking.prob=0.8"),
    "ibot token": ("method.patch_loss=token", "masking.prob=0.8"),
    "ibot sinkhorn": ("method.targets=sinkhorn",),
    "ibot visible": ("method.visible_weight=0.5", "method.patch_loss=token", "masking.prob=0.8"),
    "mst": ("method=mst", "masking=attmask_low", "method.pixel_weight=0.3"),
}
ALONE = {"dino", "ibot", "mst"}  # the targets and weights of the others depend on the batch


@pytest.mark.parametrize("case", CASES)
def test_losses_of_samples(case):
    recipe = read_recipe("debug/tiny", "backbone.depth=1", *CASES[case])
    method = trainer(recipe, World(), images=64).method
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # teacher and student differ
        for parameter in method.student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    first, second = torch.randn(10, 3, 32, 32, generator=generator), torch.randn(10, 3, 16, 16, generator=generator)
    ids, options = torch.tensor([3, 8, 21, 40, 55]), {"step": 5, "epoch": 1}
    (teacher,) = completed_teachers(method, [(first, second, ids)], **options)
    found = sample_losses(method, first, second, sample_ids=ids, teacher=teacher, **options)
    with torch.no_grad():
        whole = method(first, second, sample_ids=ids, **options)
    for name, values in found.items():
        assert values.shape == (5,) and float(values.mean()) == pytest.approx(float(whole[name]), rel=2e-6), name
    assert len(found) == {"dino": 2, "ibot visible": 4}.get(case, 3) and len(set(found["loss"].tolist())) == 5
    for i in range(5) if case in ALONE else ():
        with torch.no_grad():
            alone = method(first[i::5], second[i::5], sample_ids=ids[i : i + 1], **options)
        for name, values in found.items():
            assert float(values[i]) == pytest.approx(float(alone[name]), rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize(
    "changes", [(), ("method.loss=bce",), ("augment.splits=2", "method.jsd_weight=12", "augment.policy=augmix-m3-w3")]
)
def test_losses_of_samples_of_a_classifier(changes):
    size = ("augment.size=32", "backbone.depth=1", "optimizer.warmup_epochs=0")
    method = trainer(
        read_recipe("debug/tiny", "method=supervised", *size, *changes), World(), images=64, classes=4
    ).method
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5 * method.views, 3, 32, 32, generator=generator)
    targets, ids = torch.rand(5, 4, generator=generator), torch.tensor([3, 8, 21, 40, 55])
    found = sample_losses(method, images, targets, step=5, epoch=1, sample_ids=ids, teacher=None)["loss"]
    for i in range(5):
        with torch.no_grad():
            alone = method(images[i::5], targets[i : i + 1], step=5, epoch=1, sample_ids=ids[i : i + 1])
        assert float(found[i]) == pytest.approx(float(alone["loss"]), rel=2e-5)
