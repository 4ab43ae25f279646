"""FSDP2: weights, gradients and moments sharded over ranks; checkpoints hold whole tensors."""

import copy
import json
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

from maskwise.distributed.environment import local_world_size
from maskwise.distributed.world import World, keep_alive
from maskwise.errors import UserError

KINDS = ("fsdp", "hsdp")
OFFSETS = "DCP_SHARDING_INFO"  # key in which torch's safetensors writer stores the offset of a part


class ShardedMethod:
    """Shard a student-teacher method in place.

    Each transformer block of student and teacher is gathered when it runs, everything else for the whole step. kind:
    "fsdp" shards over all ranks, "hsdp" over the ranks of a node, replicated on every node. Each rank keeps an equal
    share of the rows of every tensor, the same for student and teacher, so that the EMA is local; buffers (the centers)
    are whole. Weights are copied from rank 0. With precision "bf16" on GPUs blocks are gathered in bf16; gradients are
    summed in float32. `local` holds this rank's rows by name, plain parameters that share memory with the sharded ones.
    Raises UserError for a backbone or a number of ranks that cannot be sharded this way.
    """

    def __init__(self, method: nn.Module, world: World, kind: str = "fsdp", *, precision: str = "fp32"):
        self.world, self.mesh = world, _mesh(world, kind)
        self.group = self.mesh["shard"].get_group()
        keep_alive(self.mesh.get_all_groups())
        method = world.synchronize_batch_norm(method)
        method.to(memory_format=torch.contiguous_format)  # FSDP2 takes no channels-last weights
        world.broadcast_parameters(method)
        self.meta_encoder = meta_copy(method.teacher.encoder)
        bf16 = precision == "bf16" and world.device.type == "cuda"
        policy = MixedPrecisionPolicy(*((torch.bfloat16, torch.float32) if bf16 else ()), cast_forward_inputs=False)
        for network in (method.student, method.teacher):
            for block in dict(network.encoder.backbone.named_children()).get("blocks", ()):
                if not isinstance(block, nn.Sequential):  # stages of an EfficientNet are gathered for the whole step
                    _shard(block, self.mesh, policy)
        _shard(method, self.mesh, MixedPrecisionPolicy(cast_forward_inputs=False))
        self.method = method
        self.sharded: dict[str, DTensor] = dict(method.named_parameters())
        self.local = {
            name: nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
            for name, parameter in self.sharded.items()
        }

    def run(self, function: Callable, *arguments, **options):
        """Call a function with the weights outside the blocks gathered; all ranks must call it together."""
        return self.method.gathered(lambda: function(*arguments, **options))

    def own_groups(self, groups: list[dict]) -> list[dict]:
        """Return the method's parameter groups with this rank's rows in place of the sharded parameters."""
        names = {parameter: name for name, parameter in self.sharded.items()}
        return [
            {**group, "params": [self.local[names[parameter]] for parameter in group["params"]]} for group in groups
        ]

    def take_gradients(self) -> None:
        """Move the gradients that the backward pass has summed over ranks to `local`."""
        for name, parameter in self.sharded.items():
            self.local[name].grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None

    def total(self, squares: Tensor) -> Tensor:
        """Sum over the ranks that hold shards of one tensor; the argument is not modified."""
        squares = squares.clone()
        dist.all_reduce(squares, group=self.group)
        return squares

    def as_dtensor(self, name: str, rows: Tensor) -> Tensor:
        """Return this rank's rows of a tensor shaped like the parameter `name` as a DTensor; others unchanged."""
        parameter = self.sharded[name]
        if rows.shape != self.local[name].shape:
            return rows
        return DTensor.from_local(
            rows, self.mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    def local_rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a whole tensor shaped like the parameter `name`; others unchanged."""
        if tensor.shape != self.sharded[name].shape:
            return tensor
        return self._shard_like(self.sharded[name], tensor).to_local().clone()

    def shard_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shard whole tensors, by the method's names, as its parameters are; nothing is sent."""
        return {
            name: self._shard_like(self.sharded[name], tensor) if name in self.sharded else tensor
            for name, tensor in tensors.items()
        }

    def eval_model(self):
        """Return the whole teacher encoder and the masking for evaluations and pictures; all ranks must call it."""
        encoder = copy.deepcopy(self.meta_encoder)
        state = self.method.teacher.encoder.state_dict()
        whole = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()
        }
        encoder.load_state_dict(whole, assign=True)
        return SimpleNamespace(
            teacher=SimpleNamespace(encoder=encoder.to(self.world.device)), masking=self.method.masking
        )

    def scatter_state(self, folder, tensors: dict[str, Tensor]) -> None:
        """Write each rank's rows of tensors into a shared folder (DCP); raises UserError if a disk refuses."""
        from torch.distributed import checkpoint

        if self.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
        self.world.barrier()
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            checkpoint.save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
        except checkpoint.CheckpointException as error:
            causes = [cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values()]
            raise UserError(
                f"cannot write the checkpoint {folder} ({'; '.join(map(str, causes))}): free some space and start the "
                "same "
                "command again"
            ) from None

    def gather_state(self, folder, file) -> None:
        """Assemble one safetensors file of whole tensors from a folder of `scatter_state`; on one rank."""
        gather_state(folder, file)
        shutil.rmtree(folder)

    def _shard_like(self, like: DTensor, tensor: Tensor) -> Tensor:
        if tensor.shape != like.shape:
            return tensor  # load_state_dict reports the mismatch
        return distribute_tensor(tensor.to(like.dtype), self.mesh, like.placements, src_data_rank=None)


def gather_state(folder, file) -> None:
    """Assemble one safetensors file from a folder of parts, copied in blocks so that no tensor is held in memory."""
    parts: dict[str, list] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            header = json.loads(source.read(length))
        offsets = json.loads(header.pop("__metadata__")[OFFSETS])
        for name, about in header.items():
            begin, end = about["data_offsets"]
            if end > begin:
                parts.setdefault(name, []).append(
                    (offsets[name]["saved_offsets"], about, path, 8 + length + begin, end - begin)
                )
    header, place = {}, 0
    # wide types first, as safetensors' own writer
    names = sorted(parts, key=lambda name: (-_bits(parts[name][0][1]["dtype"]), name))
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
    local = local_world_size(world.size)
    if world.size % local or local in (1, world.size):
        raise UserError(
            f"speed.shard=hsdp needs several nodes with several ranks each, not {world.size} ranks with {local} on "
            "this "
            "node: use speed.shard=fsdp"
        )
    return init_device_mesh(world.device.type, (world.size // local, local), mesh_dim_names=("repeat", "shard"))


def _shard(module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard a module; its weights are gathered inside `module.gathered(function, ...)`."""
    fully_shard(module, mesh=mesh, mp_policy=policy)
    module.gathered = _run
    register_fsdp_forward_method(module, "gathered")


def _run(function: Callable, *arguments):
    return function(*arguments)


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module with its parameters on the meta device."""
    memo = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo)
