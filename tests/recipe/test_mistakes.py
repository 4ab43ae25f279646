"""All mistakes of a recipe in one error: typing mistakes, wrong values and conflicts, each with its place."""

from pathlib import Path

import pytest

from maskwise import cli
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe


@pytest.fixture
def errors(tmp_path, monkeypatch):
    """Return a function that gives the lines of the error for a recipe text."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> list[str]:
        Path("r.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            read_recipe("r.yaml", *overrides)
        return str(caught.value).splitlines()

    return read


SHAPES = "data: {name: shapes}\n"
MANY = """data: {name: shapes}
train:
  epochs: ten
optimizer:
  warmup_epoch: 5
  min_lr: 1
  clip: -1
head:
  hiden: 3
  layers: 2
crops:
  local_size: 90
  global_scale: [.5, .2]
evaluate:
  also: [linaer, "knn evry=1 k=0x"]
"""
ALL = [
    "r.yaml: 9 mistakes",
    "  r.yaml:3: train.epochs: expects a whole number, not `ten`",
    "  r.yaml:5: optimizer.warmup_epoch: nothing reads this key; did you mean `warmup_epochs`?; section optimizer "
    "accepts name, lr, lr_per, min_lr, warmup_epochs, warmup_lr, schedule, "
    "decay_share, weight_decay, weight_decay_end, clip, clip_mode, "
    "freeze_last_layer, betas, eps",
    "  r.yaml:7: optimizer.clip: must be at least 0, not -1.0",
    "  r.yaml:9: head.hiden: nothing reads this key; did you mean `hidden`?; section head accepts prototypes, hidden, "
    "bottleneck, layers, norm, norm_last_layer, patch_prototypes",
    "  r.yaml:6: optimizer.min_lr: 1 is above the peak learning rate 0.0005 (optimizer.lr x train.batch_size / 256); "
    "lower it",
    "  r.yaml:13: crops.global_scale: runs from low to high, not [0.5, 0.2]",
    "  r.yaml:12: crops.local_size: 90 pixels are not a multiple of the patch size 16; take 96",
]


def test_typing_mistakes_and_conflicts_are_reported_together(errors):
    lines = errors(MANY)
    assert lines[1:8] == ALL[1:]
    assert lines[8].startswith("  r.yaml:15: evaluate.also: no evaluation 'linaer'; did you mean `linear`?; there are ")
    assert lines[9].startswith("  r.yaml:15: evaluate.also: knn has no option evry; did you mean `every`?")
    assert lines[0] == "r.yaml: 9 mistakes" and len(lines) == 10


def test_words_of_the_command_line_are_reported_with_the_file(errors):
    assert errors(SHAPES + "optimizer: {min_lr: 1}\n", "seed=-1", "what", "masking=attmask_high", "pooling=gap") == [
        "r.yaml: 4 mistakes",
        "  command line: `what` is not section.key=value",
        "  command line: seed: must be at least 0, not -1",
        "  r.yaml:2: optimizer.min_lr: 1 is above the peak learning rate 0.0005 (optimizer.lr x train.batch_size / "
        "256); lower it",
        "  command line: masking.name: `attmask_high` hides what the teacher attends to, and pooling `gap` has no "
        "attention; use one that has (cls, simpool, how, otk, kmeans, slot, cbam, vit, cait, map), or mask at random",
    ]


@pytest.mark.parametrize(
    "text, line",
    [
        # the key that was meant is in no conflict, whatever its default
        ("optimizer: {lrr: 2}\nteacher: {momentum: .9}\n", "r.yaml:2: optimizer.lrr: "),
        ("optimizer: {lr: fast, min_lr: 1}\n", "r.yaml:2: optimizer.lr: "),
        ("trian: {epochs: 200}\noptimizer: {warmup_epochs: 150}\n", "r.yaml:2: trian.epochs: "),
        (
            "train:\n  epochs: 5\n  epochs: 200\noptimizer: {warmup_epochs: 50}\n",
            "r.yaml:4: train.epochs: written twice",
        ),
        ("backbone: {name: vit_smal_patch14_224}\ncrops: {local_size: 98}\n", "r.yaml:2: backbone.name: "),
        ("pooling: gapp\nbackbone: {class_token: false}\n", "r.yaml:2: pooling.name: "),
        ("crops: {local_number: none, local_size: 90}\n", "r.yaml:2: crops.local_number: "),
        # what is read depends on the method: nothing else is reported until its name is known
        ("method: superviesd\naugment: {mixup: .8}\nteacher: {momentum: null}\n", "r.yaml:2: method.name: "),
        ("masking: {name: attmask_hihg, show_max: .1}\n", "r.yaml:2: masking.name: "),
    ],
)
def test_consequences_of_a_mistake_are_not_reported(errors, text, line):
    [only] = errors(SHAPES + text)
    assert only.startswith(line)


def test_a_misspelled_path_is_not_missing_too(errors):
    [only] = errors("data: {name: folder, pth: x}\n")
    assert only.startswith("r.yaml:1: data.pth: nothing reads this key; did you mean `path`?")


def test_a_misspelled_split_leaves_the_evaluation_alone(errors):
    [only] = errors("data: {name: folder, path: x, test_splt: val}\nevaluate: {knn_every: 5}\n")
    assert only.startswith("r.yaml:1: data.test_splt: nothing reads this key; did you mean `test_split`?")


def test_every_evaluation_without_test_images_is_reported(errors):
    text = (
        "data: {name: folder, path: x}\nmethod: supervised\nevaluate: {knn_every: 5, top1_every: 1, also: [linear]}\n"
    )
    needs = "needs labeled test images; give data.test_path, data.test_split or data.holdout, or"
    assert errors(text) == [
        "r.yaml: 3 mistakes",
        f"  r.yaml:3: evaluate.knn_every: k-NN {needs} 0",
        f"  r.yaml:3: evaluate.top1_every: the accuracy {needs} 0",
        f"  r.yaml:3: evaluate.also: {needs} leave it out",
    ]


def test_the_model_is_tried_beside_other_mistakes(errors):
    text = "train: {epochs: ten}\nbackbone: {num_heads: 5}\nhead: {hiden: 3}\n"
    assert errors(SHAPES + text)[1:] == [
        "  r.yaml:2: train.epochs: expects a whole number, not `ten`",
        ALL[4].replace("r.yaml:9", "r.yaml:4"),
        "  r.yaml:3: backbone: timm cannot build vit_small_patch16_224 with img_size=224, num_heads=5: dim should be "
        "divisible by num_heads",
    ]


def test_mistakes_of_form_stay_beside_an_unusable_parent(errors):
    text = "train: {epochs: 5, epochs: 6}\nextends: nowhere.yaml\n"
    assert errors(text) == [
        "r.yaml: 2 mistakes",
        "  r.yaml:1: train.epochs: written twice, first at r.yaml:1; keep one",
        "  r.yaml:2: extends: no recipe nowhere.yaml; give a YAML file, or one that `maskwise list recipes` names",
    ]


def test_exit_status_is_one_for_all(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(MANY)
    assert cli.main(["train", "r.yaml", "--out", "run"]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 10 and "Traceback" not in printed.err
    assert not Path("run").exists()
