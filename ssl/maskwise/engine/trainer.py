"""`Trainer`: one training step, and the state of a checkpoint."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskwise.distributed.world import World
from maskwise.engine.lamb import LAMB
from maskwise.engine.optim import SGD, gradient_norms, scale_grads_
from maskwise.errors import UserError

if TYPE_CHECKING:
    from maskwise.distributed.fsdp import ShardedMethod  # a slow import that only sharded runs need

CAUSES = ("loss", "gradient", "center")  # of a skipped step, in the order of `_nonfinite_counts`
RECENT_STEPS = 1000  # how many steps back `bad_batches` reports


@dataclass(frozen=True)
class Schedules:
    """Length of a run, and learning rate, weight decay and teacher momentum as functions of the step."""

    lr: Callable[[int], float]
    weight_decay: Callable[[int], float]
    momentum: Callable[[int], float]
    steps_per_epoch: int
    total_steps: int


class Trainer:
    """A method with its optimizer and schedules; `.step` does one full step and `.step_index` counts them.

    `method` is a `maskwise.methods.base.Method`; its `center_shift`, if its losses contain one, is guarded too. Weight
    decay is set in the groups whose `weight_decay_on` is true. `clip` is the largest gradient norm per tensor or, with
    `clip_mode="global"`, of all together (None: off). While epoch < `freeze_last_layer` no tensor named `last_layer`
    moves, and in the first `freeze_steps` steps no parameter named in `frozen`. `precision` is fp32 or bf16 (autocast).
    `accumulate` splits a batch into that many micro-batches with the draws, centers and losses of the whole batch
    (batch norm excepted). With `shards` the method is sharded over ranks and the optimizer holds this rank's rows.
    """

    def __init__(
        self,
        method: nn.Module,
        *,
        optimizer: torch.optim.Optimizer,
        world: World,
        schedules: Schedules,
        clip: float | None = 3.0,
        clip_mode: str = "tensor",
        freeze_last_layer: int = 1,
        precision: str = "fp32",
        accumulate: int = 1,
        frozen: Sequence[str] = (),
        freeze_steps: int = 0,
        shards: ShardedMethod | None = None,
    ):
        self.method = method.train()
        self.optimizer = optimizer
        self.world = world
        self.schedules = schedules
        self.clip = clip
        self.clip_mode = clip_mode
        self.freeze_last_layer = freeze_last_layer
        self.precision = precision
        self.accumulate = accumulate
        self.freeze_steps = freeze_steps
        self.shards = shards
        if shards is None:
            self.forward = world.wrap(method.to(world.device))
        else:
            self.forward = partial(shards.run, method.forward)
        self.statistics = [
            buffer
            for part in method.modules()
            if isinstance(part, _BatchNorm)
            for buffer in part.buffers(recurse=False)
        ]
        named = shards.local.items() if shards else method.named_parameters()
        self.names = {parameter: name for name, parameter in named}
        self.frozen = [parameter for parameter, name in self.names.items() if name in set(frozen)]
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        unknown = sum(parameter not in self.names for parameter in self.parameters)
        if unknown:
            raise ValueError(f"{unknown} parameters of the optimizer are not the method's")
        self.step_index = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.skipped_in_a_row = torch.zeros_like(self.skipped)
        self.recent: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=RECENT_STEPS)

    @property
    def total_steps(self) -> int:
        """Length of the run in steps."""
        return self.schedules.total_steps

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch."""
        return self.schedules.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epoch of the next step, from 0."""
        return self.step_index // self.steps_per_epoch

    def step(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        sample_ids: Tensor | None = None,
        *,
        statistics: bool = False,
    ) -> dict[str, Tensor]:
        """Do one full step on this rank's crops; returns detached 0-dim tensors, without a host sync.

        `global_crops` [2B, 3, S, S] and `local_crops` [LB, 3, s, s] are crop-major, normalized floats or uint8 (a
        method that learns labels takes images and targets); `sample_ids` [B], on the CPU, are dataset indices, by
        default positions in the global batch. `statistics` adds collapse statistics. A step whose loss, reduced
        gradients or next centers are not finite on any rank moves no weight, moment, buffer, teacher or center; it is
        counted in `.skipped` and listed by `bad_batches`, and the schedules go on.
        """
        step, epoch = self.step_index, self.epoch
        self._set_rates(step)
        crops = [self._floats(crops) for crops in (global_crops, local_crops)]
        if sample_ids is None:
            samples = len(global_crops) // self.method.views
            sample_ids = torch.arange(samples) + self.world.rank * samples
        before = [buffer.clone() for buffer in self.statistics]
        self.optimizer.zero_grad(set_to_none=True)
        options = {"step": step, "epoch": epoch}
        if statistics and self.method.has_statistics:
            options["statistics"] = True
        losses = self._losses(*crops, sample_ids, options)
        if self.shards:
            self.shards.take_gradients()
        if step < self.freeze_steps:  # every gradient was computed, so that no rank waits for one
            self._drop_gradients(self.frozen)
        norms = self._clip()
        nonfinite = self._nonfinite_counts(losses, norms)
        ok = nonfinite.sum() == 0
        if epoch < self.freeze_last_layer:
            self._drop_gradients(p for p in self.parameters if "last_layer" in self.names[p])
        step_if(ok, self.optimizer)
        for buffer, old in zip(self.statistics, before):
            buffer.copy_(torch.where(ok, buffer, old))
        self.method.update_teacher(self.schedules.momentum(step), ok)
        self.skipped += ~ok
        self.skipped_in_a_row = torch.where(ok, 0, self.skipped_in_a_row + 1)
        self.recent.append((step, sample_ids, nonfinite))
        self.step_index += 1
        return {**losses, "grad_norm": torch.linalg.vector_norm(norms), "ok": ok}

    def eval_model(self):
        """Return the method for evaluations and figures of a single rank; if sharded, every rank must call this."""
        return self.shards.eval_model() if self.shards else self.method

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the contents of a checkpoint: the method's state dict, and moments as `exp_avg/PARAMETER NAME`."""
        moments = {}
        for parameter, state in self.optimizer.state.items():
            name = self.names[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor):
                    moments[f"{key}/{name}"] = self.shards.as_dtensor(name, value) if self.shards else value
        return self.method.state_dict(), moments

    def load_tensors(
        self, model: dict[str, Tensor], optimizer: dict[str, Tensor], *, step: int, skipped: int = 0
    ) -> None:
        """Load the state of `tensors()` after `step` steps; raises UserError if names or shapes do not fit."""
        try:
            self.method.load_state_dict(self.shards.shard_state(model) if self.shards else model)
            index = {self.names[parameter]: i for i, parameter in enumerate(self.parameters)}
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in optimizer.items():
                kind, name = key.split("/", 1)
                own = self.shards.local_rows(name, value) if self.shards else value
                state.setdefault(index[name], {})[kind] = in_layout_of(own, self.parameters[index[name]])
        except (RuntimeError, KeyError) as error:
            reason = str(error).replace("\n", " ")
            raise UserError(
                f"the checkpoint does not fit this model ({reason}): use the recipe of this run, or another folder"
            ) from None
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step_index = step
        self.skipped.fill_(skipped)

    def _set_rates(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedules.lr(step) * group.get("lr_factor", 1.0)
            if group.get("weight_decay_on"):
                group["weight_decay"] = self.schedules.weight_decay(step)

    def _losses(self, global_crops, local_crops, sample_ids, options: dict) -> dict[str, Tensor]:
        """Return the losses, detached, and compute their gradients, over all micro-batches of this rank."""
        batches = micro_batches(global_crops, local_crops, sample_ids, self.accumulate)
        teacher_options = self._teacher_pass(batches, options)
        results = []
        for i, ((*crops, ids), teacher) in enumerate(zip(batches, teacher_options)):
            # DDP reduces gradients once per step; shards after every micro-batch, or whole gradients need memory
            reduces = self.world.size == 1 or i == len(batches) - 1 or self.shards is not None
            with contextlib.nullcontext() if reduces else self.forward.no_sync():
                with self._precision():
                    losses = self.forward(*crops, **options, sample_ids=ids, **teacher)
                (losses["loss"] / len(batches)).backward()
            results.append({key: value.detach() for key, value in losses.items()})
        if len(results) == 1:
            return results[0]
        return {key: torch.stack([losses[key] for losses in results]).mean(dim=0) for key in results[0]}

    def _teacher_pass(self, batches: list[tuple], options: dict) -> list[dict]:
        """Return the teacher's outputs for several micro-batches, whose targets depend on the whole batch."""
        if len(batches) == 1 or not self.method.shares_targets:
            return [{}] * len(batches)
        forward = partial(self._share_targets, batches, options["step"], options["epoch"])
        with self._precision():
            outputs = self.shards.run(forward) if self.shards else forward()
        return [{"teacher": output} for output in outputs]

    def _share_targets(self, batches: list[tuple], step: int, epoch: int) -> list:
        forward = partial(self.method.teacher_forward, step=step, epoch=epoch)
        return self.method.share_targets([forward(*crops, sample_ids=ids) for *crops, ids in batches], epoch)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _floats(self, crops: Tensor | None) -> Tensor | None:
        """Return crops as normalized floats on the device, None if there are none."""
        if crops is None or len(crops) == 0:
            return None
        crops = crops.to(self.world.device, non_blocking=True)
        if crops.is_floating_point():
            return crops
        encoder = self.method.student.encoder
        mean, std = (
            torch.as_tensor(value, dtype=torch.float32, device=crops.device).view(-1, 1, 1)
            for value in (encoder.mean, encoder.std)
        )
        return (crops.float() / torch.iinfo(crops.dtype).max - mean) / std

    def _clip(self) -> Tensor:
        """Clip the reduced gradients; returns the clipped norms before that: [n], or their joint norm if global."""
        norms = gradient_norms(self.parameters, self.shards.total if self.shards else None)
        if self.clip:
            norms = norms if self.clip_mode == "tensor" else norms.norm()
            scale_grads_(self.parameters, norms, self.clip)
        return norms

    def _drop_gradients(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None

    def _nonfinite_counts(self, losses: dict[str, Tensor], norms: Tensor) -> Tensor:
        """Return how many ranks have a non-finite loss, gradient or next center, int64 [3] on the device."""
        shift = losses.get("center_shift", torch.zeros_like(losses["loss"]))
        finite = torch.stack([torch.isfinite(losses["loss"]), torch.isfinite(norms).all(), torch.isfinite(shift)])
        return self.world.all_sum((~finite).to(torch.int64))

    def bad_batches(self) -> list[dict]:
        """Return the skipped steps since the last call, of the last thousand; a host sync that every rank must make.

        Each is {"step": number, "causes": of CAUSES, "sample_ids": a list for each rank}.
        """
        recent, self.recent = list(self.recent), deque(maxlen=RECENT_STEPS)
        if not recent:
            return []
        skipped = []
        for (step, sample_ids, _), counts in zip(recent, torch.stack([counts for *_, counts in recent]).tolist()):
            if any(counts):
                causes = [cause for cause, count in zip(CAUSES, counts) if count]
                ids = self.world.gather_objects(sample_ids.tolist())
                skipped.append({"step": step + 1, "causes": causes, "sample_ids": ids})
        return skipped

    @torch.no_grad()
    def teacher_gap(self) -> Tensor | None:
        """Return the distance of teacher from student parameters over the latter's norm, 0-dim.

        None if the student is its own teacher, or if weights are sharded.
        """
        teacher, student = self.method.teacher, self.method.student
        if self.shards or teacher is student:
            return None
        weights = dict(student.named_parameters())
        pairs = [(parameter, weights[name]) for name, parameter in teacher.named_parameters()]
        gaps = torch.stack([torch.linalg.vector_norm(new - old) for old, new in pairs])
        lengths = torch.stack([torch.linalg.vector_norm(new) for _, new in pairs])
        return gaps.norm() / lengths.norm()


def micro_batches(global_crops: Tensor, local_crops: Tensor | None, sample_ids: Tensor, count: int) -> list[tuple]:
    """Split crop-major crops [V * B, ...] and sample ids [B] into `count` tuples of the same for B / count samples.

    Raises UserError if `count` does not divide B.
    """
    samples = len(sample_ids)
    if count == 1:
        return [(global_crops, local_crops, sample_ids)]
    if samples % count:
        raise UserError(
            f"{samples} images of a rank do not divide into {count} micro-batches: "
            f"choose train.accumulate among the divisors of {samples}"
        )
    size = samples // count
    batches = []
    for start in range(0, samples, size):
        rows = slice(start, start + size)
        crops = [
            None if crops is None else crops.unflatten(0, (-1, samples))[:, rows].flatten(0, 1)
            for crops in (global_crops, local_crops)
        ]
        batches.append((*crops, sample_ids[rows]))
    return batches


def in_layout_of(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor in the memory layout of a parameter of its shape, such as channels-last.

    Checkpoints hold contiguous tensors, and fused optimizers pair the elements of both by their place in memory.
    """
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def step_if(ok: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Call `optimizer.step()` where the 0-dim bool `ok` holds, else change nothing, moments and step counts included.

    On a GPU this is no host sync if the optimizer supports `found_inf` (ours and fused Adam do).
    """
    if ok.device.type != "cpu" and supports_found_inf(optimizer):
        optimizer.grad_scale, optimizer.found_inf = None, (~ok).float()
        optimizer.step()
    elif ok:
        optimizer.step()


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step with `optimizer.found_inf` = 1 leaves every weight and moment unchanged."""
    fused_adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and bool(optimizer.defaults.get("fused"))
    return fused_adam or isinstance(optimizer, (SGD, LAMB))
