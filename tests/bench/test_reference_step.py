"""The reference step equals maskwise: losses, masks, weights and centers over several steps."""

import pytest
import torch

from maskwise.bench.baselines.reference_step import ReferenceStep
from support.baseline_pair import SHAPE, pair, take_steps


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_reference_and_maskwise_take_the_same_steps(dtype, near):
    trainer, plain = pair(ReferenceStep, dtype, prob=0.7)
    ours = trainer.method
    masked = 0
    for step, (seen, theirs) in enumerate(take_steps(trainer, plain, 4, dtype)):
        masked += theirs["mask_share"]
        assert float(seen["mask_share"]) == pytest.approx(theirs["mask_share"], abs=1e-7)
        for key in ("loss", "cls", "patch"):
            assert float(seen[key]) == pytest.approx(theirs[key], rel=near), (step, key)
    assert masked > 0, "nothing was masked in four steps"
    assert float((ours.center - plain.center[0]).abs().max()) < near
    assert float((ours.patch_center - plain.patch_center[0, 0]).abs().max()) < near
    other = ReferenceStep(SHAPE, dtype=dtype)
    other.load(ours.state_dict())
    for network, its_network in ((other.student, plain.student), (other.teacher, plain.teacher)):
        for (name, mine), its in zip(network.named_parameters(), its_network.parameters()):
            # Adam turns gradients that are rounding errors into whole steps of 1e-3; they are few.
            assert float((mine - its).detach().abs().mean()) < 10 * near, name


def test_crops_that_are_not_square_have_the_losses_of_maskwise():
    trainer, plain = pair(ReferenceStep, torch.float64, prob=0.9, size=(24, 40))
    for ours, theirs in take_steps(trainer, plain, 2, torch.float64, (24, 40), (16, 24)):
        assert float(ours["mask_share"]) == pytest.approx(theirs["mask_share"], abs=1e-7) and theirs["mask_share"] > 0
        for key in ("loss", "cls", "patch"):
            assert float(ours[key]) == pytest.approx(theirs[key], rel=1e-10), key
