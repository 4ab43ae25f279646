"""Test every shipped recipe: header, keys, two steps in miniature."""

import inspect
import re

import pytest
import torch

from maskwise import build
from maskwise.data import loader
from maskwise.recipe.reading import SHIPPED, read_recipe
from maskwise.recipe.schema import tables
from maskwise.recipe.yaml_text import header
from support.miniature import IMAGES, RECIPES, SIZES, miniature, resolved


@pytest.mark.parametrize("name", RECIPES)
def test_header_has_command_cost_and_result(name):
    text = (SHIPPED / f"{name}.yaml").read_text()
    head = header(text)
    assert head.title.endswith(".") and head.cost and head.result
    assert f" {name} " in head.command or "launch/" in head.command
    if name.partition("/")[0] not in ("debug", "pretrain") and not head.raw:
        assert head.cost.startswith("not yet measured") and head.result.startswith("not yet measured; ")
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_text_reads_back_equal(name, tmp_path):
    first = resolved(name)
    (tmp_path / "recipe.yaml").write_text(first.resolved_yaml())
    again = read_recipe(tmp_path, try_model=False)
    assert again == first and again.values == first.values and again.hash() == first.hash() and first.diff(again) == []
    assert {"seed", "data.name", "train.epochs", "augment.size" if first.learns_labels else "masking.name"} <= set(
        first.values
    )


@pytest.mark.parametrize("name", RECIPES)
def test_keys_of_a_section_are_arguments_of_its_class(name):
    recipe = resolved(name)
    for section, table in tables().items():
        part = getattr(recipe, section)
        row = table[part.name]
        makers = [row] if inspect.isfunction(row) else [cls.__init__ for cls in row.__mro__]
        accepted = {key for maker in makers for key in inspect.signature(maker).parameters}
        assert set(part.keywords()) <= accepted, section


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_of_a_paper_lists_only_differences_from_its_parent(name):
    """Values of the parent are repeated only in sections whose name changes."""
    text = (SHIPPED / f"{name}.yaml").read_text()
    parent = re.search(r"^extends: (\S+)$", text, re.M)
    if parent is None or name.startswith("pretrain/"):
        return
    path = (SHIPPED / name).parent / parent.group(1)
    above = resolved(path.resolve().relative_to(SHIPPED.resolve()).with_suffix("").as_posix())
    mine = resolved(name)
    written = [key for key, origin in mine.origins.items() if origin.startswith(f"configs/{name}.yaml:")]
    renamed = {
        section
        for section in ("masking", "pooling", "classifier", "optimizer")
        if getattr(mine, section).name != getattr(above, section).name
    }
    repeated = [
        key for key in written if above.values.get(key) == mine.values[key] and key.partition(".")[0] not in renamed
    ]
    assert not [key for key in repeated if key not in ("teacher.warmup_temp", "masking.prob", "train.epochs")], repeated


def test_miniature_changes_only_sizes():
    published = resolved("attmask/100pct_hint")
    small = miniature("attmask/100pct_hint")
    changed = {line.partition(":")[0] for line in published.diff(small)}
    changed = {key for key in changed if not key.startswith("data.")}  # other images have other keys
    assert changed <= {word.partition("=")[0] for word in (*SIZES, *IMAGES)}


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_in_miniature(name):
    recipe = miniature(name)
    data = build.dataset(recipe)
    trainer = build.trainer(recipe, images=len(data), precision="fp32")
    start = {key: value.clone() for key, value in trainer.method.state_dict().items()}
    inputs, losses = build.inputs(recipe, trainer), []
    for batch in loader.batches(
        data, build.views(recipe), batch_size=8, seed=recipe.seed, total_steps=2, repeats=recipe.augment.repeats
    ):
        losses.append(trainer.step(*inputs(batch), batch.index))
        without = [
            name
            for name, p in trainer.method.named_parameters()
            if p.requires_grad and p.grad is None and "last_layer" not in name
        ]
        assert not without, "a parameter without a gradient would stop DDP"
    assert trainer.step_index == 2 and all(bool(step["ok"]) and torch.isfinite(step["loss"]) for step in losses)
    masks = (
        not recipe.learns_labels and recipe.masking.name != "none" and not recipe.method.keywords().get("start_epoch")
    )
    assert any(step.get("mask_share", 0) > 0 for step in losses) == masks
    moved = [key for key, value in trainer.method.state_dict().items() if not torch.equal(value, start[key])]
    assert any(key.startswith("student.") for key in moved) and any(key.startswith("teacher.") for key in moved)
