"""Networks that run as a whole: any timm model by its `forward_features`, and modules of one's own."""

from __future__ import annotations

import re

from timm.layers import LayerNorm
from torch import Tensor, nn

from maskwise.errors import UserError
from maskwise.nn.backbones.base import BackboneBase, BackboneOptions, no_mask_error, size_text
from maskwise.nn.backbones.external import is_external
from maskwise.nn.backbones.families.convnext import TOKEN_NORMS, token_norm
from maskwise.nn.backbones.families.generic import CLASS_TOKEN_PARTS, GenericFamily, generic_family
from maskwise.nn.backbones.feature_maps import redraw_outliers_
from maskwise.nn.backbones.network_output import Call, OutputForm, form_of, trial, unused_parameters
from maskwise.nn.backbones.pretrained import load_generic
from maskwise.nn.tokens import Tokens

DROP_RATES = ("p", "prob", "drop_prob", "drop")  # of torch's and timm's layers
HEAD_NORMS = ("head.norm", "fc_norm")  # of timm's heads, applied to the pooled vector


class GenericBackbone(BackboneBase):
    """A network of any structure: images -> its last map, or its tokens, as Tokens.

    Tokens are those that the network returns, after its own final norm; where timm's head holds that norm, it is
    `norm`. There are no masks, drop path, attention, keys or blocks; the only stage is the last map. What timm's
    `forward_features` does not use (heads) is removed, under the names in `head_tensors`. All dropout is off, since it
    draws from the global generator. Image sizes are those that the network accepts, each tried once.
    """

    method = "forward_features"

    def _adopt(self, model: nn.Module, options: BackboneOptions) -> None:
        if is_external(self.name):
            self.method = "forward"
        if options.drop_path:
            raise UserError(
                f"backbone.drop_path={options.drop_path} cannot be set: the drop paths of {self.name} draw from the "
                "global generator; leave it out"
            )
        if self.position != "offset":
            raise UserError(f"backbone.position={self.position} cannot be set: {self.name} resamples its own positions")
        self.model = model
        if options.pretrained is None:
            redraw_outliers_(model)
        else:
            load_generic(model, self.family, options.pretrained)
        native = options.image_size
        if native is None:
            native = (getattr(model, "default_cfg", {}).get("input_size") or (3, 224, 224))[1:]
        self.image_size = (native, native) if isinstance(native, int) else tuple(native)
        self.channels = 3 if options.mean is None else len(options.mean)
        if next(model.parameters(), None) is None:
            raise UserError(f"{self.name} has no weights to train")
        self.cls_token, self.depth, self.requested_patch_size = None, 1, options.patch_size
        self._grids: dict[tuple[int, int], tuple[int, int] | str] = {}
        self._prepare(options)

    def _prepare(self, options: BackboneOptions) -> None:
        """Find the form of the output, stop dropout, and remove what the output does not depend on."""
        self._stop_dropout()
        output = self._try(self.image_size)
        if isinstance(output, str):
            raise UserError(f"{self.name} does not run on images of {size_text(self.image_size)} pixels: {output}")
        self.form: OutputForm = form_of(output, self.model, self.name, self.image_size)
        self.dim, self.stage_dims = self.form.dim, (self.form.dim,)
        self.num_prefix = self.form.prefix
        has_token = getattr(self.model, "cls_token", None) is not None or is_external(self.name)
        self.has_class_token = self.num_prefix > 0 and has_token
        if options.class_token and not self.has_class_token:
            raise UserError(f"backbone.class_token=True cannot be set: {self.name} has no class token")
        self._remove_heads()
        if options.class_token is False:  # nothing reads it: what only it reads gets no gradient
            for name, parameter in self.model.named_parameters():
                if self.kind in CLASS_TOKEN_PARTS and re.match(CLASS_TOKEN_PARTS[self.kind], name):
                    parameter.requires_grad_(False)
        self.check_size(self.image_size)
        grid = self.grid_for(self.image_size)
        self.patch_size = tuple(max(1, round(side / count)) for side, count in zip(self.image_size, grid))

    def _stop_dropout(self) -> None:
        """Set the rates of dropout and drop path to 0; raises UserError for a network of one's own that has any."""
        for module in self.model.modules():
            kind = type(module).__name__
            rates = [rate for rate in DROP_RATES if isinstance(getattr(module, rate, None), float)]
            for rate in rates if "drop" in kind.lower() else ():
                if is_external(self.name) and getattr(module, rate):
                    raise UserError(
                        f"{self.name} holds a {kind} of {getattr(module, rate):g}, which draws from the global "
                        "generator: build it with 0"
                    )
                setattr(module, rate, 0.0)

    def _remove_heads(self) -> None:
        model, norm, self.norm_place = self.model, nn.Identity(), "norm"
        unused, silent = self._unused()
        own_code = is_external(self.name)
        for place in () if own_code else HEAD_NORMS:
            part = submodule(model, place)
            if part is not None and f"{place}.weight" in unused and part.weight.shape == (self.dim,):
                found = channel_norm(part)
                norm, self.norm_place = (norm, self.norm_place) if found is None else (found, place)
        tensors = model.state_dict().keys()
        for name, module in [] if own_code else list(model.named_modules()):
            own = {f"{name}.{key}" for key, _ in module.named_parameters()}
            if name and own and own <= unused and name in silent and submodule(model, name) is module:
                model.set_submodule(name, nn.Identity())
        self.norm = norm
        gone = tensors - model.state_dict().keys()
        self.head_tensors = tuple(sorted(key for key in gone if not key.startswith(f"{self.norm_place}.")))
        for name, parameter in model.named_parameters():
            if name in unused:
                parameter.requires_grad_(False)

    def _unused(self) -> tuple[set[str], set[str]]:
        call, reason = Call(self.model, self.method), ""
        is_meta = next(self.model.parameters()).is_meta
        for on_meta in (True,) if is_meta else (True, False):
            try:
                return unused_parameters(call, self.channels, self.image_size, on_meta=on_meta)
            except Exception as error:  # a network may raise anything
                reason = first_line(error)
        raise UserError(f"{self.name} does not run backwards: {reason}")

    @property
    def family(self) -> GenericFamily:
        """Adapter of the network's class."""
        return generic_family(type(self.model), is_external(self.name))

    def _sizes(self) -> dict:
        return {"image_size": list(self.image_size), "patch_size": self.requested_patch_size}

    def _try(self, size: tuple[int, int]) -> Tensor | str:
        """Return the network's output for blank images of a size, or the first line of its refusal."""
        call, reason = Call(self.model, self.method), ""
        is_meta = next(self.model.parameters()).is_meta
        for on_meta in (True,) if is_meta else (True, False):
            try:
                return trial(call, self.channels, size, on_meta=on_meta)
            except Exception as error:  # a network may raise anything
                reason = first_line(error)
        return reason

    def _grid(self, size: tuple[int, int]) -> tuple[int, int] | str:
        if size not in self._grids:
            output = self._try(size)
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            grid = self.form.grid(shape, size)
            self._grids[size] = grid or (output if isinstance(output, str) else f"its output is {list(shape)}")
        return self._grids[size]

    def grid_for(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return the grid (h, w) for an image size in pixels; raises UserError as `check_size`."""
        self.check_size(image_hw)
        return self._grid(tuple(image_hw))

    def check_size(self, image_hw: tuple[int, int]) -> None:
        """Raise UserError for a size that the network does not take."""
        grid = self._grid(tuple(image_hw))
        if isinstance(grid, str):
            raise UserError(
                f"images of {size_text(image_hw)} pixels do not fit {self.name}, built for "
                f"{size_text(self.image_size)} ({grid}): resize them, set backbone.image_size, use no local crops "
                "(crops.local_number=0), or choose another network"
            )

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        attention: bool = False,
        keys: bool = False,
        layers: tuple[int, ...] = (),
        drop_key: Tensor | None = None,
        patches: bool = True,
    ) -> Tokens:
        """Float images [B, C, H, W] -> Tokens; each of `layers` is the last map [B, C, h, w].

        See BackboneBase.forward; `attention`, `keys`, `drop_key` and `patches` have no effect. Raises UserError for a
        mask.
        """
        if mask is not None:
            raise no_mask_error(self.name)
        grid = self.grid_for(tuple(images.shape[-2:]))
        patches, prefix = self.form.split(getattr(self.model, self.method)(images))
        stages = (patches.transpose(1, 2).unflatten(2, grid),) * len(layers) if layers else None
        return Tokens(patches, prefix, grid, None, None, stages)


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return a module by its dotted name; None where there is none."""
    for part in name.split("."):
        model = getattr(model, part, None)
        if not isinstance(model, nn.Module):
            return None
    return model


def channel_norm(norm: nn.Module) -> nn.Module | None:
    """Return a head's norm of the pooled vector as one over the last axis, with its parameters; None for others."""
    if type(norm) in TOKEN_NORMS:
        return token_norm(norm)
    if isinstance(norm, nn.GroupNorm) and norm.num_groups == 1:  # of one vector, the norm over its channels
        converted = nn.LayerNorm(norm.num_channels, eps=norm.eps)
        converted.weight, converted.bias = norm.weight, norm.bias
        return converted
    return norm if type(norm) in (nn.LayerNorm, LayerNorm) else None


def first_line(error: Exception) -> str:
    """Return an error's first line, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
