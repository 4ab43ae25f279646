"""DINO and iBOT over networks of maps: gradients, batch norm in the pair, masks on Swin's coarsest grid, two ranks."""

import copy
import math

import pytest
import torch

from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.errors import UserError
from maskwise.methods import METHODS
from maskwise.methods.masking import MASKINGS
from maskwise.nn import POOLINGS, Backbone, Encoder, ProjectionHead
from support.tiny_networks import part, run_ranks

NETWORKS = {
    "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 16)}),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 16)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 4, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4},
    ),
    "swin2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 4, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4},
    ),
    "pit": ("pit_s_224", {"base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (1, 1, 2)}),
    "maxvit": ("maxvit_tiny_tf_224", {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32), "stem_width": 8}),
    "mobilenet": ("mobilenetv2_035", {}),
}
SAMPLES, PROTOTYPES = 4, 12


def made(network, method="dino", masking="none", pooling="simpool", *, drop_path=0.0, norm=None, **options):
    name, arguments = NETWORKS[network]
    torch.manual_seed(0)
    backbone = Backbone(name, image_size=96, drop_path=drop_path, mask_token=masking != "none", **arguments)
    encoder = Encoder(backbone, POOLINGS[pooling](backbone.dim))
    head = ProjectionHead(backbone.dim, PROTOTYPES, hidden=16, bottleneck=8, norm=norm, norm_last_layer=False)
    for parameter in [*encoder.parameters(), *head.parameters()]:
        parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )  # branches that start at zero have no gradient before them
    return METHODS[method](encoder, head, masking=MASKINGS[masking](), **options).double().train()


def crops(seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 96), (2, 32))
    return *(
        torch.randn(n * SAMPLES, 3, s, s, generator=generator, dtype=torch.float64) for n, s in sizes
    ), torch.arange(SAMPLES) * 7 + 3


CASES = [
    ("resnet", "dino", "none"),
    ("convnext", "dino", "none"),
    ("swin", "dino", "none"),
    ("swin", "ibot", "block"),
    ("swin", "ibot", "attmask_high"),
    ("resnet", "ibot", "none"),
    ("swin", "mst", "attmask_low"),
    ("pit", "dino", "none"),
    ("maxvit", "dino", "none"),
    ("mobilenet", "dino", "none"),
    ("swin2", "ibot", "attmask_hint"),
]


