"""`Start`: the model that a run continues from, and what of it the run takes up."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from maskwise.export import heads as head_keys
from maskwise.export import layouts, timm_files
from maskwise.export.source import ONLY, Matching, Source
from maskwise.functional.errors import UserError
from maskwise.nn.backbone import Backbone
from maskwise.nn.encoder import Encoder, pooling_row
from maskwise.nn.weights import mismatch

KEY = "method.start_from"
HEADS_SHARE = 0.2  # of the run, the longest head warm-up that is chosen by itself


class Start:
    """A start model: its input statistics, position table, weights and heads.

    `spec` describes its encoder; `source` holds its tensors, None where the run goes on from a checkpoint of its own.
    After `fill`: `matching` tells what became of every key, `head` is "kept" or why it is fresh, `fresh_pooling` whether
    the pooling begins anew.
    """

    def __init__(self, name: str, spec: dict, source: Source | None = None, about: dict | None = None):
        self.name, self.spec, self.source = name, spec, source
        about = about or {}
        self.head, self.fresh_pooling, self.digest = about.get("head", ""), about.get("fresh_pooling", False), about.get("sha256", "")
        self.matching: Matching | None = None
        self.notes: list[str] = []

    @classmethod
    def open(cls, name: str, *, backbone: str, gamma: float | None = 1.25) -> Start:
        """Read a start model: a run or exported folder, a file of any layout, `timm:NAME` or NAME from timm's cache, or hub:OWNER/NAME.

        `backbone` and `gamma` say what a file may not: the timm name of its model, and SimPool's exponent.
        Raises UserError when it is not there or cannot be read.
        """
        path, model = located(name)
        if model is not None:
            source = timm_files.source_of(model, path, name, {})
        elif path.is_dir():
            source = layouts.read(path)
        else:
            source = layouts.read(path, gamma=gamma, name=backbone)
        source.origin = f"{KEY} {name}"
        start = cls(name, source.spec, source)
        start.digest = source.sha256()
        return start

    @classmethod
    def remembered(cls, about: dict) -> Start:
        """The start of a run that goes on from its own checkpoint, as `about` described it."""
        return cls(about["name"], about["spec"], None, about)

    def about(self) -> dict:
        """What run.json keeps: enough to go on, and what was taken."""
        matching = self.matching or Matching({})
        return {
            "name": self.name, "file": "" if self.source is None or self.source.file is None else str(self.source.file), "sha256": self.digest,
            "layout": "" if self.source is None else self.source.layout, "matched": matching.matched, "missing": matching.missing,
            "unused": matching.unused, "head": self.head, "fresh_pooling": self.fresh_pooling, "notes": self.notes, "spec": self.spec,
        }  # fmt: skip

    def image_size(self, asked) -> tuple[int, int]:
        """The size in pixels of the start model's position table, which is kept; raises UserError where another is asked for."""
        own = tuple(self.spec["backbone"]["image_size"])
        if asked is not None and own != ((asked, asked) if isinstance(asked, int) else tuple(asked)):
            raise UserError(
                f"backbone.image_size={asked} and {KEY} has the position table of {own[0]} x {own[1]} pixels, which is kept and resampled as each crop "
                "needs: leave backbone.image_size out"
            )
        return own

    def dress(self, encoder: Encoder) -> Encoder:
        """Give an encoder the start model's input statistics and way of resampling positions."""
        encoder.mean, encoder.std = tuple(self.spec["mean"]), tuple(self.spec["std"])
        position = self.spec["backbone"].get("position", encoder.backbone.position)
        if position != encoder.backbone.position:
            self.notes.append(f"positions are resampled as the start model did (`{position}`, not `{encoder.backbone.position}`)")
            encoder.backbone.position = position
        return encoder

    def check(self, encoder: Encoder) -> None:
        """Raise UserError, with every difference and what to set, unless the start model's network is the encoder's."""
        spec, own, source = self.spec, encoder.backbone, self.source
        if source.layout in ("dino", "ibot", "attmask", "simpool", "dinov2", "dinov3"):
            dim = spec["backbone"].get("embed_dim", own.dim)
            if dim == own.dim and dim % own.num_heads == 0:
                spec["backbone"]["num_heads"] = own.num_heads  # such a file cannot say
        with torch.device("meta"):
            theirs = Backbone(**spec["backbone"])
        facts = {"backbone.embed_dim": "dim", "backbone.depth": "depth", "backbone.num_heads": "num_heads", "backbone.patch_size": "patch_size"}
        differing = {key: (getattr(theirs, name), getattr(own, name)) for key, name in facts.items() if getattr(theirs, name) != getattr(own, name)}
        if differing:
            said = ", ".join(f"{key.partition('.')[2]} {_plain(there)} there and {_plain(here)} here" for key, (there, here) in differing.items())
            name = [f"backbone.name={theirs.name}"] if theirs.name != own.name else []
            remedy = " ".join([*name, *(f"{key}={_plain(there)}" for key, (there, here) in differing.items())])
            raise UserError(f"{source.origin} does not fit the recipe's backbone {own.name}: {said}; set {remedy}")
        if own.has_class_token and not theirs.has_class_token:
            raise UserError(f"{source.origin} has no class token and the recipe's backbone one: set pooling.name=simpool and backbone.class_token=false")
        pooling, mine = spec["pooling"] or {}, pooling_row(encoder.pooling)
        if pooling.get("name") == mine == "simpool":
            asked = encoder.pooling.arguments()
            settings = [(key, pooling.get(key, False), asked[key]) for key in ("num_heads", "beta", "learn_gamma")]
            for key, there, here in (("norm", spec["norm"], encoder.norm_order), *settings):
                if there != here:
                    raise UserError(f"{source.origin} does not fit the recipe's pooling: {key} is {_said(there)} there and {_said(here)} here; set pooling.{key}={_said(there)}")
            for key in ("gamma", "min_scope"):
                there, here = pooling[key], getattr(encoder.pooling, key)
                if there != here:
                    self.notes.append(f"pooling.{key} is {_said(here)} as the recipe says; the start model had {_said(there)}")

    def fill(self, model: torch.nn.Module, head: str = "auto") -> None:
        """Put the start model's weights into a method's student and teacher; where it has one copy only, both begin with it.

        With head="auto" projection heads and centers come along where there are any that fit, with "fresh" they do not.
        Raises UserError where the networks differ, or a head is there and of other shapes.
        """
        source = self.source
        self.check(model.student.encoder)
        matched: dict[str, int] = {}
        missing: list[str] = []
        unused = {name: list(keys) for name, keys in source.unused.items()} | {"classifier": [key for held in source.classifiers.values() for key in held.state]}
        networks = [role for role in ("student", "teacher") if hasattr(model, role)]
        for role in networks:
            state = source.networks[_given(source.networks, role)]
            taken, absent, left = self._adapted(state, getattr(model, role).encoder)
            getattr(model, role).encoder.load_state_dict(taken)
            matched[role] = len(taken) - len(absent)
            missing += [f"{role}.encoder.{key}" for key in absent if role == "student"]
            if left:
                unused.setdefault("not in this network", []).extend(f"{role}.{key}" for key in left)
        self.head = self._heads(model, head)
        if self.head == "kept":
            for role in networks:
                own = getattr(model, role).head
                own.load_state_dict({key: value for key, value in source.heads[_given(source.heads, role)].items() if key in own.state_dict()})
                matched[f"{role} head"] = len(own.state_dict())
            for name, value in source.centers.items():
                center = getattr(model, name, None)
                if center is not None and center.shape == value.shape:
                    center.copy_(value)
                    matched["centers"] = matched.get("centers", 0) + 1
                else:
                    unused.setdefault("centers", []).append(name)
        else:
            missing.append("the projection head")
            unused.setdefault("projection heads", []).extend(f"{role}.head.{key}" for role, state in source.heads.items() for key in state)
            unused.setdefault("centers", []).extend(source.centers)
        self.matching = Matching(matched, missing, {name: keys for name, keys in unused.items() if keys})

    def _adapted(self, state: dict[str, Tensor], encoder: Encoder) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """The state dict to load, what of it is the encoder's own, and what of the start model is left."""
        own, state, left = encoder.state_dict(), dict(state), []
        absent = [key for key in own if key == "backbone.mask_token" and key not in state]
        if "backbone.mask_token" in state and "backbone.mask_token" not in own:
            left.append("backbone.mask_token")
        if not encoder.backbone.has_class_token and "backbone.cls_token" in state:
            left.append("backbone.cls_token")
            table = state.get("backbone.pos_embed")
            if table is not None and table.shape[1] == own["backbone.pos_embed"].shape[1] + 1:
                state["backbone.pos_embed"] = table[:, 1:]
                self._note("the class token and its row of the position table are left out: nothing here reads them")
        if (self.spec["pooling"] or {}).get("name") != pooling_row(encoder.pooling):
            left += [key for key in state if key.startswith("pooling.")]
            absent += [key for key in own if key.startswith("pooling.")]
            self.fresh_pooling = any(key.startswith("pooling.") for key in own)
        state = {key: value for key, value in state.items() if key not in left}
        wrong = mismatch(own.keys() - state.keys() - set(absent), state.keys() - own.keys())
        if wrong:
            raise UserError(f"{self.source.origin} does not fit the recipe's {encoder.backbone.name}: it {wrong}; check backbone.name and the keys of section backbone")
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise UserError(
                    f"{self.source.origin} does not fit the recipe's {encoder.backbone.name}: {key} is {list(value.shape)} there and {list(own[key].shape)} here; "
                    "check the keys of section backbone"
                )
        return {**state, **{key: own[key] for key in absent}}, absent, left

    def _heads(self, model, head: str) -> str:
        """ "kept", or why the heads begin anew; raises UserError for heads of other shapes."""
        source = self.source
        if head == "fresh":
            return "fresh: method.start_head=fresh"
        if source.head is None:
            return f"fresh: {source.headless}"
        there_row, here_row = (self.spec["pooling"] or {}).get("name"), pooling_row(model.student.encoder.pooling)
        if there_row != here_row:
            return f"fresh: the start model's stood on the pooling {there_row}, this one on {here_row}"
        mine = head_keys.arguments(model.student.head.state_dict())
        theirs = dict(source.head)
        if theirs["patch_prototypes"] and not hasattr(model, "lambda2"):
            theirs["patch_prototypes"] = None  # a method without patches has no use for it
        if mine["layers"] == theirs["layers"] == 1:
            theirs["hidden"] = mine["hidden"]
        differing = [key for key in mine if mine[key] != theirs[key]]
        if differing:
            said = ", ".join(f"{key} {_said(theirs[key])} there and {_said(mine[key])} here" for key in differing)
            remedy = " ".join(f"head.{key}={_said(theirs[key])}" for key in differing)
            raise UserError(f"{source.origin} has another projection head than the recipe: {said}; set {remedy} to keep it, or method.start_head=fresh to begin a new one")
        return "kept"

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def warmup_epochs(self, asked: float | None, epochs: float) -> float:
        """Epochs in which only the head moves: as asked, else none for a head that was kept and one (at most a fifth of the run) for a fresh one."""
        if asked is not None:
            return asked
        return 0.0 if self.head == "kept" else min(1.0, HEADS_SHARE * epochs)

    def still(self, names) -> list[str]:
        """Those of a method's parameters that stand still while its head warms up: the student's encoder, a fresh pooling excepted."""
        moving = "student.encoder.pooling." if self.fresh_pooling else "\0"
        return [name for name in names if name.startswith("student.encoder.") and not name.startswith(moving)]

    def told(self) -> list[str]:
        """What to say at the start of the run."""
        copies = " and ".join(role for role in self.source.networks if role != ONLY) or "one copy"
        head = "kept" if self.head == "kept" else self.head
        return [f"{KEY} {self.name} ({self.source.layout}, {copies}): {self.matching.line()}", f"projection head: {head}", *self.notes]


