"""`Trainer`: one training step, and the state that a checkpoint must hold."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.distributed.world import World
from maskwise.engine.lamb import LAMB
from maskwise.engine.optim import LARS, SGD, gradient_norms, shrink_
from maskwise.functional.errors import UserError

if TYPE_CHECKING:
    from maskwise.distributed.shard import Shards  # its imports take a second that only split runs need

CAUSES = ("loss", "gradient", "center")  # what may not be finite, in the order of the guard's counts
REMEMBERED = 1000  # steps whose sample ids and guard wait for `bad_batches`


class Trainer:
    """A method with its optimizer and schedules; `.step` does one full step and `.step_index` counts them.

    `method` is a module called with (global_crops, local_crops, *, step, epoch, sample_ids) that returns a dict with
    `loss` (and `center_move`, where centers wait for the update, so that they are guarded too), and has `update_teacher(momentum, ok)`; one that learns labels takes (images, targets) in their place. `lr`, `weight_decay` and `momentum` map the step index to a number
    (attmask.md 1.6); weight decay is set in the groups whose `weight_decay_on` is true. `clip` is the largest gradient
    norm per tensor or, with `clip_mode="global"`, of all together (None: off). While epoch < `freeze_last_layer` no
    tensor named `last_layer` moves, and in the first `still_steps` steps no parameter named in `still`. `precision` is fp32 or bf16 (autocast).
    `accumulate` takes a batch in that many micro-batches, whose one step is that of the batch whole: same draws, centers and losses (batch norm excepted).
    `shards` says that the method is split over the ranks; the optimizer then holds this rank's rows (`shards.own`).
    """

    def __init__(self, method: nn.Module, *, optimizer: torch.optim.Optimizer, world: World, lr: Callable[[int], float],
                 weight_decay: Callable[[int], float], momentum: Callable[[int], float], steps_per_epoch: int,
                 total_steps: int, clip: float | None = 3.0, clip_mode: str = "tensor", freeze_last_layer: int = 1,
                 precision: str = "fp32", accumulate: int = 1, still: Sequence[str] = (), still_steps: int = 0, shards: Shards | None = None):
        self.method, self.optimizer, self.world, self.shards = method.train(), optimizer, world, shards
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.clip, self.clip_mode, self.freeze_last_layer, self.precision = clip, clip_mode, freeze_last_layer, precision
        self.accumulate = accumulate
        if shards is None:
            self.forward = world.wrap(method.to(world.device))
        else:
            self.forward = partial(shards.run, method.forward)
            if isinstance(optimizer, LARS):
                optimizer.total = shards.total
        self.statistics = [buffer for part in method.modules() if isinstance(part, _BatchNorm) for buffer in part.buffers(recurse=False)]
        self.step_index = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.skipped_in_a_row = torch.zeros_like(self.skipped)
        self.recent: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=REMEMBERED)
        self.names = {parameter: name for name, parameter in (shards.own.items() if shards else method.named_parameters())}
        self.still, self.still_steps = [parameter for parameter, name in self.names.items() if name in set(still)], still_steps
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        strangers = [parameter for parameter in self.parameters if parameter not in self.names]
        if strangers:
            raise ValueError(f"{len(strangers)} parameters of the optimizer are not the method's")

    @property
    def epoch(self) -> int:
        """Epoch of the next step, from 0."""
        return self.step_index // self.steps_per_epoch

    def step(self, global_crops: Tensor, local_crops: Tensor | None = None, sample_ids: Tensor | None = None) -> dict[str, Tensor]:
        """One full step on this rank's crops; returns detached 0-dim tensors and does not wait for a GPU.

        `global_crops` [2B,3,S,S] and `local_crops` [LB,3,s,s] are crop-major, normalised floats or uint8 (of a method with `views`:
        images [views*B,3,S,S] and its other input, floats, one row a sample); `sample_ids` [B], on the host, are dataset indices (default: position in the global batch). A step whose loss, reduced
        gradients or next centers are not finite on any rank moves no weight, moment, buffer, teacher or center; it is counted in
        `.skipped`, `bad_batches` tells its sample ids, and the schedules go on. Order: attmask.md 1.7, 1.8.
        """
        step, epoch, device = self.step_index, self.epoch, self.world.device
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step) * group.get("lr_factor", 1.0)
            if group.get("weight_decay_on"):
                group["weight_decay"] = self.weight_decay(step)
        crops = [self._floats(crops) for crops in (global_crops, local_crops)]
        if sample_ids is None:
            images = len(global_crops) // getattr(self.method, "views", 2)
            sample_ids = torch.arange(images) + self.world.rank * images
        statistics = [buffer.clone() for buffer in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        seen = self._losses(*crops, sample_ids, {"step": step, "epoch": epoch})
        if self.shards:
            self.shards.take_gradients()
        if step < self.still_steps:  # every gradient was computed, so that ranks never wait for one
            for parameter in self.still:
                parameter.grad = None
        norms = self._clip()
        faults = self._faults(seen, norms)
        ok = faults.sum() == 0
        if epoch < self.freeze_last_layer:
            for parameter in self.parameters:
                if "last_layer" in self.names[parameter]:
                    parameter.grad = None
        step_if(ok, self.optimizer)
        for buffer, before in zip(self.statistics, statistics):
            buffer.copy_(torch.where(ok, buffer, before))
        self.method.update_teacher(self.momentum(step), ok)
        self.skipped += ~ok
        self.skipped_in_a_row = torch.where(ok, 0, self.skipped_in_a_row + 1)
        self.recent.append((step, sample_ids, faults))
        self.step_index += 1
        return {**seen, "grad_norm": torch.linalg.vector_norm(norms), "ok": ok}

    def shown(self):
        """The method as evaluations and pictures may look at it on every rank alone; every rank must ask where it is split."""
        return self.shards.shown() if self.shards else self.method

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All that a checkpoint must hold: the method's state dict, and the moments as `exp_avg/PARAMETER NAME`; split where the method is."""
        moments = {
            f"{key}/{self.names[parameter]}": self.shards.like(self.names[parameter], value) if self.shards else value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        return self.method.state_dict(), moments

    def load_tensors(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], *, step: int, skipped: int = 0) -> None:
        """Take up the state of `tensors()` after `step` steps; raises UserError when names or shapes do not fit."""
        try:
            self.method.load_state_dict(self.shards.divide(model) if self.shards else model)
            index = {self.names[parameter]: i for i, parameter in enumerate(self.parameters)}
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in optimizer.items():
                kind, name = key.split("/", 1)
                state.setdefault(index[name], {})[kind] = self.shards.mine(name, value) if self.shards else value
        except (RuntimeError, KeyError) as error:
            reason = str(error).replace("\n", " ")
            raise UserError(f"the checkpoint does not fit this model ({reason}): use the recipe it was made with, or another folder") from None
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step_index = step
        self.skipped.fill_(skipped)

    def _losses(self, global_crops, local_crops, sample_ids, when: dict) -> dict[str, Tensor]:
        """Losses, detached, and their gradients, over all micro-batches of this rank."""
        parts = micro_batches(global_crops, local_crops, sample_ids, self.accumulate)
        lessons = [{}] * len(parts)
        if len(parts) > 1 and hasattr(self.method, "teach"):
            with self._precision():
                lessons = self.shards.run(self._taught, parts, when) if self.shards else self._taught(parts, when)
        found = []
        for i, ((*crops, ids), lesson) in enumerate(zip(parts, lessons)):
            # ranks exchange gradients once a step; shards after every micro-batch, or each would need room for them whole
            together = self.world.size == 1 or i == len(parts) - 1 or self.shards is not None
            with contextlib.nullcontext() if together else self.forward.no_sync():
                with self._precision():
                    seen = self.forward(*crops, **when, sample_ids=ids, **lesson)
                (seen["loss"] / len(parts)).backward()
            found.append({key: value.detach() for key, value in seen.items()})
        if len(found) == 1:
            return found[0]
        return {key: torch.stack([each[key] for each in found]).mean(dim=0) for key in found[0]}

    def _taught(self, parts, when: dict) -> list[dict]:
        taught = [self.method.teach(*crops, **when, sample_ids=ids) for *crops, ids in parts]
        return [{"lesson": lesson} for lesson in self.method.agree(taught, when["epoch"])]

    def _precision(self):
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _floats(self, crops):
        if crops is None or len(crops) == 0:
            return None
        crops = crops.to(self.world.device, non_blocking=True)
        if crops.is_floating_point():
            return crops
        encoder = self.method.student.encoder
        mean, std = (torch.as_tensor(value, dtype=torch.float32, device=crops.device).view(-1, 1, 1) for value in (encoder.mean, encoder.std))
        return (crops.float() / torch.iinfo(crops.dtype).max - mean) / std

    def _clip(self):
        """Clip the reduced gradients; returns their norms before, [n], or their joint norm where that is what is clipped."""
        norms = gradient_norms(self.parameters, self.shards.total if self.shards else None)
        if self.clip:
            norms = norms if self.clip_mode == "tensor" else norms.norm()
            shrink_(self.parameters, norms, self.clip)
        return norms

    def _faults(self, seen, norms):
        """How many ranks have a loss, gradients or next centers that are not finite, int64 [3] on the device."""
        center = seen.get("center_move", torch.zeros_like(seen["loss"]))
        finite = torch.stack([torch.isfinite(seen["loss"]), torch.isfinite(norms).all(), torch.isfinite(center)])
        return self.world.all_sum((~finite).to(torch.int64))

    def bad_batches(self) -> list[dict]:
        """The steps since the last call (of the last thousand) that were left out: `step` done, `causes` among CAUSES, and `sample_ids`,
        a list for each rank. Reads the device; every rank must ask.
        """
        recent, self.recent = list(self.recent), deque(maxlen=REMEMBERED)
        if not recent:
            return []
        found = []
        for (step, sample_ids, _), faults in zip(recent, torch.stack([faults for *_, faults in recent]).tolist()):
            if any(faults):
                ids = self.world.gather_objects(sample_ids.tolist())
                found.append({"step": step + 1, "causes": [cause for cause, count in zip(CAUSES, faults) if count], "sample_ids": ids})
        return found

    @torch.no_grad()
    def teacher_gap(self) -> Tensor | None:
        """Distance of the teacher's parameters from the student's over the length of these, 0-dim; None without a teacher of its own, and where weights are split."""
        if self.shards or getattr(self.method, "teacher", self.method.student) is self.method.student:
            return None
        student = dict(self.method.student.named_parameters())
        pairs = [(parameter, student[name]) for name, parameter in self.method.teacher.named_parameters()]
        apart, length = ([torch.linalg.vector_norm(each) for each in kind] for kind in ((new - old for old, new in pairs), (new for _, new in pairs)))
        return torch.stack(apart).norm() / torch.stack(length).norm()


