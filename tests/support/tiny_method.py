"""A student-teacher method of a few numbers, for tests of the engine."""

import dataclasses
import json
import math

import torch
from torch import nn

from maskwise.distributed.world import World
from maskwise.engine.optim import make_optimizer, parameter_groups
from maskwise.engine.trainer import Schedules, Trainer
from maskwise.functional import keyed_random
from maskwise.methods.base import Method

PROTOTYPES, SIZE, IMAGES = 6, 4, 8


class Encoder(nn.Module):
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, norm):
        super().__init__()
        self.trunk = nn.Linear(3 * SIZE * SIZE, 5)
        self.norm = nn.BatchNorm1d(5) if norm else nn.LayerNorm(5)

    def forward(self, crops):
        return self.norm(self.trunk(crops.flatten(1)))

    def spec(self):
        return {"name": "tiny"}


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.last_layer = nn.Linear(5, PROTOTYPES, bias=False)

    def forward(self, x):
        return self.last_layer(torch.tanh(x))


class Network(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.encoder, self.head = Encoder(norm), Head()

    def forward(self, crops):
        return self.head(self.encoder(crops))


class TinyMethod(Method):
    def __init__(self, norm=False, world=World()):
        super().__init__()
        torch.manual_seed(0)
        self.student, self.teacher, self.world = Network(norm), Network(norm), world
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(PROTOTYPES))
        self.alias = self.student.head.last_layer

    def forward(self, global_crops, local_crops, *, step, epoch, sample_ids):
        with torch.no_grad():
            targets = self.teacher(global_crops)
        self.pending = self.world.all_sum(targets.mean(0)) / self.world.size
        keys = keyed_random.make_key(keyed_random.DROP_PATH, 0, step, torch.cat([sample_ids, sample_ids]), 0)
        keep = keyed_random.uniform(keys, 1).to(global_crops.dtype)
        logits = self.student(global_crops * keep[:, :, None, None])
        if local_crops is not None:
            logits = torch.cat([logits, self.student(local_crops)])
        probabilities = ((targets - self.center) / 0.04).softmax(-1)
        loss = -(probabilities.mean(0) * (logits / 0.1).log_softmax(-1)).sum(-1).mean()
        return {"loss": loss, "cls": loss.detach()}

    @torch.no_grad()
    def update_teacher(self, momentum, ok=None):
        ok = torch.tensor(True) if ok is None else ok
        for old, new in zip(self.teacher.parameters(), self.student.parameters()):
            old.copy_(torch.where(ok, old.lerp(new, 1 - momentum), old))
        self.center.copy_(torch.where(ok, 0.9 * self.center + 0.1 * self.pending, self.center))


@dataclasses.dataclass
class Batch:
    global_crops: torch.Tensor
    local_crops: torch.Tensor
    index: torch.Tensor

    def to(self, device):
        return self


def crops(step, images=IMAGES):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2 * images, 3, SIZE, SIZE, generator=generator), torch.randn(
        images, 3, SIZE, SIZE, generator=generator
    )


class Stream:
    """Batches from step `start` on, a function of the step; `on_batch(step)` is called before each."""

    def __init__(self, start, total, on_batch=lambda step: None):
        self.step, self.total, self.on_batch, self.corrupt = start, total, on_batch, {}
        self.seen, self.count, self.ceiling = 0, 1000, 0.01

    def __iter__(self):
        return self

    def __next__(self):
        if self.step >= self.total:
            raise StopIteration
        self.on_batch(self.step)
        batch = Batch(*crops(self.step), torch.arange(IMAGES) + self.step)
        self.step += 1
        self.seen += IMAGES
        return batch


def make_trainer(total=12, optimizer="adamw", norm=False, world=World(), steps_per_epoch=4, **options):
    method = TinyMethod(norm, world)
    built = make_optimizer(optimizer, parameter_groups(method.student))
    return Trainer(
        method,
        optimizer=built,
        world=world,
        schedules=Schedules(
            lr=lambda step: 0.05 * min(step, 3) / 3,
            weight_decay=lambda step: 0.04 + 0.36 * (1 - math.cos(math.pi * step / total)) / 2,
            momentum=lambda step: 0.9,
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
        ),
        **options,
    )


def state(trainer):
    """Return a copy of a trainer's tensors, model and optimizer."""
    model, moments = trainer.tensors()
    return {key: value.clone() for key, value in {**model, **moments}.items()}


@dataclasses.dataclass
class Report:
    """A report of numbers only."""

    numbers: dict

    def save(self, path):
        """Write the numbers as JSON."""
        path.write_text(json.dumps(self.numbers))
