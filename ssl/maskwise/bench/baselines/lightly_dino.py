"""DINO as lightly trains it on CIFAR-10: its head, loss, transform, moving average and schedule, on a given encoder.

The baseline of `maskwise bench learn`. Settings are those of lightly's CIFAR-10 benchmark: SGD with learning rate .06
for 128 images, momentum .9 and weight decay 5e-4, a cosine per epoch without warm-up, teacher momentum .99, a head of
2048-2048-256 with batch norm and 2048 prototypes. From 64 pixels on the transform is that of its Imagenette benchmark,
with local crops.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from maskwise.compat import ready_torchvision

ready_torchvision()
from lightly.loss import DINOLoss  # noqa: E402
from lightly.models.modules.heads import DINOProjectionHead  # noqa: E402
from lightly.models.utils import update_momentum  # noqa: E402
from lightly.transforms import DINOTransform  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

from maskwise.functional import keyed_random  # noqa: E402

BATCH, LEARNING_RATE, WEIGHT_DECAY, SGD_MOMENTUM, MOMENTUM = 128, 0.06, 5e-4, 0.9, 0.99
HIDDEN, BOTTLENECK, PROTOTYPES = 2048, 256, 2048
SMALL = 64  # pixels below which there are neither local crops nor blur
STREAM = 0x4C54  # part of the keys of its augmentation


class LightlyDINO:
    """Student and teacher with lightly's heads; `load` makes the views of a step, `compute` does the step.

    student, teacher: two encoders with the same weights; data: images by index, decoded once and kept as Pillow images;
    epochs: length of the cosine. The views of a step follow from (seed, step), so that a run can be continued.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data,
        *,
        size: int,
        epochs: int,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
    ):
        self.student, self.teacher = student.to(device), teacher.to(device)
        with keyed_random.seed_scope(seed + 1):
            self.head, self.teacher_head = (new_head(student.dim).to(device) for _ in range(2))
        self.teacher_head.load_state_dict(self.head.state_dict())
        for module in (self.teacher, self.teacher_head):
            module.requires_grad_(False)
        self.criterion = DINOLoss(output_dim=PROTOTYPES).to(device)
        self.data, self.seed, self.device, self.precision = data, seed, device, precision
        self.batch_size = min(BATCH, len(data))
        self.steps_per_epoch = len(data) // self.batch_size
        self.epochs, self.total_steps = epochs, epochs * self.steps_per_epoch
        self.base_rate = LEARNING_RATE * self.batch_size / BATCH
        weights = [weight for module in (self.student, self.head) for weight in module.parameters()]
        self.optimizer = torch.optim.SGD(weights, lr=self.base_rate, momentum=SGD_MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.transform = transform_for(size)
        self.pictures: dict[int, object] = {}
        self.step_index = 0

    def load(self) -> list[Tensor]:
        """Return the views of the next step, global ones first, each [B, 3, S, S]."""
        epoch, place = divmod(self.step_index, self.steps_per_epoch)
        order = keyed_random.order(self.seed, epoch, len(self.data))
        rows = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
        pictures = [self.picture(row) for row in rows]
        with keyed_random.seed_scope(int(keyed_random.make_key(STREAM, self.seed, self.step_index))):
            views = [self.transform(picture) for picture in pictures]
        return [torch.stack(view).to(self.device) for view in zip(*views)]

    def picture(self, row: int):
        """Return one image as Pillow has it, decoded at its first use."""
        if row not in self.pictures:
            self.pictures[row] = to_pil_image(self.data.image(row))
        return self.pictures[row]

    def rate(self) -> float:
        """Return the learning rate of the present epoch."""
        epoch = self.step_index // self.steps_per_epoch
        return self.base_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def compute(self, views: list[Tensor]) -> Tensor:
        """Do one step as lightly's benchmark does: moving average, loss, SGD; returns the loss, 0-dim."""
        epoch = self.step_index // self.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        for module in (self.student, self.teacher, self.head, self.teacher_head):
            module.train()
        update_momentum(self.student, self.teacher, m=MOMENTUM)
        update_momentum(self.head, self.teacher_head, m=MOMENTUM)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            with torch.no_grad():
                targets = [self.teacher_head(pooled(self.teacher, view)).float() for view in views[:2]]
            outputs = [self.head(pooled(self.student, view)).float() for view in views]
        loss = self.criterion(targets, outputs, epoch=epoch)
        self.optimizer.zero_grad()
        loss.backward()
        self.head.cancel_last_layer_gradients(current_epoch=epoch)
        self.optimizer.step()
        self.step_index += 1
        return loss.detach()

    def state(self) -> dict:
        """Return what a continued run needs."""
        parts = {name: getattr(self, name).state_dict() for name in self.parts}
        return {**parts, "step": self.step_index}

    def load_state(self, state: dict) -> None:
        """Continue from a state."""
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.step_index = state["step"]

    parts = ("student", "teacher", "head", "teacher_head", "criterion", "optimizer")


def new_head(dim: int) -> nn.Module:
    """Return lightly's projection head for features of a width."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # lightly uses torch's older weight norm
        return DINOProjectionHead(dim, HIDDEN, BOTTLENECK, PROTOTYPES, batch_norm=True)


def transform_for(size: int):
    """Return lightly's transform of its CIFAR-10 benchmark, or from SMALL pixels on of its Imagenette benchmark."""
    if size < SMALL:
        return DINOTransform(global_crop_size=size, n_local_views=0, gaussian_blur=(0, 0, 0))
    return DINOTransform(global_crop_size=size, local_crop_size=size // 2)


def pooled(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the pooled features [B, D] of normalized images."""
    return encoder(images, attention=False).pooled
