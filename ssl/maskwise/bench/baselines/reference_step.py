"""Reference AttMask step in plain PyTorch, without optimizations: a baseline of `maskwise bench step`.

The projection head runs on every token of every crop, attention is three explicit operations, and the patch loss is
computed for all patches in several [tokens, K] float32 copies. Loops over crops, parameters and images run in Python
and read values back; AdamW is unfused, the moving average is a loop. Losses and masks equal those of
`maskwise.IBOT` with AttMask-High, given the same weights, crops and ratios.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with every matrix written out; returns the output and the attention [B, H, T, T]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1)) * self.scale
        attention = attention.softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, length, dim)), attention


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, ratio: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, int(dim * ratio)), "fc2": nn.Linear(int(dim * ratio), dim)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, attention = self.attn(self.norm1(x))
        x = x + mixed
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))), attention


class ViT(nn.Module):
    """A vision transformer: normalized tokens [B, 1 + N, D] and the last block's attention."""

    def __init__(
        self,
        size: tuple[int, int],
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        ratio: float = 4.0,
        mask_token: bool = True,
    ):
        super().__init__()
        self.patch, self.grid = patch, (size[0] // patch, size[1] // patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim)) if mask_token else None
        self.blocks = nn.ModuleList(Block(dim, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, height: int, width: int) -> Tensor:
        rows, columns = self.grid
        if (height, width) == (rows, columns):
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
        factors = ((height + 0.1) / rows, (width + 0.1) / columns)
        table = F.interpolate(table, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.permute(0, 2, 3, 1).reshape(1, height * width, -1)], dim=1)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.expand_as(x), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(
            images.shape[-2] // self.patch, images.shape[-1] // self.patch
        )
        for block in self.blocks:
            x, attention = block(x)
        return self.norm(x), attention


class Head(nn.Module):
    """Projection head over every token it is given: [B, T, D] -> class logits [B, K] and patch logits [B, T - 1, K]."""

    def __init__(self, dim: int, prototypes: int, hidden: int, bottleneck: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = nn.ParameterDict(
            {"weight_g": torch.ones(prototypes, 1), "weight_v": torch.zeros(prototypes, bottleneck)}
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        z = F.normalize(self.mlp(tokens), dim=-1)
        v = self.last_layer["weight_v"]
        weight = v * (self.last_layer["weight_g"] / v.norm(dim=1, keepdim=True))
        return F.linear(z[:, 0], weight), F.linear(z[:, 1:], weight)


class Network(nn.Module):
    """A backbone and its head."""

    def __init__(self, size, patch, dim, depth, heads, prototypes, hidden, bottleneck, mask_token):
        super().__init__()
        self.backbone = ViT(size, patch, dim, depth, heads, mask_token=mask_token)
        self.head = Head(dim, prototypes, hidden, bottleneck)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        tokens, attention = self.backbone(images, mask)
        return *self.head(tokens), attention


def high_masks(attention: Tensor, ratios: list[float]) -> Tensor:
    """AttMask-High, image by image: the last block's attention [V, H, T, T] and each view's ratio -> bool [V, N]."""
    rows = attention[:, :, 0, 1:].mean(dim=1)
    masks = []
    for row, ratio in zip(rows, ratios):
        mask = torch.zeros(len(row), dtype=torch.bool, device=row.device)
        count = int(len(row) * ratio)
        if count:
            mask[torch.argsort(row, descending=True)[:count]] = True
        masks.append(mask)
    return torch.stack(masks)


class ReferenceStep:
    """Student, teacher, centers and AdamW; `step` does one step of iBOT with AttMask-High on lists of crops.

    Sizes as `shape`: size (h, w), patch, dim, depth, heads, prototypes, hidden, bottleneck.
    """

    def __init__(
        self, shape: dict, *, student_temp=0.1, center_momentum=0.9, clip=3.0, device="cpu", dtype=torch.float32
    ):
        self.student = Network(**shape, mask_token=True).to(device, dtype)
        self.teacher = Network(**shape, mask_token=False).to(device, dtype)
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        self.center = torch.zeros(1, shape["prototypes"], device=device, dtype=dtype)
        self.patch_center = torch.zeros(1, 1, shape["prototypes"], device=device, dtype=dtype)
        self.student_temp, self.center_momentum, self.clip = student_temp, center_momentum, clip
        decayed = [p for n, p in self.student.named_parameters() if not n.endswith(".bias") and p.ndim > 1]
        rest = [p for n, p in self.student.named_parameters() if n.endswith(".bias") or p.ndim == 1]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, foreach=False, fused=False)

    def load(self, state: dict[str, Tensor]) -> None:
        """Load the weights and centers of a `maskwise` method's state dict (CLS pooling, shared last layer)."""
        for name, network in (("student", self.student), ("teacher", self.teacher)):
            own = {}
            for key, value in state.items():
                if key.startswith(name + "."):
                    key = (
                        key.removeprefix(name + ".")
                        .replace("encoder.backbone.", "backbone.")
                        .replace("encoder.norm.", "backbone.norm.")
                    )
                    own[key] = value
            network.load_state_dict(own)
        self.center.copy_(state["center"][None])
        self.patch_center.copy_(state["patch_center"][None, None])

    def losses(
        self, globals_: list[Tensor], locals_: list[Tensor], ratios: list[float], teacher_temp: float, patch_temp: float
    ):
        """Return the loss of the image term and of the patch term, and the masks; updates the centers."""
        with torch.no_grad():
            teacher_cls, teacher_patch, attention = self.teacher(torch.cat(globals_))
        mask = high_masks(attention, ratios)
        student_cls, student_patch, _ = self.student(torch.cat(globals_), mask)
        if locals_:
            local_cls, _, _ = self.student(torch.cat(locals_))
            student_cls = torch.cat([student_cls, local_cls])

        views, crops = len(globals_), len(globals_) + len(locals_)
        student_cls = (student_cls / self.student_temp).chunk(crops)
        student_patch = (student_patch / self.student_temp).chunk(views)
        probs = F.softmax((teacher_cls - self.center) / teacher_temp, dim=-1).detach().chunk(views)
        patch_probs = F.softmax((teacher_patch - self.patch_center) / patch_temp, dim=-1).detach().chunk(views)
        masks = mask.chunk(views)
        cls_total = patch_total = 0.0
        pairs = 0
        for q in range(views):
            for v in range(crops):
                if v == q:
                    entropies = torch.sum(-patch_probs[q] * F.log_softmax(student_patch[v], dim=-1), dim=-1)
                    hidden = masks[v].to(entropies.dtype)
                    patch_total = (
                        patch_total + ((entropies * hidden).sum(dim=-1) / hidden.sum(dim=-1).clamp(min=1.0)).mean()
                    )
                else:
                    cls_total = cls_total + torch.sum(-probs[q] * F.log_softmax(student_cls[v], dim=-1), dim=-1).mean()
                    pairs += 1
        with torch.no_grad():
            m = self.center_momentum
            self.center = self.center * m + teacher_cls.mean(dim=0, keepdim=True) * (1 - m)
            self.patch_center = self.patch_center * m + teacher_patch.mean(dim=1, keepdim=True).mean(
                dim=0, keepdim=True
            ) * (1 - m)
        return cls_total / pairs, patch_total / views, mask

    def step(
        self, globals_, locals_, ratios, *, teacher_temp, patch_temp, lr, weight_decay, momentum, hold_last_layer=False
    ) -> dict[str, float]:
        """One whole step; returns the losses as numbers."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = lr
            if i == 0:
                group["weight_decay"] = weight_decay
        cls, patch, mask = self.losses(globals_, locals_, ratios, teacher_temp, patch_temp)
        loss = cls + patch
        if not torch.isfinite(loss).item():
            raise FloatingPointError("the loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                factor = self.clip / (parameter.grad.norm(2) + 1e-6)
                if factor.item() < 1:
                    parameter.grad.mul_(factor)
        for name, parameter in self.student.named_parameters():
            if hold_last_layer and "last_layer" in name:
                parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            weights = dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.mul_(momentum).add_((1 - momentum) * weights[name].detach())
        return {
            "loss": loss.item(),
            "cls": cls.item(),
            "patch": patch.item(),
            "mask_share": mask.double().mean().item(),
        }
