"""`Shards`: a method whose weights, gradients and moments lie split over the ranks (FSDP2); what reaches the disk is whole."""

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from maskwise.distributed.world import LEFT, World
from maskwise.functional.errors import UserError

KINDS = ("fsdp", "hsdp")
OFFSETS = "DCP_SHARDING_INFO"  # the key under which torch's writer of safetensors tells where a part begins


class Shards:
    """Splits a student-teacher method in place: each block of both transformers is gathered when it runs, all else for the whole step.

    `kind` "fsdp" splits over all ranks, "hsdp" over the ranks of a node and repeats that on every node. Each rank keeps an equal
    share of rows of every tensor, of the teacher's the same as of the student's, so that the moving average is local; buffers
    (the centers) are whole everywhere. Weights become those of rank 0. With precision "bf16" on GPUs blocks are gathered in
    bf16; gradients are added up in float32. What trains is `own`: this rank's rows by name, plain parameters that share the
    memory of the split ones. Raises UserError for a backbone or a number of ranks that cannot be split so.
    """

    def __init__(self, method: nn.Module, world: World, kind: str = "fsdp", *, precision: str = "fp32"):
        self.world, self.mesh = world, _mesh(world, kind)
        self.group = self.mesh["shard"].get_group()
        LEFT.extend(self.mesh.get_all_groups())
        method = world.synchronised(method)
        world.equalise(method)
        self.hollow = _hollow(method.teacher.encoder)
        narrow = precision == "bf16" and world.device.type == "cuda"
        policy = MixedPrecisionPolicy(*((torch.bfloat16, torch.float32) if narrow else ()), cast_forward_inputs=False)
        for network in (method.student, method.teacher):
            for block in dict(network.encoder.backbone.named_children()).get("blocks", ()):
                if isinstance(block, nn.Sequential):  # stacks of an EfficientNet, gathered for the whole step as other convolutions
                    continue
                _split(block, self.mesh, policy)
        _split(method, self.mesh, MixedPrecisionPolicy(cast_forward_inputs=False))
        self.method = method
        self.split: dict[str, DTensor] = dict(method.named_parameters())
        self.own = {name: nn.Parameter(whole.to_local().detach(), whole.requires_grad) for name, whole in self.split.items()}

    def run(self, function: Callable, *arguments, **options):
        """function(...) with the weights outside the blocks gathered; blocks gather themselves. Every rank must come here."""
        return self.method.gathered(lambda: function(*arguments, **options))

    def own_groups(self, groups: list[dict]) -> list[dict]:
        """Parameter groups of the method with this rank's rows in place of the split parameters."""
        names = {whole: name for name, whole in self.split.items()}
        return [{**group, "params": [self.own[names[parameter]] for parameter in group["params"]]} for group in groups]

    def take_gradients(self) -> None:
        """Hand the gradients that the backward pass has added up over ranks to `own`."""
        for name, whole in self.split.items():
            self.own[name].grad = None if whole.grad is None else whole.grad.to_local()
            whole.grad = None

    def total(self, squares: Tensor) -> Tensor:
        """Sum over the ranks that hold parts of one tensor; the argument is not written to."""
        squares = squares.clone()
        dist.all_reduce(squares, group=self.group)
        return squares

    def like(self, name: str, rows: Tensor) -> Tensor:
        """Rows of this rank, one for each of its rows of the parameter `name`, as a split tensor; others as they are."""
        whole = self.split[name]
        if rows.shape != self.own[name].shape:
            return rows
        return DTensor.from_local(rows, self.mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor that is shaped like the parameter `name`; others as they are."""
        return self._split_like(self.split[name], whole).to_local().clone() if whole.shape == self.split[name].shape else whole

    def divide(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, by the method's names, as its split parameters are split; nothing is sent."""
        return {name: self._split_like(self.split[name], tensor) if name in self.split else tensor for name, tensor in tensors.items()}

    def shown(self):
        """What evaluations and pictures look at: the whole teacher's encoder and the masking; every rank must ask."""
        encoder = copy.deepcopy(self.hollow)
        split = self.method.teacher.encoder.state_dict()
        whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in split.items()}
        encoder.load_state_dict(whole, assign=True)
        return SimpleNamespace(teacher=SimpleNamespace(encoder=encoder.to(self.world.device)), masking=self.method.masking)

    def spread(self, folder, tensors: dict[str, Tensor]) -> None:
        """Write tensors, each rank its rows, into a folder that all ranks see (DCP, safetensors); raises UserError when a disk refuses."""
        from torch.distributed import checkpoint

        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
        self.world.barrier()
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            checkpoint.save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
        except checkpoint.CheckpointException as error:
            reason = "; ".join(str(cause[0] if isinstance(cause, tuple) else cause) for cause in error.failures.values())
            raise UserError(f"cannot write the checkpoint {folder} ({reason}): free some space and start the same command again") from None

    def collect(self, folder, file) -> None:
        """One safetensors file of whole tensors from a folder that `spread` wrote; on one rank."""
        collect(folder, file)
        shutil.rmtree(folder)

    def _split_like(self, like: DTensor, whole: Tensor) -> Tensor:
        if whole.shape != like.shape:
            return whole  # for load_state_dict to complain about
        return distribute_tensor(whole.to(like.dtype), self.mesh, like.placements, src_data_rank=None)


def collect(folder, file) -> None:
    """One safetensors file from a folder of parts that `Shards.spread` wrote, row by row of parts: no tensor is held in memory."""
    parts: dict[str, list] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            header = json.loads(source.read(length))
        offsets = json.loads(header.pop("__metadata__")[OFFSETS])
        for name, about in header.items():
            begin, end = about["data_offsets"]
            if end > begin:
                parts.setdefault(name, []).append((offsets[name]["saved_offsets"], about, path, 8 + length + begin, end - begin))
    header, place = {}, 0
    names = sorted(parts, key=lambda name: (-_bits(parts[name][0][1]["dtype"]), name))  # wide types first, as the format's own writer
    for name in names:
        parts[name].sort(key=lambda part: part[0])
        first = parts[name][0][1]
        shape = [sum(part[1]["shape"][0] for part in parts[name]), *first["shape"][1:]] if first["shape"] else []
        size = sum(part[-1] for part in parts[name])
        header[name] = {"dtype": first["dtype"], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for _, _, path, begin, size in parts[name]:
                with open(path, "rb") as source:
                    source.seek(begin)
                    while size and (block := source.read(min(size, 1 << 24))):
                        size -= target.write(block)


def _bits(dtype: str) -> int:
    return int("".join(letter for letter in dtype.partition("_")[0] if letter.isdigit()) or 8)


def _mesh(world: World, kind: str) -> DeviceMesh:
    if kind not in KINDS:
        raise UserError(f"speed.shard={kind!r} is unknown: choose none, {', '.join(KINDS)}")
    if kind == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if world.size % local or local in (1, world.size):
        raise UserError(f"speed.shard=hsdp wants several nodes with several ranks each, not {world.size} ranks with {local} on this node: use speed.shard=fsdp")
    return init_device_mesh(world.device.type, (world.size // local, local), mesh_dim_names=("repeat", "shard"))


def _split(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Split a module whose weights are used inside `module.gathered(function, ...)`, whatever function that is."""
    fully_shard(module, mesh=mesh, mp_policy=policy)
    module.gathered = _run
    register_fsdp_forward_method(module, "gathered")


def _run(function: Callable, *arguments):
    return function(*arguments)


def _hollow(module: nn.Module) -> nn.Module:
    """A copy without weights."""
    memo = {id(each): nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad) for each in module.parameters()}
    return copy.deepcopy(module, memo)