@pytest.mark.parametrize("network, method, masking", CASES)
def test_every_parameter_gets_a_gradient(network, method, masking):
    built = made(network, method, masking, drop_path=0.1, norm="batch")
    global_crops, local_crops, ids = crops()
    seen = built(global_crops, local_crops, step=0, epoch=0, sample_ids=ids)
    seen["loss"].backward()
    without = [name for name, p in built.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and all(p.grad.isfinite().all() for p in built.parameters() if p.grad is not None)
    assert (seen["mask_share"] > 0) == (masking != "none") and (seen["patch"] > 0) == (
        method == "ibot" and masking != "none"
    )
    still = [
        name for name, p in built.student.named_parameters() if p.grad.abs().max() < 1e-12 and "mask_token" not in name
    ]
    assert all(name.endswith((".bias", "beta")) for name in still), (
        still
    )  # before a batch norm a bias has nothing to say


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet", "convnext", "swin", "pit"])
def test_every_pooling_makes_a_pair_learn(network):
    """Each pooling on feature maps takes a finite DINO step with all gradients, or needs a class token and says so."""
    global_crops, local_crops, ids = crops()
    for pooling in POOLINGS:
        if "cls_attention" in POOLINGS[pooling].needs:
            with pytest.raises(UserError, match="needs a class token"):
                made(network, pooling=pooling)
            continue
        built = made(network, pooling=pooling)
        built(global_crops, local_crops, step=0, epoch=0, sample_ids=ids)["loss"].backward()
        gradients = {name: p.grad for name, p in built.student.encoder.named_parameters()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values()), pooling


def test_the_teacher_takes_statistics_of_its_own_batch_and_the_students_weights():
    built = made("resnet", norm="batch")
    before = {key: value.clone() for key, value in built.teacher.state_dict().items()}
    global_crops, local_crops, ids = crops()
    built(global_crops, local_crops, step=0, epoch=0, sample_ids=ids)
    after = built.teacher.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {key for key in after if "running_" in key or "num_batches" in key} and any(
        "head" in key for key in moved
    )
    mean = torch.nn.functional.conv2d(
        global_crops, built.teacher.encoder.backbone.conv1.weight, stride=2, padding=3
    ).mean((0, 2, 3))
    torch.testing.assert_close(
        after["encoder.backbone.bn1.running_mean"], 0.9 * before["encoder.backbone.bn1.running_mean"] + 0.1 * mean
    )
    for parameter in built.student.parameters():
        parameter.data.add_(1.0)
    built.update_teacher(0.5)
    names = dict(built.teacher.named_parameters())
    assert all(torch.allclose(value, before[name] + 0.5) for name, value in names.items())
    assert torch.equal(
        built.teacher.state_dict()["encoder.backbone.bn1.running_mean"], after["encoder.backbone.bn1.running_mean"]
    )


@pytest.mark.parametrize(
    "network, method, masking",
    [("convnext", "dino", "none"), ("swin", "ibot", "attmask_hint"), ("pit", "dino", "none")],
)
def test_two_ranks_are_one_process(network, method, masking):
    """Paths, masks, losses, gradients and centers of half batches are those of the whole; there is no batch norm."""
    global_crops, local_crops, ids = crops()

    fresh = made(network, method, masking, drop_path=0.4, seed=5)

    def work(rank, all_sum, ranks=2):
        built = copy.deepcopy(fresh)
        built.all_sum, built.world_size = all_sum, ranks
        rows = slice(rank * SAMPLES // ranks, (rank + 1) * SAMPLES // ranks)
        seen = built(
            part(global_crops, rows, SAMPLES), part(local_crops, rows, SAMPLES), step=2, epoch=0, sample_ids=ids[rows]
        )
        gradients = torch.autograd.grad(seen["loss"], [p for p in built.student.parameters() if p.requires_grad])
        built.update_teacher(0.9)
        return seen["loss"].detach(), [g.detach() for g in gradients], built.center.clone(), built.patch_center.clone()

    loss, gradients, *centers = work(0, lambda x: x, 1)
    with torch.autograd.set_multithreading_enabled(False):
        first, second = run_ranks(2, work)
    torch.testing.assert_close((first[0] + second[0]) / 2, loss, rtol=0, atol=1e-9)
    for whole, a, b in zip(gradients, first[1], second[1], strict=True):
        torch.testing.assert_close((a + b) / 2, whole, rtol=0, atol=1e-9)
    for rank in (first, second):
        torch.testing.assert_close(rank[2:], tuple(centers), rtol=0, atol=1e-9)


def test_a_small_resnet_learns():
    """Sixteen images of four colors: the loss falls well below ln K and images of a color come together."""
    torch.manual_seed(0)
    backbone = Backbone(
        "resnet18",
        image_size=32,
        small_stem=True,
        layers=(1, 1, 1),
        channels=(8, 16, 16),
        stem_type="deep",
        stem_width=4,
    )
    encoder = Encoder(backbone, POOLINGS["simpool"](16, gamma=2.0))
    built = METHODS["dino"](
        encoder,
        ProjectionHead(16, 16, hidden=32, bottleneck=16, norm="batch"),
        targets="sinkhorn",
        warmup_teacher_temp=0.05,
        teacher_temp=0.05,
    ).train()
    optimizer = make_optimizer("adamw", parameter_groups(built), lr=3e-3)
    colors, labels = torch.randn(4, 3, 1, 1), torch.arange(16) % 4
    losses = []
    for step in range(20):
        noisy = [colors[labels].repeat(2, 1, 1, 1) + 0.5 * torch.randn(32, 3, side, side) for side in (32, 16)]
        seen = built(*noisy, step=step, epoch=0, sample_ids=torch.arange(16))
        optimizer.zero_grad()
        seen["loss"].backward()
        optimizer.step()
        built.update_teacher(0.9)
        losses.append(seen["loss"].item())
    assert (
        all(map(math.isfinite, losses))
        and losses[0] == pytest.approx(math.log(16), abs=0.3)
        and losses[-1] < losses[0] - 0.5
    )
    pooled = built.teacher.encoder(colors[labels] + torch.randn(16, 3, 32, 32)).pooled
    pooled = torch.nn.functional.normalize(pooled - pooled.mean(0), dim=1)
    alike = pooled @ pooled.T
    same = labels[:, None] == labels
    assert alike[same].mean() > alike[~same].mean() + 0.3
