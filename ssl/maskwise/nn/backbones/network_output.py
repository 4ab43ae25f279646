"""Output of a whole network: its form, found by a trial on the meta device, and the patches in it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskwise.errors import UserError

Size = tuple[int, int]


class Call(nn.Module):
    """Call a network by one of its methods; timm's maps and tokens come from `forward_features`."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, images: Tensor):
        """Return what the method returns."""
        return getattr(self.model, self.method)(images)


@dataclass(frozen=True)
class OutputForm:
    """Form of a network's output: [B, C, h, w], [B, h, w, C] or [B, P + N, C], with C channels and P prefix tokens."""

    axes: int
    channels_last: bool
    dim: int
    prefix: int = 0

    def grid(self, shape: tuple[int, ...], size: Size) -> Size | None:
        """Return the grid (h, w) of an output of that shape for images of that size; None for another form."""
        if len(shape) != self.axes or shape[-1 if self.channels_last else 1] != self.dim:
            return None
        if self.axes == 3:
            return token_grid(shape[1] - self.prefix, size)
        return tuple(shape[1:3] if self.channels_last else shape[2:4])

    def split(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return patches [B, N, D] and prefix [B, P, D] of an output."""
        if self.axes == 3:
            return output[:, self.prefix :], output[:, : self.prefix]
        patches = output.flatten(1, 2) if self.channels_last else output.flatten(2).transpose(1, 2)
        return patches, patches[:, :0]


def form_of(output, model: nn.Module, name: str, size: Size) -> OutputForm:
    """Return the form of the output for images of that size; raises UserError for one without patches."""
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        prefix = sum(getattr(model, token, None) is not None for token in ("cls_token", "dist_token"))
    if isinstance(output, Tensor) and output.ndim == 4:
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return OutputForm(4, last, output.shape[-1 if last else 1])
    if isinstance(output, Tensor) and output.ndim == 3:
        form = OutputForm(3, True, output.shape[2], prefix)
        if form.grid(tuple(output.shape), size) is not None:
            return form
    what = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise UserError(
        f"{name} returns {what} for images of {size[0]}x{size[1]} pixels; a backbone returns a map [B, C, h, w] or "
        "tokens [B, N, D] of a grid, prefix tokens first (attribute num_prefix_tokens)"
    )


def token_grid(count: int, size: Size) -> Size | None:
    """Return the grid (h, w) of that many square patches over an image, sides rounded; None where there is none."""
    if count < 1:
        return None
    stride = math.sqrt(size[0] * size[1] / count)
    for height in range(max(1, math.ceil(size[0] / stride - 1)), math.floor(size[0] / stride + 1) + 1):
        if count % height == 0 and abs(count // height - size[1] / stride) < 1:
            return height, count // height
    return None


def trial(call: Call, channels: int, size: Size, *, on_meta: bool = True):
    """Return a network's output for two blank images, in eval mode without gradients; raises what the network raises.

    On the meta device nothing is computed; a network that needs values runs where its weights are.
    """
    weight = next(call.parameters())
    device = torch.device("meta") if on_meta else weight.device
    images = torch.zeros(2, channels, *size, dtype=weight.dtype, device=device)
    with torch.no_grad(), mode(call, False):
        return torch.func.functional_call(call, meta_state(call), images) if on_meta else call(images)


def unused_parameters(call: Call, channels: int, size: Size, *, on_meta: bool = True) -> tuple[set[str], set[str]]:
    """Return the parameters that the output does not depend on, and the modules that are not called, by name.

    On the meta device in train mode, else in eval mode. Raises what the network raises.
    """
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in call.model.named_modules()
    ]
    weights = dict(call.named_parameters())
    state = meta_state(call) if on_meta else {name: weight.detach().clone() for name, weight in weights.items()}
    for name in weights:
        state[name].requires_grad_(True)
    weight = next(iter(state.values()))
    images = torch.zeros(2, channels, *size, dtype=weight.dtype, device=weight.device)
    try:
        with torch.enable_grad(), mode(call, on_meta):
            output = torch.func.functional_call(call, state, images)
            gradients = torch.autograd.grad(output.sum(), [state[name] for name in weights], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    unused = {name.removeprefix("model.") for name, gradient in zip(weights, gradients) if gradient is None}
    return unused, {name for name, _ in call.model.named_modules()} - called


def meta_state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name as tensors without storage."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: torch.empty_like(tensor, device="meta", requires_grad=False) for name, tensor in tensors}


@contextlib.contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module into train or eval mode and back; caches that it made in eval mode are dropped."""
    before = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        module.train(True)  # timm's attention drops cached biases here
        for part, was in before.items():
            part.training = was
