"""What every student-teacher method shares: two networks, their centers, the teacher's targets and what is reported."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskwise.functional import average, draws, prototypes, schedules, targets, vitals
from maskwise.functional.errors import UserError
from maskwise.methods.lesson import Lesson
from maskwise.methods.masking import Hidden, Masking, NoMasking
from maskwise.nn.pooling import with_attention

TARGETS = ("centering", "sinkhorn")


class Network(nn.Module):
    """An encoder and the projection head on top of it."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head


class Views(NamedTuple):
    """How a batch divides: samples B, global views G and local views L of each."""

    samples: int
    global_: int
    local: int


class StudentTeacher(nn.Module):
    """A student, a teacher that is its moving average, and the running centers of the teacher's logits.

    The teacher is a copy of the student without mask token, drop path or gradients; it stays in train mode, so that a
    batch norm uses the batch. `forward` of the subclasses changes no buffer: the centers wait until `update_teacher`.
    `all_sum` sums a tensor over ranks and `world_size` counts them; alone, neither is needed.
    Raises UserError where masking, pooling and backbone do not fit each other.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        *,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        warmup_teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 0,
        center_momentum: float = 0.9,
        lambda1: float = 1.0,
        targets: str = "centering",
        masking: Masking | None = None,
        all_sum: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        masking = NoMasking() if masking is None else masking
        if targets not in TARGETS:
            raise UserError(f"method.targets={targets!r} is unknown: choose one of {', '.join(TARGETS)}")
        if masking.needs_attention and not encoder.pooling.gives_attention:
            raise UserError(
                f"{type(masking).__name__} hides where the teacher looks, and the pooling {type(encoder.pooling).__name__} "
                f"gives no attention: choose a pooling that does ({with_attention()}), or masking random or block"
            )
        self.hides = not isinstance(masking, NoMasking)
        if self.hides and not encoder.backbone.has_mask_token:
            raise UserError(f"{type(masking).__name__} hides patches and the backbone has no mask token: build it with mask_token=True")
        self.student = Network(encoder, head)
        self.teacher = copy.deepcopy(self.student)
        self.teacher.encoder.backbone.freeze_as_teacher_()
        self.teacher.requires_grad_(False)
        self.masking = masking
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp = warmup_teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.center_momentum = center_momentum
        self.lambda1 = lambda1
        self.targets = targets
        self.all_sum = all_sum or _alone
        self.world_size = world_size
        self.seed = seed
        self.register_buffer("center", torch.zeros(head.prototypes))
        self.register_buffer("patch_center", torch.zeros(head.patch_prototypes or head.prototypes))
        self._waiting = None

    def count_views(self, global_crops: Tensor, local_crops: Tensor | None, sample_ids: Tensor) -> Views:
        """Return how the crops divide into views; raises UserError where no pair of different views exists."""
        samples = len(sample_ids)
        views = Views(samples, len(global_crops) // samples, 0 if local_crops is None else len(local_crops) // samples)
        if views.global_ * (views.global_ + views.local - 1) == 0:
            raise UserError("one global crop and no local crop leave no pair of views to compare: use two global crops, or add local crops")
        return views

    @torch.no_grad()
    def look(self, global_crops: Tensor):
        """Return the teacher's features of the whole, never masked, global crops; attention only where the masking asks."""
        return self.teacher.encoder(global_crops, attention=self.masking.needs_attention)

    def hide(self, features, views: Views, step: int, sample_ids: Tensor, start: bool = True) -> Hidden:
        """Return the masks of the student's global crops, drawn from where the teacher looked; empty before the `start`."""
        masking = self.masking if start else NoMasking()
        attention = features.attention
        if attention is not None and getattr(self.teacher.encoder.pooling, "k", 1) > 1:
            attention = attention.amax(dim=1, keepdim=True)  # of k vectors a patch has the largest share: their mean is flat where they share out all patches
        device = features.pooled.device
        return masking.draw(attention, features.grid, step=step, sample_ids=sample_ids, device=device, views=views.global_)

    def study(self, global_crops: Tensor, local_crops: Tensor | None, hidden: Hidden, views: Views, step: int, sample_ids: Tensor):
        """Return the student's features of the masked global crops and its pooled vectors of all views, [S * B, D]."""
        encoder = self.student.encoder
        mask = hidden.mask if encoder.backbone.has_mask_token else None
        keys = self._drop_keys(step, sample_ids, 0, views.global_, global_crops.device)
        if not views.local:
            features = encoder(global_crops, mask, attention=False, drop_key=keys)
            return features, features.pooled
        local_keys = self._drop_keys(step, sample_ids, views.global_, views.local, global_crops.device)
        if hasattr(encoder, "together") and encoder.packs(global_crops):
            features, local = encoder.together([(global_crops, mask, keys), (local_crops, None, local_keys)])
        else:
            features = encoder(global_crops, mask, attention=False, drop_key=keys)
            local = encoder(local_crops, attention=False, drop_key=local_keys)
        return features, torch.cat([features.pooled, local.pooled])

    def _drop_keys(self, step: int, sample_ids: Tensor, first: int, count: int, device) -> Tensor:
        view = torch.arange(first, first + count).repeat_interleave(len(sample_ids))
        keys = draws.mix(draws.DROP_PATH, self.seed, step, sample_ids.cpu().repeat(count), view)
        return keys.to(device, non_blocking=True)

    def cls_temperature(self, epoch: int) -> float:
        """Return the teacher's temperature of the image term in that epoch (attmask.md 1.6)."""
        return schedules.temperature(epoch, self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs)

    @torch.no_grad()
    def aim(self, logits: Tensor, center: Tensor, temp: float) -> Tensor:
        """Turn teacher logits [n, K] into the probabilities the student is to match, [n, K]."""
        if self.targets == "sinkhorn":
            return targets.sinkhorn(logits, temp, all_sum=self.all_sum)
        return targets.center_and_sharpen(logits, center, temp)

    @torch.no_grad()
    def remember(self, step: int, cls: Tensor, patches: Tensor | None = None) -> None:
        """Keep the mean logits of this step, over all ranks, for the centers that `update_teacher` will set.

        cls [n, d] and patches [m, d] are the teacher's bottlenecks; the last layer is linear without bias, so its
        mean logits are those of the mean bottleneck and one sum of 2d numbers serves both. Further calls in the same
        step (micro-batches of equal size) are averaged.
        """
        if self.targets == "sinkhorn":
            return
        kinds = [cls] if patches is None else [cls, patches]
        means = self.all_sum(torch.cat([z.mean(dim=0) for z in kinds])) / self.world_size
        head = self.teacher.head
        logits = [classify(mean[None])[0] for classify, mean in zip((head.classify, head.classify_patches), means.split(cls.shape[1]))]
        if self._waiting is not None and self._waiting[0] == step:
            _, calls, sums = self._waiting
            self._waiting = (step, calls + 1, [old + new for old, new in zip(sums, logits)])
        else:
            self._waiting = (step, 1, logits)

    @torch.no_grad()
    def update_teacher(self, momentum: float, ok: Tensor | None = None) -> None:
        """Set the centers from the last forward and move the teacher, teacher <- momentum teacher + (1 - momentum) student.

        `ok` is a 0-dim bool tensor on the device: where it is False nothing changes, and the host never reads it.
        """
        if self._waiting is not None:
            _, calls, sums = self._waiting
            for center, total in zip((self.center, self.patch_center), sums):
                moved = targets.update_center(center, (total / calls).to(center.dtype), self.center_momentum)
                center.copy_(moved if ok is None else torch.where(ok, moved, center))
            self._waiting = None
        average.ema_(dict(self.teacher.named_parameters()), dict(self.student.named_parameters()), momentum, ok)

    @torch.no_grad()
    def teach(self, global_crops: Tensor, local_crops: Tensor | None = None, *, step: int, epoch: int, sample_ids: Tensor) -> Lesson:
        """Return the teacher's side of a (micro-)batch; arguments as `forward`. Raises UserError for G = 1, L = 0."""
        views = self.count_views(global_crops, local_crops, sample_ids)
        features = self.look(global_crops)
        hidden = self.hide(features, views, step, sample_ids)
        z = wide(self.teacher.head.embed(features.pooled))
        with full_precision(z.device.type):
            self.remember(step, z)
        return Lesson(features.pooled, z, hidden)

    def agree(self, lessons: list[Lesson], epoch: int) -> list[Lesson]:
        """Add to the lessons of a step's micro-batches what only all of them together can tell: Sinkhorn's distributions."""
        if self.targets == "sinkhorn":
            aims = self._aims_of_all([lesson.z for lesson in lessons], self.teacher.head.classify, self.center, self.cls_temperature(epoch))
            lessons = [lesson._replace(aims=each) for lesson, each in zip(lessons, aims)]
        return [lesson._replace(parts=len(lessons)) for lesson in lessons]

    @torch.no_grad()
    def _aims_of_all(self, z: list[Tensor], classify, center: Tensor, temp: float) -> list[Tensor]:
        logits = wide(classify(torch.cat(z)))
        with full_precision(logits.device.type):
            return list(self.aim(logits, center, temp).split([len(each) for each in z]))

    def image_term(self, z: Tensor, weight: Tensor, lesson: Lesson, views: Views, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image term and what it shows of the health of a batch.

        z [S * B, d] are the student's bottlenecks, weight [K, d] its last layer. teacher_entropy is the mean entropy of
        the teacher's distributions and teacher_spread the entropy of their mean, both in nats; agreement is the share
        of images whose arg-max in the teacher's view 0 is the student's in view 1. All of this rank alone.
        """
        dtype, head_weight = product_dtype(z), self.teacher.head.weights()[0].to(product_dtype(z))
        teacher_z, temp = lesson.z.to(dtype).unflatten(0, (views.global_, views.samples)), self.cls_temperature(epoch)
        aims = None if lesson.aims is None else lesson.aims.unflatten(0, (views.global_, views.samples))
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def probs(start, stop):
            if aims is not None:
                return aims[:, start:stop]
            return self.aim(wide(torch.matmul(teacher_z[:, start:stop], head_weight.T)), self.center, temp)

        def watch(probs, logits, start, stop):
            alike = probs[0].argmax(dim=-1) == logits[1].argmax(dim=-1)
            seen.append((torch.special.entr(probs).sum(), probs.sum(dim=(0, 1)), alike.sum()))

        score = prototypes.score_views(probs, views.global_ + views.local, views.global_, views.samples, self.student_temp, watch)
        term = prototypes.loss_in_pieces(z.unflatten(0, (-1, views.samples)), weight, score, dtype)
        entropy, mean, alike = (torch.stack(each).sum(dim=0) for each in zip(*seen))
        rows = views.global_ * views.samples
        health = {
            "teacher_entropy": entropy / rows,
            "teacher_spread": torch.special.entr(mean / rows).sum(),
            "agreement": alike.to(term.dtype) / views.samples,
        }
        return term, health

    @torch.no_grad()
    def report(self, loss: Tensor, cls: Tensor, patch: Tensor, health: dict[str, Tensor], lesson: Lesson) -> dict[str, Tensor]:
        """Return the method's answer: `loss` with its graph, the rest detached 0-dim tensors that nobody has read yet.

        mask_share is the share of all patches that are hidden and mask_agreement how alike the views' masks are (1: all equal);
        feature_std, 1 for spread-out and 0 for collapsed features, is the standard deviation of the teacher's unit vectors times
        sqrt(D), feature_rank their participation ratio, feature_twins the share of pairs of images with one feature; center_move is how far the mean logits of this step lie from the centers
        (0 without centers). `health` is that of `image_term` and `patch_term`.
        """
        unit = F.normalize(wide(lesson.pooled), dim=-1)
        with full_precision(unit.device.type):
            rank, twins, move = vitals.participation_ratio(unit), vitals.twin_share(unit[: (len(unit) + 1) // 2]), self._center_move()
        return {
            "loss": loss,
            "cls": cls.detach(),
            "patch": patch.detach(),
            **health,
            "mask_share": torch.full((), lesson.hidden.count / lesson.hidden.mask.numel(), dtype=cls.dtype, device=cls.device),
            "mask_agreement": vitals.mask_agreement(lesson.hidden.mask).to(cls.dtype),
            "feature_std": unit.std(dim=0, unbiased=False).mean() * math.sqrt(unit.shape[-1]),
            "feature_rank": rank,
            "feature_twins": twins.to(cls.dtype),
            "center_move": move.to(cls.dtype),
        }

    def _center_move(self) -> Tensor:
        """Distance of the mean logits that wait from the centers they will move, both kinds together; not finite where one is not."""
        if self._waiting is None:
            return torch.zeros((), device=self.center.device)
        _, calls, sums = self._waiting
        return torch.stack([torch.linalg.vector_norm(total / calls - center) for center, total in zip((self.center, self.patch_center), sums)]).norm()


def full_precision(device_type: str):
    """Return a context in which autocast is off: softmax and losses want float32."""
    return torch.autocast(device_type, enabled=False)


def product_dtype(like: Tensor) -> torch.dtype:
    """Return the type in which matrices are multiplied here: autocast's where it is on, else that of the tensor."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _alone(tensor: Tensor) -> Tensor:
    return tensor
