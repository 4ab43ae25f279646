"""Test every pooling in a recipe: keys, training, export."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from maskwise.errors import UserError
from maskwise.nn import POOLINGS
from maskwise.nn.encoder import encoder_from_spec
from maskwise.recipe.reading import read_recipe

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
ATTENTIVE = [name for name, row in POOLINGS.items() if row.gives_attention]


def trainer(*words):
    from maskwise import build

    return build.trainer(read_recipe("debug/tiny", "data.count=16", *words))


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_trains_in_dino_with_all_weights_in_the_graph(name):
    torch.manual_seed(0)
    made = trainer("method=dino", f"pooling.name={name}", "masking.name=none")
    size = made.method.student.encoder.image_size[0]
    before = {key: value.clone() for key, value in made.method.student.encoder.pooling.named_parameters()}
    for _ in range(2):
        made.step(torch.randn(16, 3, size, size), torch.randn(16, 3, size // 2, size // 2))
    for key, value in made.method.student.encoder.pooling.named_parameters():
        assert value.isfinite().all() and (value.grad is not None or not value.requires_grad), key
    moved = [
        key
        for key, value in made.method.student.encoder.pooling.named_parameters()
        if not torch.equal(value, before[key])
    ]
    assert bool(moved) == any(value.requires_grad for value in made.method.student.encoder.pooling.parameters())
    spec = made.method.teacher.encoder.spec()
    twin = encoder_from_spec(spec)
    assert twin.spec() == spec
    twin.load_state_dict(made.method.teacher.encoder.state_dict(), strict=False)


@pytest.mark.parametrize("name", POOLINGS)
def test_attmask_uses_poolings_with_attention_and_refuses_others(name):
    words = (
        f"pooling.name={name}",
        "masking.name=attmask_high",
        "masking.prob=1.0",
        "masking.ratio=0.3",
        "masking.var=0.0",
    )
    if name not in ATTENTIVE:
        with pytest.raises(
            UserError, match=f"pooling `{name}` has no attention; use one that has \\(cls, simpool, how, "
        ):
            read_recipe("debug/tiny", *words)
        return
    torch.manual_seed(0)
    made = trainer(*words)
    size = made.method.student.encoder.image_size[0]
    crops = torch.randn(4, 3, size, size)
    features = made.method.teacher_features(crops)
    views = made.method.split_views(crops, None, torch.arange(2))
    hidden = made.method.sample_masks(features, views, 0, torch.arange(2))
    seen = (
        features.attention.amax(1)
        if features.attention.shape[1] == getattr(made.method.teacher.encoder.pooling, "k", 1)
        else features.attention.mean(1)
    )
    for mask, row in zip(hidden.mask, seen):
        assert mask.sum() == int(0.3 * mask.numel()) and row[mask].min() >= row[~mask].max()


@pytest.mark.parametrize(
    "words, text",
    [
        ("pooling.name=otk pooling.k=0", "must be at least 1, not 0"),
        ("pooling.name=slot pooling.reduce=max", "max_logit"),
        ("pooling.name=gem pooling.num_heads=2 masking.name=random", "nothing reads this key"),
        ("pooling.name=lse pooling.scale=-1 masking.name=random", "must be above 0"),
        ("pooling.name=cait pooling.num_heads=7", "does not divide"),
        ("pooling.name=simpool pooling.layer_norm=xy", "name those of q, k and v"),
    ],
)
def test_errors_are_one_line(words, text):
    with pytest.raises(UserError, match=text) as caught:
        read_recipe("debug/tiny", *words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, batch, peak",
    [
        ("vits16_dino", 8 * 100, 1.5625e-3),
        ("resnet50_dino", 8 * 160, 1.5),
        ("resnet50_dino", 16 * 90, 1.6875),
        ("convnext_small_dino", 8 * 60, 1.875e-3),
    ],
)
def test_global_learning_rates(name, batch, peak):
    """Peak learning rates: base rate x batch / 256.

    SimPool's released command for ResNet-50 has a batch of 1440, the paper and the recipe 1280.
    """
    assert read_recipe(f"simpool/{name}").optimizer.peak(batch) == pytest.approx(peak, rel=1e-12)


def test_docs_list_every_pooling_and_key():
    """docs/recipes.md lists exactly the keys of each pooling."""
    rows = {}
    for line in (
        DOCS.read_text(encoding="utf-8").partition("## Poolings and their keys")[2].partition("\n## ")[0].splitlines()
    ):
        cells = line.split("|")
        if len(cells) == 5 and "`" in cells[1]:
            rows |= {
                name: (set(re.findall(r"`(\w+)`", cells[3])), cells[2].strip())
                for name in re.findall(r"`(\w+)`", cells[1])
            }
    assert rows.keys() == POOLINGS.keys()
    for name, (keys, attends) in rows.items():
        assert keys == set(inspect.signature(POOLINGS[name]).parameters) - {"dim"}, name
        assert (attends != "no") == POOLINGS[name].gives_attention, name
