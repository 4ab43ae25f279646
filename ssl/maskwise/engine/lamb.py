"""LAMB: Adam with the step on each tensor scaled to the norm of the tensor, without a host sync."""

import torch
from torch import Tensor

from maskwise.bounds import Rate


class LAMB(torch.optim.Optimizer):
    """LAMB (You et al. 2020) as in timm: r = m / (sqrt(v) + eps) + wd p, p <- p - lr |p| / |r| r.

    All gradients are first scaled to a joint norm of at most `max_grad_norm` (None: not). A group without decay takes
    the step of Adam unless `always_adapt`; `trust_clip` bounds the ratio |p| / |r| by 1. Set `found_inf` (0-dim,
    1.0 = skip) before `step` and nothing moves, without a host sync.
    """

    def __init__(
        self,
        params,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        betas: tuple[Rate, Rate] = (0.9, 0.999),
        eps: float = 1e-6,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
    ):
        super().__init__(
            params,
            dict(
                lr=lr,
                weight_decay=weight_decay,
                betas=tuple(betas),
                eps=eps,
                trust_clip=trust_clip,
                always_adapt=always_adapt,
            ),
        )
        self.max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns the loss of the closure, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not parameters:
            return loss
        norm = torch.stack(torch._foreach_norm([parameter.grad for parameter, _ in parameters])).norm()
        shrink = torch.ones_like(norm) if self.max_grad_norm is None else (norm / self.max_grad_norm).clamp(min=1.0)
        found_inf = getattr(self, "found_inf", None)
        for parameter, group in parameters:
            self._move(parameter, group, parameter.grad / shrink, found_inf)
        return loss

    def _move(self, parameter: Tensor, group: dict, gradient: Tensor, found_inf: Tensor | None) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(
                step=torch.zeros((), device=parameter.device),
                exp_avg=torch.zeros_like(parameter),
                exp_avg_sq=torch.zeros_like(parameter),
            )
        step = state["step"] + 1
        first = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
        second = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        ready = step.to(parameter.dtype)
        update = (
            (first / (1 - beta1**ready))
            .div_((second / (1 - beta2**ready)).sqrt_().add_(group["eps"]))
            .add_(parameter, alpha=group["weight_decay"])
        )
        if group["weight_decay"] or group["always_adapt"]:
            length, own = parameter.norm(), update.norm()
            trust = torch.where((length > 0) & (own > 0), length / own, torch.ones_like(own))
            update.mul_(trust.clamp(max=1.0) if group["trust_clip"] else trust)
        moved = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        target = parameter - group["lr"] * update
        if found_inf is not None:
            skip = found_inf.to(parameter.device) > 0
            moved = {key: torch.where(skip, state[key], value) for key, value in moved.items()}
            target = torch.where(skip, parameter, target)
        for key, value in moved.items():
            state[key].copy_(value)
        parameter.copy_(target)
