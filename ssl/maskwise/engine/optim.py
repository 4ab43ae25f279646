"""Optimizers, parameter groups, clipping and the moving average, without host syncs."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from maskwise.bounds import Rate
from maskwise.engine.lamb import LAMB
from maskwise.errors import UserError
from maskwise.functional import ema

FUSED_DEVICES = {"cpu", "cuda", "xpu", "mps"}


class SGD(torch.optim.Optimizer):
    """SGD with momentum, mu <- momentum mu + d, p <- p - lr mu; with `nesterov` p <- p - lr (momentum mu + d).

    Unlike in torch's, mu starts at zero, so that it is defined after a first step that is skipped. Set `found_inf`
    (0-dim, 1.0 = skip) before `step` and neither weights nor mu move, without a host sync.
    """

    def __init__(
        self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: Rate = 0.9, nesterov: bool = False
    ):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov))

    def direction(self, parameter: Tensor, group: dict) -> Tensor:
        """Return the term added to the momentum buffer, shaped like the parameter."""
        return parameter.grad.add(parameter, alpha=group["weight_decay"])

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns the loss of the closure, if there is one."""
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
    """SGD with layer-wise rescaled steps, as in DINO (LARS, You et al. 2017).

    The step of a tensor p is trust * |p| / |d| * d with d = g + wd p.

    1-D tensors take the plain gradient: no decay, no rescaling. The key of the buffer is `mu`. If tensors are sharded
    over ranks, `shard_sum` adds up the squared norms of their parts, one per tensor.
    """

    def __init__(
        self,
        params,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: Rate = 0.9,
        trust: float = 0.001,
        shard_sum: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(params, lr, weight_decay, momentum)
        self.shard_sum = shard_sum
        for group in self.param_groups:
            group.setdefault("trust", trust)

    def direction(self, parameter: Tensor, group: dict) -> Tensor:
        """Return the rescaled direction, shaped like the parameter."""
        if parameter.ndim == 1:
            return parameter.grad
        direction = super().direction(parameter, group)
        weight_norm, direction_norm = _norms([parameter, direction], self.shard_sum).unbind()
        scale = group["trust"] * weight_norm / direction_norm
        defined = (weight_norm > 0) & (direction_norm > 0)
        return direction * torch.where(defined, scale, torch.ones_like(scale))


def adamw(
    params, lr: float = 0.0, weight_decay: float = 0.0, betas: tuple[Rate, Rate] = (0.9, 0.999), eps: float = 1e-8
):
    """Return torch's AdamW, fused if all parameters' devices have the fused kernel: only that supports `found_inf`."""
    groups = [dict(group) for group in params]
    tensors = [tensor for group in groups for tensor in group["params"]]
    fused = all(tensor.device.type in FUSED_DEVICES and tensor.is_floating_point() for tensor in tensors)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=(betas[0], betas[1]), eps=eps, fused=fused)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw, "sgd": SGD, "lars": LARS, "lamb": LAMB}


def make_optimizer(
    name: str, groups: list[dict], *, shard_sum: Callable[[Tensor], Tensor] | None = None, **options
) -> torch.optim.Optimizer:
    """Return the optimizer of that name over `parameter_groups`; its lr starts at 0 and is set at every step.

    `shard_sum` sums squared norms over ranks if parameters are sharded. Raises UserError for a name outside OPTIMIZERS.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer.name={name!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
    if name == "lars":
        options["shard_sum"] = shard_sum
    return OPTIMIZERS[name](groups, **options)


def parameter_groups(module: nn.Module) -> list[dict]:
    """Return two groups of trainable parameters: with weight decay, and without (1-D tensors and biases).

    Tokens, position tables and weight-norm gains [K, 1] are decayed, as in DINO and iBOT, unless the module lists the
    last part of their names in `no_weight_decay_names`. A group holds "params", "names" and "weight_decay_on".
    Parameters with a factor other than 1 in the `lr_factors` of a submodule follow in groups with "lr_factor".
    Raises UserError if nothing is trainable.
    """
    groups: dict[tuple[bool, float], dict] = {(decays, 1.0): _group(decays, 1.0) for decays in (True, False)}
    undecayed = getattr(module, "no_weight_decay_names", ())
    factors = {
        f"{path}.{name}".lstrip("."): factor
        for path, part in module.named_modules()
        for name, factor in getattr(part, "lr_factors", {}).items()
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = not (name.endswith(".bias") or parameter.ndim == 1 or name.rpartition(".")[2] in undecayed)
        factor = factors.get(name, 1.0)
        group = groups.setdefault((decays, factor), _group(decays, factor))
        group["params"].append(parameter)
        group["names"].append(name)
    if not any(group["params"] for group in groups.values()):
        raise UserError("nothing can be trained: every parameter of the model is frozen; unfreeze at least one")
    return list(groups.values())


def _group(decays: bool, factor: float) -> dict:
    group = {"params": [], "names": [], "weight_decay_on": decays}
    if not decays:
        group["weight_decay"] = 0.0
    if factor != 1:
        group["lr_factor"] = factor
    return group


def check_groups(module: nn.Module, groups: list[dict]) -> None:
    """Raise UserError if a trainable parameter of `module` is not in exactly one group."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    wrong = [name for name, p in module.named_parameters() if p.requires_grad and grouped.count(id(p)) != 1]
    if wrong:
        raise UserError(
            f"{len(wrong)} trainable parameters are not in exactly one optimizer group, the first is {wrong[0]}: "
            "build the groups with parameter_groups(module) after the last change to the module"
        )


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def gradient_norms(parameters: Iterable[Tensor], shard_sum: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the norm of every gradient, [n]; `shard_sum` sums squares [n] over ranks if tensors are sharded."""
    gradients = _gradients(parameters)
    return _norms(gradients, shard_sum) if gradients else torch.zeros(0)


def _norms(tensors: list[Tensor], shard_sum: Callable[[Tensor], Tensor] | None) -> Tensor:
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms if shard_sum is None else shard_sum(norms.double().square()).sqrt().to(norms.dtype)


def clip_per_tensor_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale each gradient by min(1, max_norm / (|g| + 1e-6)), as DINO does; returns the norms before, [n]."""
    parameters = list(parameters)
    norms = gradient_norms(parameters)
    scale_grads_(parameters, norms, max_norm)
    return norms


def clip_global_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients by one factor to a joint norm of at most `max_norm`; returns that norm before, 0-dim."""
    parameters = list(parameters)
    norm = gradient_norms(parameters).norm()
    scale_grads_(parameters, norm, max_norm)
    return norm


@torch.no_grad()
def scale_grads_(parameters: Iterable[Tensor], norms: Tensor, max_norm: float) -> None:
    """Multiply gradients by min(1, max_norm / (norm + 1e-6)), in place; `norms` is one per gradient, or one for all."""
    gradients = _gradients(parameters)
    if not gradients:
        return
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()) if factors.ndim else factors)


def ema_(teacher, student, momentum: float, ok: Tensor | None = None) -> None:
    """Move the teacher's parameters, teacher <- momentum teacher + (1 - momentum) student, matched by name.

    Both are modules, whose buffers are left alone, or mappings or lists of tensors; see `functional.ema.ema_`.
    """
    ema.ema_(_by_name(teacher), _by_name(student), momentum, ok)


def _by_name(weights) -> Mapping:
    if isinstance(weights, nn.Module):
        return dict(weights.named_parameters())
    return weights if isinstance(weights, Mapping) else dict(enumerate(weights))