def located(name: str) -> tuple[Path, str | None]:
    """The file or folder that a start model is read from, and its timm name where that is what was given.

    Only hub: names go to the network; raises UserError for what is neither there nor in a cache.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path, None
    if name.startswith(("hub:", "hf-hub:")):
        from maskwise.export import hub

        return hub.fetch(*hub.named("hub:" + name.partition(":")[2])), None
    model = name.removeprefix("timm:")
    import timm

    if timm.is_model(model.partition(".")[0]) and "/" not in model:
        return timm_cached(model), model
    raise UserError(f"{KEY}: {name} does not exist; give a run folder, an exported folder, a weights file, a timm name, or hub:OWNER/NAME")


def timm_cached(model: str) -> Path:
    """timm's pretrained weights of a model in the Hub's or torch's local cache; raises UserError when they are not there."""
    import huggingface_hub
    import timm

    try:
        config = timm.models.get_pretrained_cfg(model)
    except RuntimeError:  # an unknown tag
        config = None
    if config is None or not config.has_weights:
        tags = ", ".join(each for each in timm.list_pretrained(f"{model.partition('.')[0]}.*")[:4])
        raise UserError(f"{KEY}: timm has no pretrained weights of {model}" + (f"; it has {tags}" if tags else ": give a file"))
    repository = config.hf_hub_id
    if repository:
        for file in filter(None, (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")):
            found = huggingface_hub.try_to_load_from_cache(repository, file)
            if isinstance(found, str):
                return Path(found)
    if config.url:
        found = Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]
        if found.is_file():
            return found
    remedy = f"{KEY}=hub:{repository} fetches them" if repository else "give a file"
    raise UserError(f"{KEY}: timm's weights of {model} are not in the local cache and a timm name never goes to the network; {remedy}")


def _given(held: dict, role: str) -> str:
    """Which copy serves a role: its own, else the one there is."""
    return role if role in held else next(iter(held))


def _plain(value) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else f"[{', '.join(map(str, value))}]"
    return str(value)


def _said(value) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, value) if value is None or isinstance(value, bool) else str(value)
