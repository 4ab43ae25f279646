"""AttMask step built from timm and, in `LightlyStep`, from lightly: baselines of `maskwise bench step`.

timm's VisionTransformer with fused attention, its optimizer factory and moving average, torch's cross-entropy, the head
on class tokens and masked patches only. `LightlyStep` uses head, losses and moving average of lightly. Losses and masks
equal those of `maskwise.IBOT` with AttMask-High, given the same weights, crops and ratios; lightly computes the patch
center over masked patches only, so its later steps differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwise.compat import ready_torchvision

ready_torchvision()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402


class MaskedViT(VisionTransformer):
    """timm's ViT with a mask token: normalized tokens [B, 1 + N, D]; positions resampled as in DINO."""

    def __init__(self, size: tuple[int, int], patch: int, dim: int, depth: int, heads: int):
        super().__init__(
            img_size=size,
            patch_size=patch,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            global_pool="",
            dynamic_img_size=True,
        )
        self.mask_token = nn.Parameter(torch.zeros(1, dim))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        own = self.patch_embed.grid_size
        if grid == own:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, *own, -1).permute(0, 3, 1, 2)
        factors = [(side + 0.1) / mine for side, mine in zip(grid, own)]
        table = F.interpolate(table, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.patch_embed(images)
        grid = tuple(x.shape[1:3])
        x = x.flatten(1, 2)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(grid)
        return self.norm(self.blocks(x))


class Head(nn.Module):
    """Projection head: rows [M, D] -> logits [M, K]."""

    def __init__(self, dim: int, prototypes: int, hidden: int, bottleneck: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))

    def forward(self, rows: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(rows), dim=-1))


