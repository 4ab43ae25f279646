"""Methods small enough for tests: real ones in float64, and scripted ones whose logits are given."""

import threading
from types import SimpleNamespace

import torch
from torch import nn

from maskwise.methods import METHODS
from maskwise.methods.masking import MASKINGS, Masking, SampledMasks

SIZE, LOCAL, PATCH, DIM, PROTOTYPES = 16, 8, 4, 12, 7


def method(
    name="ibot", masking="attmask_hint", *, pooling="cls", drop_path=0.0, head=None, dtype=torch.float64, **options
):
    """A method on a ViT of two blocks, 4x4 patches of a global crop, weights always the same."""
    from maskwise.nn import POOLINGS, Encoder, ProjectionHead
    from maskwise.nn.backbones.factory import Backbone

    torch.manual_seed(0)
    if isinstance(masking, str):  # a tenth of 16 patches would be no hint
        masking = MASKINGS[masking](**({"show_max": 0.5} if masking == "attmask_hint" else {}))
    backbone = Backbone(
        "vit_tiny_patch16_224",
        image_size=SIZE,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=2,
        num_heads=3,
        drop_path=drop_path,
        mask_token=masking is not None and not isinstance(masking, MASKINGS["none"]),
    )
    encoder = Encoder(backbone, POOLINGS[pooling](backbone.dim))
    head = ProjectionHead(
        backbone.dim, PROTOTYPES, **{"hidden": 16, "bottleneck": 6, "norm_last_layer": False, **(head or {})}
    )
    for parameter in [*encoder.parameters(), *head.parameters()]:
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    made = METHODS[name](encoder, head, masking=masking, **options).to(dtype).train()
    for parameter in made.teacher.parameters():  # the two networks differ, as in training
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


def crops(samples=4, locals_=2, dtype=torch.float64, seed=1):
    """Global and local crops and sample ids of a batch."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, SIZE), (locals_, LOCAL)]
    global_crops, local_crops = (
        torch.randn(n * samples, 3, s, s, generator=generator, dtype=torch.float64).to(dtype) for n, s in sizes
    )
    return global_crops, local_crops, torch.arange(samples) * 17 + 5


def part(crops_, rows, samples):
    """The crops of some of the samples, crop-major again."""
    return crops_.unflatten(0, (-1, samples))[:, rows].flatten(0, 1)


def run_ranks(count, work):
    """Call work(rank, all_sum) on that many threads, `all_sum` summing over them; returns their results."""
    slots, results, errors, barrier = [None] * count, [None] * count, [], threading.Barrier(count, timeout=30)

    def live(rank):
        def all_sum(tensor):
            slots[rank] = tensor.detach()
            barrier.wait()
            total = sum(slots)
            barrier.wait()
            return total

        try:
            results[rank] = work(rank, all_sum)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def loop_sinkhorn(logits, temp, iterations=3):
    """Sinkhorn-Knopp probabilities of logits [n, K], without a sum over ranks."""
    q = torch.exp(logits / temp)
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    return q * len(q)


class FixedMasking(Masking):
    """Hides the given patches, bool [V, N]."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def choose_patches(self, attention, grid, keys, device):
        return SampledMasks(self.mask, int(self.mask.sum()))


class ScriptedBackbone(nn.Module):
    has_mask_token = True

    def freeze_as_teacher_(self):
        pass


class ScriptedPooling(nn.Module):
    gives_attention = True
    k = 1


class ScriptedEncoder(nn.Module):
    """Returns given rows: a crop's first number is its row; calls with a drop key are the student's."""

    def __init__(self, student, teacher, student_patches, teacher_patches):
        super().__init__()
        self.backbone, self.pooling = ScriptedBackbone(), ScriptedPooling()
        self.student, self.teacher = nn.Parameter(student), nn.Parameter(teacher)
        self.student_patches, self.teacher_patches = nn.Parameter(student_patches), nn.Parameter(teacher_patches)

    def supports_packing(self, images):
        return False

    def forward(self, images, mask=None, *, attention=True, drop_key=None, patches=True):
        rows = images[:, 0, 0, 0].long()
        vectors, patches = (
            (self.teacher, self.teacher_patches) if drop_key is None else (self.student, self.student_patches)
        )
        patches = patches[rows.clamp(max=len(patches) - 1)]
        return SimpleNamespace(pooled=vectors[rows], patches=patches, attention=None, grid=(2, 2))


class ScriptedHead(nn.Module):
    """Passes everything through, so that features are logits."""

    def __init__(self, prototypes):
        super().__init__()
        self.prototypes, self.patch_prototypes = prototypes, None

    def weights(self):
        return torch.eye(self.prototypes, dtype=torch.float64), torch.eye(self.prototypes, dtype=torch.float64)

    def embed(self, x):
        return x

    def classify(self, z):
        return z

    def classify_patches(self, z):
        return z

    forward = classify


def scripted(name, **options):
    """Return a method with scripted logits, its crops and sample ids."""
    i, j, n = torch.arange(12.0).double(), torch.arange(8.0).double(), torch.arange(4.0).double()
    encoder = ScriptedEncoder(
        (0.7 * i[:, None] + 1.1 * j).sin(),
        (0.5 * i[:6, None] - 0.9 * j).cos(),
        (0.3 * i[:6, None, None] + 0.9 * n[:, None] + 1.1 * j).sin(),
        (0.2 * i[:6, None, None] + 0.6 * n[:, None] - 0.9 * j).cos(),
    )
    b, v, p = torch.arange(3)[:, None], torch.arange(2)[:, None, None], torch.arange(4)
    mask = (p + b + v) % 3 == 0
    mask[0, 2] = False
    options = {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 30, **options}
    masking = FixedMasking(mask.flatten(0, 1))
    made = METHODS[name](encoder, ScriptedHead(8), masking=masking, **options).double()
    rows = i[:, None, None, None].expand(12, 3, 1, 1)
    return made, rows[:6], rows[6:], torch.arange(3)
