"""Every shipped recipe: its header, its keys, and two steps of it in miniature."""

import inspect
import re

import pytest
import torch
from recipes.miniature import IMAGES, RECIPES, SIZES, miniature, resolved

from maskwise import build
from maskwise.data import loader
from maskwise.recipe import SHIPPED, read_recipe
from maskwise.recipe_schema import tables
from maskwise.recipe_text import header


@pytest.mark.parametrize("name", RECIPES)
def test_it_begins_with_its_command_its_cost_and_its_result(name):
    text = (SHIPPED / f"{name}.yaml").read_text()
    head = header(text)
    assert head.title.endswith(".") and head.cost and head.result
    assert f" {name} " in head.command or "launch/" in head.command
    if name.partition("/")[0] not in ("debug", "pretrain"):
        assert head.cost.startswith("not yet measured") and head.result.startswith("not yet measured; ")
    assert all(len(line) <= 160 for line in text.splitlines())


@pytest.mark.parametrize("name", RECIPES)
def test_its_resolved_text_reads_back_equal(name, tmp_path):
    first = resolved(name)
    (tmp_path / "recipe.yaml").write_text(first.resolved_yaml())
    again = read_recipe(tmp_path, try_model=False)
    assert again == first and again.values == first.values and again.hash() == first.hash() and first.diff(again) == []
    assert {"seed", "data.name", "train.epochs", "augment.size" if first.learns_labels else "masking.name"} <= set(first.values)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_section_is_an_argument_of_what_it_names(name):
    recipe = resolved(name)
    for section, table in tables().items():
        part = getattr(recipe, section)
        row = table[part.name]
        makers = [row] if inspect.isfunction(row) else [cls.__init__ for cls in row.__mro__]
        accepted = {key for maker in makers for key in inspect.signature(maker).parameters}
        assert set(part.keywords()) <= accepted, section


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_of_a_paper_says_only_what_differs_from_its_parent(name):
    """No value is written that its parent has already, but for those that a change of a name makes worth repeating."""
    text = (SHIPPED / f"{name}.yaml").read_text()
    parent = re.search(r"^extends: (\S+)$", text, re.M)
    if parent is None or name.startswith("pretrain/"):
        return
    path = (SHIPPED / name).parent / parent.group(1)
    above = resolved(path.resolve().relative_to(SHIPPED.resolve()).with_suffix("").as_posix())
    mine = resolved(name)
    written = [key for key, origin in mine.origins.items() if origin.startswith(f"configs/{name}.yaml:")]
    renamed = {section for section in ("masking", "pooling", "classifier", "optimizer") if getattr(mine, section).name != getattr(above, section).name}
    repeated = [key for key in written if above.values.get(key) == mine.values[key] and key.partition(".")[0] not in renamed]
    assert not [key for key in repeated if key not in ("teacher.warmup_temp", "masking.prob", "train.epochs")], repeated


def test_the_table_of_sizes_holds_sizes_only():
    published = resolved("attmask/100pct_hint")
    small = miniature("attmask/100pct_hint")
    changed = {line.partition(":")[0] for line in published.diff(small)}
    changed = {key for key in changed if not key.startswith("data.")}  # other images have other keys
    assert changed <= {word.partition("=")[0] for word in (*SIZES, *IMAGES)}


@pytest.mark.parametrize("name", RECIPES)
def test_it_takes_two_steps_in_miniature(name):
    recipe = miniature(name)
    data = build.dataset(recipe)
    trainer = build.trainer(recipe, images=len(data), precision="fp32")
    start = {key: value.clone() for key, value in trainer.method.state_dict().items()}
    inputs, seen = build.inputs(recipe, trainer), []
    for batch in loader.batches(data, build.views(recipe), batch_size=8, seed=recipe.seed, total_steps=2, repeats=recipe.augment.repeats):
        seen.append(trainer.step(*inputs(batch), batch.index))
        without = [name for name, p in trainer.method.named_parameters() if p.requires_grad and p.grad is None and "last_layer" not in name]
        assert not without, "a parameter without a gradient would stop DDP"
    assert trainer.step_index == 2 and all(bool(each["ok"]) and torch.isfinite(each["loss"]) for each in seen)
    hides = not recipe.learns_labels and recipe.masking.name != "none" and not recipe.method.keywords().get("start_epoch")
    assert any(each.get("mask_share", 0) > 0 for each in seen) == hides
    moved = [key for key, value in trainer.method.state_dict().items() if not torch.equal(value, start[key])]
    assert any(key.startswith("student.") for key in moved) and any(key.startswith("teacher.") for key in moved)