class TimmStep:
    """Student, teacher, centers and AdamW from timm and torch; one step of iBOT with AttMask-High.

    Sizes as `shape`: size (h, w), patch, dim, depth, heads, prototypes, hidden, bottleneck.
    """

    key_names = {
        "last_layer.weight_g": "last_layer.parametrizations.weight.original0",
        "last_layer.weight_v": "last_layer.parametrizations.weight.original1",
    }

    def __init__(
        self, shape: dict, *, student_temp=0.1, center_momentum=0.9, clip=3.0, device="cpu", dtype=torch.float32
    ):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.student_temp, self.center_momentum, self.clip = student_temp, center_momentum, clip
        self.student = self.network()
        self.teacher = self.first_teacher().requires_grad_(False)
        self.teacher["backbone"].blocks[-1].attn.qkv.register_forward_hook(self.store_attention)
        self.optimizer = create_optimizer_v2(self.student, opt="adamw", lr=1e-3, weight_decay=0.04)
        self.make_losses()

    def network(self) -> nn.Module:
        sizes = {name: self.shape[name] for name in ("size", "patch", "dim", "depth", "heads")}
        parts = {
            "backbone": MaskedViT(**sizes),
            "head": self.head(*(self.shape[name] for name in ("dim", "prototypes", "hidden", "bottleneck"))),
        }
        return nn.ModuleDict(parts).to(self.device, self.dtype)

    def head(self, dim: int, prototypes: int, hidden: int, bottleneck: int) -> nn.Module:
        return Head(dim, prototypes, hidden, bottleneck)

    def first_teacher(self) -> nn.Module:
        self.average = ModelEmaV3(self.student)
        return self.average.module

    def follow(self, momentum: float) -> None:
        self.average.decay = momentum
        self.average.update(self.student)

    def make_losses(self) -> None:
        self.center, self.patch_center = torch.zeros(
            2, self.shape["prototypes"], device=self.device, dtype=self.dtype
        ).unbind()

    def centers(self) -> tuple[Tensor, Tensor]:
        return self.center, self.patch_center

    def load(self, state: dict[str, Tensor]) -> None:
        """Load the weights and centers of a `maskwise` method's state dict (CLS pooling, shared last layer)."""
        for name, network in (("student", self.student), ("teacher", self.teacher)):
            own = {"backbone.mask_token": state["student.encoder.backbone.mask_token"]}
            for key, value in state.items():
                if key.startswith(name + "."):
                    key = (
                        key.removeprefix(name + ".")
                        .replace("encoder.backbone.", "backbone.")
                        .replace("encoder.norm.", "backbone.norm.")
                    )
                    for ours, theirs in self.key_names.items():
                        key = key.replace(ours, theirs)
                    own[key] = value
            network.load_state_dict(own)
        for center, name in zip(self.centers(), ("center", "patch_center")):
            center.copy_(state[name].view_as(center))

    def store_attention(self, module: nn.Module, args: tuple, qkv: Tensor) -> None:
        """Store the attention of the class token to patches, mean over heads, of the last block's qkv [B, T, 3 D]."""
        q, k, _ = qkv.unflatten(-1, (3, self.shape["heads"], -1)).unbind(2)
        logits = torch.einsum("bhd,bthd->bht", q[:, 0], k) * q.shape[-1] ** -0.5
        self.row = logits.softmax(dim=-1)[..., 1:].mean(dim=1)

    def masks(self, ratios: list[float]) -> Tensor:
        """AttMask-High for all views at once -> bool [V, N]."""
        counts = torch.tensor([int(self.row.shape[1] * ratio) for ratio in ratios]).to(self.row.device)
        return self.row.argsort(dim=1, descending=True).argsort(dim=1) < counts[:, None]

    def losses(
        self, globals_: list[Tensor], locals_: list[Tensor], ratios: list[float], teacher_temp: float, patch_temp: float
    ):
        """Return the loss of the image term and of the patch term, and the masks; updates the centers."""
        images = torch.cat(globals_)
        self.grid = tuple(side // self.shape["patch"] for side in images.shape[-2:])
        with torch.no_grad():
            targets = self.teacher["backbone"](images)
            mask = self.masks(ratios)
            teacher_cls, teacher_patch = self.teacher_logits(targets, mask)
        tokens = self.student["backbone"](images, mask)
        rows = [tokens[:, 0], tokens[:, 1:][mask]]
        if locals_:
            rows.insert(1, self.student["backbone"](torch.cat(locals_))[:, 0])
        hidden = len(rows[-1])
        logits = self.student["head"](torch.cat(rows))
        student_cls, student_patch = logits.split([len(logits) - hidden, hidden])
        views, crops = len(globals_), len(globals_) + len(locals_)
        cls, patch = self.compare(
            teacher_cls.chunk(views),
            student_cls.chunk(crops),
            teacher_patch,
            student_patch,
            mask,
            teacher_temp,
            patch_temp,
        )
        return cls, patch, mask

    def teacher_logits(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of class tokens [V, K] and of all patches [V, N, K], of which iBOT's patch center is the mean."""
        logits = self.teacher["head"](tokens)
        return logits[:, 0], logits[:, 1:]

    def compare(
        self, teacher_cls, student_cls, teacher_patch, student_patch, mask, teacher_temp, patch_temp
    ) -> tuple[Tensor, Tensor]:
        """Image term of lists of views, patch term of the masked patches."""
        targets = [((view - self.center) / teacher_temp).softmax(dim=-1) for view in teacher_cls]
        pairs = [(target, view) for q, target in enumerate(targets) for v, view in enumerate(student_cls) if v != q]
        cls = torch.stack([F.cross_entropy(view / self.student_temp, target) for target, view in pairs]).mean()
        patch_probs = ((teacher_patch[mask] - self.patch_center) / patch_temp).softmax(dim=-1)
        entropies = F.cross_entropy(student_patch / self.student_temp, patch_probs, reduction="none")
        weights = (1.0 / mask.sum(dim=1, keepdim=True, dtype=entropies.dtype).clamp(min=1)).expand_as(mask)[mask]
        self.center.lerp_(torch.cat(teacher_cls).mean(dim=0), 1 - self.center_momentum)
        self.patch_center.lerp_(teacher_patch.mean(dim=(0, 1)), 1 - self.center_momentum)
        return cls, (entropies * weights).sum() / len(mask)

    def step(
        self, globals_, locals_, ratios, *, teacher_temp, patch_temp, lr, weight_decay, momentum, hold_last_layer=False
    ) -> dict[str, Tensor]:
        """One whole step; returns the losses, left on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if group["weight_decay"]:
                group["weight_decay"] = weight_decay
        cls, patch, mask = self.losses(globals_, locals_, ratios, teacher_temp, patch_temp)
        loss = cls + patch
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_(parameter, self.clip)
        if hold_last_layer:
            for parameter in self.student["head"].last_layer.parameters():
                parameter.grad = None
        self.optimizer.step()
        self.follow(momentum)
        return {"loss": loss.detach(), "cls": cls.detach(), "patch": patch.detach(), "mask_share": mask.double().mean()}


class LightlyStep(TimmStep):
    """The step with head, losses and moving average of lightly; the patch center is over masked patches only."""

    key_names = {"head.mlp.": "head.layers."}

    def head(self, dim: int, prototypes: int, hidden: int, bottleneck: int) -> nn.Module:
        from lightly.models.modules.heads import DINOProjectionHead

        return DINOProjectionHead(dim, hidden, bottleneck, prototypes, norm_last_layer=False)

    def first_teacher(self) -> nn.Module:
        return self.network().eval()

    def follow(self, momentum: float) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, momentum)

    def make_losses(self) -> None:
        from lightly.loss import DINOLoss, IBOTPatchLoss

        known = {"student_temp": self.student_temp, "center_momentum": self.center_momentum}
        self.cls_loss = DINOLoss(self.shape["prototypes"], **known).to(self.device, self.dtype)
        self.patch_loss = IBOTPatchLoss(self.shape["prototypes"], **known).to(self.device, self.dtype)

    def centers(self) -> tuple[Tensor, Tensor]:
        return self.cls_loss.center, self.patch_loss.center.center

    def teacher_logits(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of class tokens [V, K] and of the masked patches [M, K]."""
        logits = self.teacher["head"](torch.cat([tokens[:, 0], tokens[:, 1:][mask]]))
        return logits[: len(tokens)], logits[len(tokens) :]

    def compare(
        self, teacher_cls, student_cls, teacher_patch, student_patch, mask, teacher_temp, patch_temp
    ) -> tuple[Tensor, Tensor]:
        cls = self.cls_loss(list(teacher_cls), list(student_cls), teacher_temp=teacher_temp)
        if not len(student_patch):  # lightly's center would become the mean of nothing
            return cls, student_patch.sum()
        grid_mask = mask.unflatten(1, self.grid)
        return cls, self.patch_loss(teacher_patch, student_patch, grid_mask, teacher_temp=patch_temp)
