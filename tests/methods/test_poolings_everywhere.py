"""Every pooling on every kind of network, in DINO, iBOT and supervised training: one step each, and the refusals."""

import pytest
import torch

from maskwise.distributed.world import World
from maskwise.engine.optim import check_groups, make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer
from maskwise.errors import UserError
from maskwise.functional.classification import smooth_labels
from maskwise.methods import METHODS, Supervised
from maskwise.methods.masking import MASKINGS
from maskwise.nn import CLASSIFIERS, POOLINGS, Backbone, Encoder, ProjectionHead

SIZE, LOCAL, SAMPLES, CLASSES = 64, 32, 2, 3
NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 16, "embed_dim": 12, "depth": 1, "num_heads": 3}),
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 12)}),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 12)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 4, "depths": (1, 1, 1), "num_heads": (1, 1, 2), "window_size": 2},
    ),
}
MASKED = ("vit", "swin")  # whose patches can be hidden
LEARNED = {"otk": {"anchors": 5}, "simpool": {"learn_gamma": True}}  # the same rows with more weights
CASES = [*((name, {}) for name in POOLINGS), *LEARNED.items()]


def encoder_of(network, pooling, options, masked=False, norm="after"):
    name, arguments = NETWORKS[network]
    torch.manual_seed(0)
    backbone = Backbone(name, image_size=SIZE, mask_token=masked, **arguments)
    return Encoder(backbone, POOLINGS[pooling](backbone.dim, **options), norm=norm)


def made(network, method, pooling, options, masking="none"):
    if method == "supervised":
        encoder = encoder_of(network, pooling, options, norm="before" if network == "vit" else "after")
        return Supervised(encoder, CLASSIFIERS["linear"](encoder, CLASSES), average=True)
    encoder = encoder_of(network, pooling, options, masking != "none")
    head = ProjectionHead(encoder.dim, 6, hidden=8, bottleneck=4, norm_last_layer=False)
    return METHODS[method](encoder, head, masking=MASKINGS[masking]())


def step(built):
    """One step of a Trainer; the names of parameters that moved."""
    before = {name: value.clone() for name, value in built.named_parameters()}
    groups = parameter_groups(built)
    check_groups(built, groups)
    trainer = Trainer(
        built,
        optimizer=make_optimizer("adamw", groups),
        world=World(),
        schedules=Schedules(
            lr=lambda step: 1e-2,
            weight_decay=lambda step: 0.04,
            momentum=lambda step: 0.9,
            steps_per_epoch=4,
            total_steps=4,
        ),
        freeze_last_layer=0,
    )
    if isinstance(built, Supervised):
        seen = trainer.step(
            torch.randn(SAMPLES, 3, SIZE, SIZE),
            smooth_labels(torch.arange(SAMPLES) % CLASSES, CLASSES, 0.1),
            torch.arange(SAMPLES),
        )
    else:
        seen = trainer.step(
            torch.randn(2 * SAMPLES, 3, SIZE, SIZE), torch.randn(SAMPLES, 3, LOCAL, LOCAL), torch.arange(SAMPLES)
        )
    assert seen["loss"].isfinite() and seen["ok"]
    return seen, {name for name, value in built.named_parameters() if not torch.equal(value, before[name])}


def no_gradient_ever(pooling, name):
    """Key biases cancel in a softmax over patches, query biases in one over slots; a scale of 1e-5 is too small."""
    over_slots = pooling == "slot" and name.endswith("wq.bias")
    return over_slots or name.endswith(("wk.bias", ".k.bias")) or pooling == "cait"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "ibot", "supervised"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_whole_step(network, method):
    for pooling, options in CASES:
        if "cls_attention" in POOLINGS[pooling].needs and network != "vit":
            with pytest.raises(UserError, match="needs a class token") as caught:
                made(network, method, pooling, options)
            assert "\n" not in str(caught.value)
            continue
        masking = (
            "none"
            if method != "ibot" or network not in MASKED
            else "attmask_high"
            if POOLINGS[pooling].gives_attention
            else "block"
        )
        built = made(network, method, pooling, options, masking)
        seen, moved = step(built)
        own = {
            name
            for name, value in built.named_parameters()
            if name.startswith("student.encoder.pooling.") and value.requires_grad
        }
        assert {name for name in own - moved if not no_gradient_ever(pooling, name)} == set(), (pooling, own - moved)
        learned = {name for name in own & moved if not no_gradient_ever(pooling, name)}
        teacher = {name.replace("student.", "teacher.") for name in learned}
        assert teacher <= moved, pooling  # the average follows
        assert method == "supervised" or (seen["mask_share"] > 0) == (masking != "none"), pooling


@pytest.mark.parametrize("network", MASKED)
def test_attmask_follows_what_attends_and_refuses_the_rest(network):
    for pooling, row in POOLINGS.items():
        if "cls_attention" in row.needs and network != "vit":
            continue
        if row.gives_attention:
            made(network, "ibot", pooling, {}, "attmask_hint")
            continue
        with pytest.raises(
            UserError,
            match=rf"masking attmask_hint follows the teacher's attention, and pooling {pooling} has none: "
            r"choose a pooling with attention \(",
        ) as caught:
            made(network, "ibot", pooling, {}, "attmask_hint")
        assert "\n" not in str(caught.value)