def micro_batches(global_crops: Tensor, local_crops: Tensor | None, sample_ids: Tensor, count: int) -> list[tuple]:
    """Crop-major crops [V*B, ...] and sample ids [B] as `count` tuples of the same for B / count samples each.

    Raises UserError where the samples do not divide.
    """
    samples = len(sample_ids)
    if count == 1:
        return [(global_crops, local_crops, sample_ids)]
    if samples % count:
        raise UserError(f"{samples} images of a rank do not divide into {count} micro-batches: choose train.accumulate among the divisors of {samples}")
    size, parts = samples // count, []
    for start in range(0, samples, size):
        rows = slice(start, start + size)
        cut = [None if crops is None else crops.unflatten(0, (-1, samples))[:, rows].flatten(0, 1) for crops in (global_crops, local_crops)]
        parts.append((*cut, sample_ids[rows]))
    return parts


def step_if(ok: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` where the 0-dim bool `ok` holds, else nothing at all, moments and step counts included.

    On a GPU the host does not look where the optimizer heeds `found_inf` (ours and fused Adam do).
    """
    if ok.device.type != "cpu" and heeds_found_inf(optimizer):
        optimizer.grad_scale, optimizer.found_inf = None, (~ok).float()
        optimizer.step()
    elif ok:
        optimizer.step()


def heeds_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step with `optimizer.found_inf` = 1 leaves every weight and moment alone."""
    fused_adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and bool(optimizer.defaults.get("fused"))
    return fused_adam or isinstance(optimizer, (SGD, LAMB))
