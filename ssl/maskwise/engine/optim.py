"""Optimizers, parameter groups, clipping and the moving average, none of which ever waits for the device."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from maskwise.engine.lamb import LAMB
from maskwise.functional import average
from maskwise.functional.errors import UserError

FUSED_DEVICES = {"cpu", "cuda", "xpu", "mps"}


class SGD(torch.optim.Optimizer):
    """Heavy-ball gradient descent, mu <- momentum mu + d, p <- p - lr mu (attmask.md 1.10), or with `nesterov` p <- p - lr (momentum mu + d).

    Unlike torch's own it starts mu at zero, so a first step that is skipped leaves it defined; set `found_inf`
    (0-dim, 1.0 = skip) before `step` and neither weights nor mu move, without a read by the host.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, nesterov: bool = False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov))

    def direction(self, parameter: Tensor, group: dict) -> Tensor:
        """Return what is added to the momentum buffer, shaped like the parameter."""
        return parameter.grad.add(parameter, alpha=group["weight_decay"])

    @torch.no_grad()
    def step(self, closure=None):
        """Move every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(parameter)
                mu = state["mu"]
                direction = self.direction(parameter, group)
                moved = mu * group["momentum"] + direction
                way = moved * group["momentum"] + direction if group.get("nesterov") else moved
                if found_inf is None:
                    mu.copy_(moved)
                    parameter.sub_(way * group["lr"])
                else:
                    skip = found_inf.to(mu.device) > 0
                    mu.copy_(torch.where(skip, mu, moved))
                    parameter.copy_(torch.where(skip, parameter, parameter - way * group["lr"]))
        return loss


class LARS(SGD):
    """SGD whose step on each tensor but the 1-D ones is trust * |p| / |d| long, d = g + wd p (attmask.md 1.10).

    1-D tensors take the plain gradient: no decay, no rescaling. The buffer's key is `mu`. Where tensors are split over ranks,
    `total` adds up the squares of their parts' norms, once a tensor.
    """

    total: Callable[[Tensor], Tensor] | None = None

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, lr, weight_decay, momentum)
        for group in self.param_groups:
            group.setdefault("trust", trust)

    def direction(self, parameter: Tensor, group: dict) -> Tensor:
        """Return the rescaled direction, shaped like the parameter."""
        if parameter.ndim == 1:
            return parameter.grad
        direction = super().direction(parameter, group)
        weight_norm, direction_norm = _norms([parameter, direction], self.total).unbind()
        scale = group["trust"] * weight_norm / direction_norm
        defined = (weight_norm > 0) & (direction_norm > 0)
        return direction * torch.where(defined, scale, torch.ones_like(scale))


def adamw(params, lr: float = 0.0, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
    """Return torch's AdamW, fused wherever every parameter's device has the fused kernel (it alone heeds `found_inf`)."""
    groups = [dict(group) for group in params]
    tensors = [tensor for group in groups for tensor in group["params"]]
    fused = all(tensor.device.type in FUSED_DEVICES and tensor.is_floating_point() for tensor in tensors)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=tuple(betas), eps=eps, fused=fused)


OPTIMIZERS = {"adamw": adamw, "sgd": SGD, "lars": LARS, "lamb": LAMB}


def make_optimizer(name: str, groups: list[dict], **options) -> torch.optim.Optimizer:
    """Return the optimizer of that name over `parameter_groups`; lr starts at 0 and is set at every step by the loop.

    Raises UserError for a name outside OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer.name={name!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](groups, **options)


def parameter_groups(module: nn.Module) -> list[dict]:
    """Return two groups of `module`'s trainable parameters: decayed, then not (1-D tensors and names ending in `.bias`).

    Tokens, position tables and weight-norm gains of shape [K, 1] are decayed, as in the references (attmask.md 1.9), unless the
    module names them in `undecayed` by the last part of their names. Each group holds "params", "names" and "weight_decay_on". A part of the
    module may hold `lr_factors`, a table of its own parameters' names: those of a factor other than 1 follow in groups with "lr_factor".
    Raises UserError if nothing is trainable.
    """
    groups: dict[tuple[bool, float], dict] = {(decays, 1.0): _group(decays, 1.0) for decays in (True, False)}
    spared = getattr(module, "undecayed", ())
    factors = {f"{path}.{name}".lstrip("."): factor for path, part in module.named_modules() for name, factor in getattr(part, "lr_factors", {}).items()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            kind = not (name.endswith(".bias") or parameter.ndim == 1 or name.rpartition(".")[2] in spared), factors.get(name, 1.0)
            group = groups.setdefault(kind, _group(*kind))
            group["params"].append(parameter)
            group["names"].append(name)
    if not any(group["params"] for group in groups.values()):
        raise UserError("nothing can be trained: every parameter of the model is frozen; unfreeze at least one")
    return list(groups.values())


def _group(decays: bool, factor: float) -> dict:
    group = {"params": [], "names": [], "weight_decay_on": decays}
    return {**group, **({} if decays else {"weight_decay": 0.0}), **({} if factor == 1 else {"lr_factor": factor})}


def check_groups(module: nn.Module, groups: list[dict]) -> None:
    """Raise UserError naming the trainable parameters of `module` that no group, or more than one, holds."""
    held = [id(parameter) for group in groups for parameter in group["params"]]
    wrong = [name for name, p in module.named_parameters() if p.requires_grad and held.count(id(p)) != 1]
    if wrong:
        raise UserError(
            f"{len(wrong)} trainable parameters are not in exactly one optimizer group, the first is {wrong[0]}: "
            "build the groups with parameter_groups(module) after the last change to the module"
        )


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def gradient_norms(parameters: Iterable[Tensor], total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The norm of each gradient that is there, [n]; `total` adds up squares [n] over the ranks where each holds a part of every tensor."""
    gradients = _gradients(parameters)
    return _norms(gradients, total) if gradients else torch.zeros(0)


def _norms(tensors: list[Tensor], total: Callable[[Tensor], Tensor] | None) -> Tensor:
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms if total is None else total(norms.double().square()).sqrt().to(norms.dtype)


def clip_per_tensor_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Shrink each gradient on its own to at most `max_norm`, factor max_norm / (|g| + 1e-6) (attmask.md 1.8).

    Returns the norms before clipping, [n], one for each parameter that has a gradient.
    """
    parameters = list(parameters)
    norms = gradient_norms(parameters)
    shrink_(parameters, norms, max_norm)
    return norms


def clip_global_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Shrink all gradients by one factor so that their joint norm is at most `max_norm`; returns that norm before, 0-dim."""
    parameters = list(parameters)
    norm = gradient_norms(parameters).norm()
    shrink_(parameters, norm, max_norm)
    return norm


@torch.no_grad()
def shrink_(parameters: Iterable[Tensor], norms: Tensor, max_norm: float) -> None:
    """Multiply gradients in place by min(1, max_norm / (norm + 1e-6)); `norms` has one for each, or one for all (0-dim)."""
    gradients = _gradients(parameters)
    if not gradients:
        return
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()) if factors.ndim else factors)


def ema_(teacher, student, momentum: float, ok: Tensor | None = None) -> None:
    """Move the teacher's parameters, teacher <- momentum teacher + (1 - momentum) student, matched by name.

    Both are modules, whose buffers are left alone, or mappings or lists of tensors; see `functional.average.ema_`.
    """
    average.ema_(_by_name(teacher), _by_name(student), momentum, ok)


def _by_name(weights) -> Mapping:
    if isinstance(weights, nn.Module):
        return dict(weights.named_parameters())
    return weights if isinstance(weights, Mapping) else dict(enumerate(weights))
