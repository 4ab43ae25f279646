"""Test reading of recipes: YAML values, parents, command line, error messages."""

import math
from pathlib import Path

import pytest

from maskwise.errors import UserError
from maskwise.recipe.consistency import fitted
from maskwise.recipe.reading import read_recipe
from maskwise.recipe.recipe import Recipe

SMALL = "data: {name: shapes}\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return a function that reads a recipe from text, as r.yaml."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> Recipe:
        Path("r.yaml").write_text(text)
        return read_recipe("r.yaml", *overrides)

    return read


def errors(recipe, text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        recipe(text, *overrides)
    return str(caught.value).splitlines()


def test_empty_recipe_has_the_published_values(recipe):
    plain = recipe(SMALL)
    assert (plain.crops.global_size, plain.crops.local_size, plain.crops.local_number) == (224, 96, 10)
    assert (
        plain.teacher.momentum,
        plain.teacher.temp,
        plain.teacher.warmup_temp,
        plain.teacher.warmup_temp_epochs,
    ) == (0.996, 0.07, 0.04, 30)
    assert (plain.optimizer.lr, plain.optimizer.min_lr, plain.optimizer.clip, plain.optimizer.keywords()["betas"]) == (
        5e-4,
        1e-6,
        3.0,
        (0.9, 0.999),
    )
    assert plain.backbone.name == "vit_small_patch16_224" and plain.backbone.keywords()["drop_path"] == 0.1
    assert plain.head.keywords() == {
        "prototypes": 8192,
        "hidden": 2048,
        "bottleneck": 256,
        "layers": 3,
        "norm": None,
        "norm_last_layer": False,
        "patch_prototypes": None,
    }


@pytest.mark.parametrize(
    "line, key, value",
    [
        ("train: {epochs: 1_000}", "train.epochs", 1000),
        ("train: {epochs: 040}", "train.epochs", 40),  # YAML 1.1 reads 32
        ("train: {epochs: 1e2}", "train.epochs", 100),
        ("optimizer: {lr: 5e-4}", "optimizer.lr", 5e-4),  # YAML 1.1 reads text
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("optimizer: {lr: .5}", "optimizer.lr", 0.5),
        ("optimizer: {clip: null}", "optimizer.clip", None),
        ("optimizer: {clip: none}", "optimizer.clip", None),
        ("head: {norm_last_layer: yes}", "head.norm_last_layer", True),
        ("head: {norm_last_layer: off}", "head.norm_last_layer", False),
        ("data: {name: folder, path: no}", "data.path", "no"),  # YAML 1.1 reads False
        ("data: {name: folder, path: 2012-01-01}", "data.path", "2012-01-01"),  # ... a date
        ("data: {name: folder, path: 1:30}", "data.path", "1:30"),  # ... ninety
        ("data: {name: folder, path: 007}", "data.path", "007"),
        ('data: {name: folder, path: "a: b"}', "data.path", "a: b"),
        ("masking: none", "masking.name", "none"),
        ("masking: {name: random, ratio: [0, .3], var: [0, 2e-1]}", "masking.var", (0.0, 0.2)),
        ("backbone: {depth: 3, qk_norm: true}", "backbone.qk_norm", True),
        ("backbone: {norm_layer: rmsnorm}", "backbone.norm_layer", "rmsnorm"),
        ("speed: {workers: 3}", "speed.workers", 3),
        ("speed: {workers: auto}", "speed.workers", "auto"),
    ],
)
def test_type_of_a_key_decides_how_a_value_is_read(recipe, line, key, value):
    read = recipe((SMALL if "data:" not in line else "") + line).values[key]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "line, text",
    [
        ("train: {epochs: ten}", "r.yaml:2: train.epochs: expects a whole number, not `ten`"),
        ("train: {epochs: 1.5}", "r.yaml:2: train.epochs: expects a whole number, not `1.5`"),
        ('train: {epochs: "10"}', 'r.yaml:2: train.epochs: expects a whole number, not "10"'),
        ("train: {epochs: [1]}", "r.yaml:2: train.epochs: expects a whole number, not [`1`]"),
        ("train: {epochs: {a: 1}}", "r.yaml:2: train.epochs: expects a value or a list of values"),
        ("train: {epochs: 0}", "r.yaml:2: train.epochs: must be at least 1, not 0"),
        ("optimizer: {lr: .nan}", "r.yaml:2: optimizer.lr: expects a number, not `.nan`"),
        ("optimizer: {lr: 1e999}", "r.yaml:2: optimizer.lr: expects a number, not `1e999`"),
        ("optimizer: {lr: -1}", "r.yaml:2: optimizer.lr: must be above 0, not -1.0"),
        ("optimizer: {clip_mode: tensr}", "r.yaml:2: optimizer.clip_mode: expects tensor or global, not `tensr`"),
        ("crops: {global_scale: [.5]}", "r.yaml:2: crops.global_scale: expects a list of 2 numbers, not [`.5`]"),
        ("crops: {global_scale: [.5, .2]}", "r.yaml:2: crops.global_scale: runs from low to high, not [0.5, 0.2]"),
        (
            "crops: {local_size: 90}",
            "r.yaml:2: crops.local_size: 90 pixels are not a multiple of the patch size 16; take 96",
        ),
        (
            "crops: {global_size: [64, 90]}",
            "r.yaml:2: crops.global_size: 90 pixels are not a multiple of the patch size 16; take [64, 96]",
        ),
        (
            "crops: {local_size: [40, 90]}\nbackbone: {patch_size: [8, 16]}",
            "r.yaml:2: crops.local_size: 90 pixels are not a multiple of the patch size 16; take [40, 96]",
        ),
        ("crops: {local_size: [32, 0]}", "r.yaml:2: crops.local_size: must be at least 1, not 0"),
        (
            "crops: {global_size: [32, 32, 32]}",
            "r.yaml:2: crops.global_size: expects a whole number or a list of 2 whole numbers, not [`32`, `32`, `32`]",
        ),
        (
            "crops: {global_size: 32, local_size: 16}\nbackbone: {patch_size: 5}",
            "  r.yaml:2: crops.global_size: 32 pixels are not a multiple of the patch size 5; take 30",
        ),
        ("head: {norm_last_layer: 1}", "r.yaml:2: head.norm_last_layer: expects true or false, not `1`"),
        ("evaluate: {k: []}", "r.yaml:2: evaluate.k: expects a list of whole numbers, not []"),
        (
            "backbone: {name: vit_smal_patch16_224}",
            "r.yaml:2: backbone.name: timm has no model `vit_smal_patch16_224`; did you mean "
            "`vit_small_patch16_224`?; `timm.list_models('vit_*')` lists them; your own is module:Class",
        ),
        (
            "masking: attmask_hihg",
            "r.yaml:2: masking.name: no masking `attmask_hihg`; did you mean `attmask_high`?; there are "
            "none, random, block, attmask_high, attmask_low, attmask_hint, and your own as module:Name",
        ),
        (
            "masking: {name: random, show_max: .1}",
            "r.yaml:2: masking.show_max: nothing reads this key; section masking accepts name, ratio, var, prob, "
            "ratio_per",
        ),
        (
            "masking: {name: random, ratio: .9}",
            "r.yaml:2: masking.var: masking.ratio 0.9 +- 0.2 goes outside 0..1; narrow it",
        ),
        (
            "masking: {name: random, ratio: [0, .3]}",
            "r.yaml:2: masking.ratio: has 2 entries and masking.var has 1; give as many",
        ),
        (
            "method: dino\nteacher: {patch_temp: .05}",
            "r.yaml:3: teacher.patch_temp: nothing reads this key; "
            "section teacher accepts momentum, momentum_end, temp, warmup_temp, warmup_temp_epochs",
        ),
        (
            "optimizer: {warmup_epochs: 10}\ntrain: {epochs: 5}",
            "r.yaml:2: optimizer.warmup_epochs: the learning-rate warm-up (10 epochs) is longer than the run "
            "(train.epochs is 5); shorten it or lengthen the run",
        ),
        (
            "trian: {epochs: 5}",
            "r.yaml:2: trian.epochs: no section `trian`; did you mean `train`?; sections are seed, extends, data, "
            "crops, augment, backbone, pooling, head, classifier, method, "
            "masking, teacher, optimizer, train, evaluate, speed",
        ),
        (
            "optimizer: {name: sgd, betas: [.9, .99]}",
            "r.yaml:2: optimizer.betas: nothing reads this key; section optimizer accepts name, lr, lr_per, min_lr, "
            "warmup_epochs, warmup_lr, schedule, decay_share, weight_decay, weight_decay_end, clip, "
            "clip_mode, freeze_last_layer, momentum, nesterov",
        ),
        (
            "pooling: cls\nbackbone: {class_token: false}",
            "r.yaml:2: pooling.name: `cls` needs a class token and backbone.class_token is false; use simpool, or "
            "keep the token",
        ),
        (
            "optimizer: {min_lr: 1}",
            "r.yaml:2: optimizer.min_lr: 1 is above the peak learning rate 0.0005 (optimizer.lr x train.batch_size / "
            "256); lower it",
        ),
        (
            "method: {start_epoch: 100}",
            "r.yaml:2: method.start_epoch: masking would start at epoch 100, after the end of the run "
            "(train.epochs is 100); start it earlier",
        ),
        (
            "backbone: {name: regnety_004}\nmasking: random\npooling: simpool",
            "r.yaml:2: backbone: regnety_004 has no patch tokens to mask: choose a Vision Transformer or a Swin, or "
            "masking none",
        ),
        (
            "masking: none\nmethod: dino\nbackbone: {name: regnety_004, drop_path: 0.1}",
            "r.yaml:4: backbone.drop_path=0.1 cannot be set: the drop paths of regnety_004 draw from the "
            "global generator; leave it out",
        ),
        (
            "masking: none\nmethod: dino\nbackbone: {name: beit_base_patch16_224}",
            "r.yaml:4: crops.local_size: images of 96x96 pixels do not fit beit_base_patch16_224, built for 224x224 "
            "(Input height (96) doesn't match model (224).): resize them, set backbone.image_size, use no local crops "
            "(crops.local_number=0), or choose another network",
        ),
        (
            "backbone:\n  num_heads: 5",
            "r.yaml:3: backbone: timm cannot build vit_small_patch16_224 with img_size=224, num_heads=5: dim should "
            "be divisible by num_heads",
        ),
        (
            "optimizer: {name: 'torch.optim:Adam'}",
            "r.yaml:2: optimizer.name: no optimizer `torch.optim:Adam`; there are adamw, sgd, lars, lamb",
        ),
        ("backbone: {norm_layer: nrom}", "r.yaml:2: backbone: timm has no layer 'nrom'"),
        ("backbone: {depth: x}", "r.yaml:2: backbone.depth: expects a whole number, not `x`"),
        (
            "backbone: {pretrained: true}",
            "r.yaml:2: backbone.pretrained: nothing reads this key; section backbone accepts name, image_size, "
            "patch_size, class_token, "
            "position, drop_path, weights and the arguments of timm's VisionTransformer",
        ),
        (
            "pooling:\n  name: simpool\n  num_heads: 5",
            "r.yaml:4: pooling.num_heads=5 does not divide the width 384: choose a divisor",
        ),
        ("train: 7", "r.yaml:2: train: a section; write its keys below it, indented"),
        (
            "train: {epochs: 50}\ntrain: {steps: 5}",
            "r.yaml:3: section train: written twice, first at r.yaml:2; keep one",
        ),
        ("train:\n  epochs: 50\n  epochs: 60", "r.yaml:4: train.epochs: written twice, first at r.yaml:3; keep one"),
        ("train: [epochs", "r.yaml:2: this is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("train:\n\tepochs: 5", "r.yaml:3: this is not YAML: found character '\\t' that cannot start any token"),
    ],
)
def test_error_names_place_cause_and_accepted_values(recipe, line, text):
    assert text in errors(recipe, SMALL + line)


def test_all_errors_are_reported_at_once(recipe):
    lines = errors(
        recipe,
        "data: {name: folder}\ntrain: {epochs: x}\noptimiser:\n  lr: 1\nhead: {hiden: 3}",
        "seed=-1",
        "epochs=3",
        "what",
    )
    assert lines[0] == "r.yaml: 7 mistakes"
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == ["command line"] * 3 + ["r.yaml"] * 4
    assert any("did you mean `optimizer`?" in line for line in lines)
    assert any("head.hiden: nothing reads this key; did you mean `hidden`?" in line for line in lines)
    assert any(line == "  command line: epochs: no section `epochs`; did you mean `train.epochs`?" for line in lines)
    assert any(line == "  command line: `what` is not section.key=value" for line in lines)
    assert any(line == "  command line: seed: must be at least 0, not -1" for line in lines)
    assert any(
        line == "  r.yaml: data.path: missing; write it into the recipe or give data.path=... on the command line"
        for line in lines
    )


def test_temperature_warm_up_longer_than_the_run_is_refused(recipe):
    text = SMALL + "train:\n  epochs: 20\nteacher:\n  warmup_temp_epochs: 30\n"
    assert errors(recipe, text) == [
        "r.yaml:5: teacher.warmup_temp_epochs: the temperature warm-up (30 epochs) is longer than the run "
        "(train.epochs is 20); shorten it or lengthen the run"
    ]
    with pytest.raises(
        UserError,
        match=r"^teacher.warmup_temp_epochs: the temperature warm-up \(30 epochs\) is longer than the run "
        r"\(train.steps=40 is 2 epochs of 512 images\)",
    ):
        fitted(
            recipe(text, "train.steps=40", "train.batch_size=25", "optimizer.warmup_epochs=1"), images=512, world_size=1
        )


def test_attention_masking_needs_a_pooling_with_attention(recipe, monkeypatch):
    monkeypatch.syspath_prepend(".")
    monkeypatch.setenv("MASKWISE_MODULES", "blind")
    Path("blind.py").write_text(
        "class Mean:\n    needs = set()\n    gives_attention = False\n    def __init__(self, dim): pass\n"
    )
    text = SMALL + "pooling: blind:Mean\nmasking: attmask_high\n"
    assert errors(recipe, text) == [
        "r.yaml:3: masking.name: `attmask_high` hides what the teacher attends to, and pooling `blind:Mean` has no "
        "attention; use one that has (cls, simpool, how, otk, kmeans, slot, cbam, vit, cait, map), or mask at random"
    ]
    assert recipe(text, "masking=random").pooling.name == "blind:Mean"
    assert "cannot be imported" in errors(recipe, SMALL + "pooling: blind:Maen")[0]


def test_missing_values_come_from_the_parent(recipe):
    Path("parent.yaml").write_text(
        SMALL + "masking: {name: attmask_hint, ratio: .4, show_max: .2}\ntrain: {epochs: 70}\n"
    )
    child = recipe("extends: parent.yaml\nmasking:\n  name: random\n", "train.keep=5")
    assert child.masking.keywords() == {
        "ratio": 0.4,
        "var": 0.2,
        "prob": 0.5,
        "ratio_per": "view",
    }  # show_max went with its masking
    assert child.train.epochs == 70
    origins = [child.origin(key) for key in ("masking.ratio", "masking.name", "train.keep", "train.epochs", "seed")]
    assert origins == ["parent.yaml:2", "r.yaml:3", "command line", "parent.yaml:3", "default"]
    assert "show_max" in errors(recipe, "extends: parent.yaml\nmasking: {name: random, show_max: .1}")[0]
    ibot = recipe(
        "extends: parent.yaml\nteacher: {patch_temp: .05}\nhead: {patch_prototypes: 64}\n",
        "method=dino",
        "masking=none",
    )
    assert "teacher.patch_temp" not in ibot.values and ibot.head.patch_prototypes is None


def test_unusable_parents_are_refused(recipe):
    Path("a.yaml").write_text("extends: r.yaml\n")
    assert errors(recipe, "extends: a.yaml") == ["r.yaml: `extends` comes back to this file; break the circle"]
    assert errors(recipe, "seed: 1\nextends: nowhere.yaml") == [
        "r.yaml:2: extends: no recipe nowhere.yaml; give a YAML file, or one that `maskwise list recipes` names"
    ]
    assert errors(recipe, "extends: [a, b]") == ["r.yaml:1: extends: a recipe has one parent; name one file"]
    assert recipe("extends: debug/tiny\n").train.batch_size == 8


def test_recipe_with_a_missing_part_is_refused_in_one_line(recipe):
    head = (
        "# A row.\n#\n#   command  maskwise train r\n#   cost     not yet measured\n"
        "#   result   not yet: the pooling `mean` is still to come; published: 1\n\n"
    )
    assert errors(recipe, head + SMALL + "pooling: mean\n") == [
        "r.yaml cannot run yet: the pooling `mean` is still to come"
    ]
    assert errors(recipe, head + SMALL + "pooling: mean\n", "seed=1")[0].startswith(
        "r.yaml:8: pooling.name: no pooling `mean`"
    )
    assert recipe(head + SMALL).pooling.name == "cls"  # and runs once the part is there


def test_keys_of_another_family_are_not_inherited(recipe):
    text = SMALL + "backbone: {name: swin_tiny_patch4_window7_224, window_size: 14}\n"
    Path("r.yaml").write_text(text)
    assert read_recipe("r.yaml", try_model=False).backbone.keywords()["window_size"] == 14
    assert errors(recipe, text + "train: {epochs: 50}\nhead: {}\n", "backbone.qk_norm=true")[1].endswith(
        "and the arguments of timm's SwinTransformer"
    )


def test_files_that_are_no_recipes(recipe, tmp_path):
    assert errors(recipe, "- a\n- b\n") == [
        "r.yaml:1: a recipe is made of sections (`section:` and indented `key: value` lines)"
    ]
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for name, text in (
        ("binary.yaml", "binary.yaml is not a text file; a recipe is YAML in UTF-8"),
        (
            "debug/tinny",
            "no recipe debug/tinny; did you mean `debug/tiny`?; give a YAML file, or one that `maskwise list recipes` "
            "names",
        ),
        (str(tmp_path), f"{tmp_path} is a folder without a recipe.yaml; give a recipe file"),
    ):
        with pytest.raises(UserError) as caught:
            read_recipe(name)
        assert str(caught.value).startswith(text)


def test_sizes_may_be_height_and_width(tmp_path):
    recipe = read_recipe("debug/tiny", "crops.global_size=[24, 40]", "crops.local_size=[8,16]")
    assert (recipe.crops.global_size, recipe.crops.local_size, recipe.image_size) == ((24, 40), (8, 16), (24, 40))
    assert read_recipe("debug/tiny").hash() != recipe.hash()
    (tmp_path / "resolved.yaml").write_text(recipe.resolved_yaml())
    again = read_recipe(str(tmp_path / "resolved.yaml"))
    assert again == recipe and again.hash() == recipe.hash()


def test_hash_and_diff_ignore_section_speed():
    tiny = read_recipe("debug/tiny")
    fast, other = (
        read_recipe("debug/tiny", "speed.workers=4"),
        read_recipe("debug/tiny", "train.epochs=3", "masking=random"),
    )
    assert fast.hash() == tiny.hash() and tiny.diff(fast) == []
    assert other.hash() != tiny.hash()
    assert tiny.diff(other) == [
        "masking.name: attmask_hint -> random",
        "masking.ratio_per: step -> view",
        "masking.show_max: 0.1 -> not set",
        "train.epochs: 2 -> 3",
    ]


def test_explained_gives_every_origin():
    lines = read_recipe("pretrain/attmask_hint_vits16", "train.epochs=90").explained().splitlines()
    origins = {line.split("#")[0].strip(): line.split("# ")[1] for line in lines if "#" in line}
    assert origins["epochs: 90"] == "command line" and origins["hidden: 2048"] == "default"
    assert origins["show_max: 0.1"].startswith("configs/attmask/100pct_hint.yaml:")
    assert origins["momentum: 0.996"].startswith("configs/ibot/vits16_800ep.yaml:")
    assert all("#" in line or line.endswith(":") for line in lines)


@pytest.mark.parametrize(
    "images, ranks, batch, text",
    [
        (3, 4, 8, "more ranks (4) than images (3); start fewer ranks or give more images"),
        (
            100,
            1,
            128,
            "train.batch_size is 128 and there are only 100 images; give train.batch_size=100 or less, or more images",
        ),
        (
            100,
            3,
            64,
            "train.batch_size 64 (the global batch) does not divide over 3 ranks; give train.batch_size=63, "
            "or to continue a run a number of ranks that divides 64",
        ),
        (
            100,
            4,
            2,
            "train.batch_size 2 (the global batch) does not divide over 4 ranks; give train.batch_size=4, "
            "or to continue a run a number of ranks that divides 2",
        ),
    ],
)
def test_batch_size_must_fit_images_and_ranks(images, ranks, batch, text):
    recipe = read_recipe("debug/tiny", f"train.batch_size={batch}")
    with pytest.raises(UserError) as caught:
        fitted(recipe, images, ranks)
    assert str(caught.value) == text
    fitted(read_recipe("debug/tiny"), 64, 2)


def test_evaluation_during_training_needs_test_images(recipe):
    text = "data: {name: folder, path: x}\nevaluate: {knn_every: 5}\n"
    assert errors(recipe, text) == [
        "r.yaml:2: evaluate.knn_every: k-NN needs labeled test images; give data.test_path, data.test_split or "
        "data.holdout, or 0"
    ]
    assert recipe(text, "data.test_split=val").evaluate.knn_every == 5
    unlabeled = recipe("data: {name: folder, path: x}\n")
    assert unlabeled.data.keywords()["path"] == "x" and unlabeled.evaluate.knn_every == 0
    Path("resolved.yaml").write_text(unlabeled.resolved_yaml())
    assert read_recipe("resolved.yaml") == unlabeled


def test_numbers_survive_writing_and_reading(recipe):
    value = math.pi / 1e7
    first = recipe(SMALL, f"optimizer.lr={value!r}", "optimizer.min_lr=0")
    assert first.optimizer.lr == value
    Path("again.yaml").write_text(first.resolved_yaml())
    assert read_recipe("again.yaml").optimizer.lr == value


def test_old_key_names_are_read(recipe):
    old = recipe(f"{SMALL}crops: {{grey_prob: 0.3}}\npooling: {{name: simpool, normalise: sigmoid}}\n")
    new = recipe(SMALL, "crops.gray_prob=0.3", "pooling=simpool", "pooling.normalize=sigmoid")
    assert old.diff(new) == [] and old.hash() == new.hash()
    assert recipe(SMALL, "crops.grey_prob=0.3").crops.gray_prob == 0.3
    [line] = errors(recipe, f"{SMALL}crops: {{grey_prob: 0.3, gray_prob: 0.2}}\n")
    assert "crops.grey_prob: nothing reads this key; did you mean `gray_prob`?" in line
