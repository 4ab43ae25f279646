"""Schedules in epochs: shortened in proportion to a shorter run, refused where both were written together."""

from pathlib import Path

import pytest

from maskwise.errors import UserError
from maskwise.recipe.consistency import fitted
from maskwise.recipe.reading import read_recipe, shipped
from maskwise.recipe.run_length import SCHEDULES
from support.miniature import resolved

IMAGES = "data=shapes"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function that reads files of a recipe, the last with overrides."""
    monkeypatch.chdir(tmp_path)

    def of(*texts, overrides=()):
        for number, text in enumerate(texts):
            parent = f"extends: {number - 1}.yaml\n" if number else "data: {name: shapes}\n"
            Path(f"{number}.yaml").write_text(parent + text)
        return read_recipe(f"{len(texts) - 1}.yaml", *overrides, try_model=False)

    return of


def schedules(recipe):
    return {schedule.key: recipe.values.get(schedule.key) for schedule in SCHEDULES}


def test_a_shipped_recipe_with_fewer_epochs():
    recipe = read_recipe("attmask/100pct_hint", IMAGES, "train.epochs=5", try_model=False)
    assert schedules(recipe) == {
        "optimizer.warmup_epochs": 0.5,  # 10 of 100
        "teacher.warmup_temp_epochs": 2,  # 30 of 100, in whole epochs
        "method.head_warmup_epochs": None,
        "method.start_epoch": 0,
        "optimizer.freeze_last_layer": 1,  # leaves four epochs
    }
    assert recipe.notes == (
        "schedules of 100 epochs shortened to 5: optimizer.warmup_epochs 10 to 0.5, teacher.warmup_temp_epochs 30 to 2",
    )
    assert recipe.origin("optimizer.warmup_epochs").startswith("was 10.0, configs/")
    assert recipe.optimizer.warmup_epochs == 0.5 and recipe.teacher.warmup_temp_epochs == 2


def test_only_what_does_not_fit_is_shortened():
    recipe = read_recipe("attmask/100pct_hint", IMAGES, "train.epochs=20", try_model=False)
    assert (recipe.optimizer.warmup_epochs, recipe.teacher.warmup_temp_epochs) == (10, 6)
    plain = read_recipe("attmask/100pct_hint", IMAGES, "train.epochs=31", try_model=False)
    assert (plain.optimizer.warmup_epochs, plain.teacher.warmup_temp_epochs, plain.notes) == (10, 30, ())


def test_a_warm_up_as_long_as_the_run_is_shortened_unless_it_was_written_for_it(read):
    filled = read_recipe("attmask/100pct_hint", IMAGES, "train.epochs=10", try_model=False)
    assert (filled.optimizer.warmup_epochs, filled.teacher.warmup_temp_epochs) == (1, 3)  # 10 and 30 of 100
    both = read("optimizer: {warmup_epochs: 2}\n", overrides=["train.epochs=2", "optimizer.warmup_epochs=2"])
    assert both.optimizer.warmup_epochs == 2 and "optimizer" not in "".join(both.notes)


def test_one_epoch_keeps_a_warm_up_and_trains_the_last_layer():
    recipe = read_recipe("attmask/100pct_hint", IMAGES, "train.epochs=1", try_model=False)
    assert (recipe.optimizer.warmup_epochs, recipe.teacher.warmup_temp_epochs) == (0.1, 1)
    assert recipe.optimizer.freeze_last_layer == 0


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_runs_for_one_epoch_and_is_unchanged_as_it_is(name):
    short = read_recipe(name, IMAGES, "train.epochs=1", "train.steps=null", try_model=False)
    for schedule in SCHEDULES:
        value = short.values.get(schedule.key)
        assert not value or schedule.fits(value, 1)
    assert resolved(name).notes == ()


def test_head_warm_up_and_start_of_masking_are_shortened():
    recipe = read_recipe(
        "continue/fresh_head_vits16", IMAGES, "train.epochs=1", "method.start_from=x.pth", try_model=False
    )
    whole = read_recipe("continue/fresh_head_vits16", IMAGES, "method.start_from=x.pth", try_model=False)
    assert recipe.method.head_warmup_epochs == pytest.approx(2 / whole.train.epochs)
    swin = read_recipe("ibot/swint14_300ep", IMAGES, "train.epochs=30", try_model=False)
    assert swin.method.keywords()["start_epoch"] == 5  # 50 of 300


def test_the_length_before_the_last_change_counts(read):
    parent, child = "optimizer: {warmup_epochs: 20}\ntrain: {epochs: 100}\n", "train: {epochs: 200}\n"
    assert read(parent, child, overrides=["train.epochs=10"]).optimizer.warmup_epochs == 1.0  # 20 of 200
    assert read(parent, "train: {epochs: 10}\n").optimizer.warmup_epochs == 2.0  # 20 of 100
    # the child's 10 epochs shorten it to 2, five epochs to half of that
    short = "train: {epochs: 10}\n"
    assert read(parent, short, overrides=["train.epochs=5"]).optimizer.warmup_epochs == 1.0


def test_defaults_are_shortened(read):
    recipe = read("train: {epochs: 5}\n")
    assert (recipe.optimizer.warmup_epochs, recipe.teacher.warmup_temp_epochs) == (0.5, 2)


@pytest.mark.parametrize(
    "text, overrides, line",
    [
        ("optimizer: {warmup_epochs: 9}\ntrain: {epochs: 5}\n", [], "0.yaml:2: optimizer.warmup_epochs: the learning"),
        ("", ["optimizer.warmup_epochs=9", "train.epochs=5"], "command line: optimizer.warmup_epochs: the learning"),
        ("train: {epochs: 5}\n", ["optimizer.warmup_epochs=9"], "command line: optimizer.warmup_epochs: the learning"),
        ("", ["method.start_epoch=9", "train.epochs=5"], "command line: method.start_epoch: masking would start"),
    ],
)
def test_what_was_written_for_this_length_is_refused(read, text, overrides, line):
    with pytest.raises(UserError) as caught:
        read(text, overrides=overrides)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_run_of_steps_is_fitted_to_its_images(read):
    recipe = read("", overrides=["train.steps=40", "train.batch_size=25"])
    assert recipe.optimizer.warmup_epochs == 10
    short = fitted(recipe, images=512, world_size=1)  # 20 steps per epoch: 2 epochs
    assert (short.optimizer.warmup_epochs, short.teacher.warmup_temp_epochs) == (0.2, 1)
    assert short.values["optimizer.warmup_epochs"] == 0.2 and "optimizer.warmup_epochs 10 to 0.2" in short.notes[0]
    assert fitted(recipe, images=25, world_size=1) is recipe  # 40 epochs
    own = read("train: {steps: 400}\noptimizer: {warmup_epochs: 2}\n", overrides=["train.steps=100"])
    # 200 steps per epoch: a warm-up of both epochs of 400 steps becomes half an epoch, all of 100 steps
    assert fitted(own, images=256 * 200, world_size=1).optimizer.warmup_epochs == 0.5


def test_a_last_layer_frozen_for_all_steps_is_said(read):
    recipe = read("", overrides=["train.steps=10", "train.batch_size=25", "optimizer.warmup_epochs=0"])
    short = fitted(recipe, images=512, world_size=1)
    assert short.optimizer.freeze_last_layer == 1 and short.notes[1] == (
        "the last layer is frozen for the whole run: optimizer.freeze_last_layer is 1 epochs and train.steps=10 is 0.5 "
        "epochs of 512 images; give 0 to train it"
    )


def test_steps_and_warm_up_written_together_are_refused(read):
    recipe = read("", overrides=["train.steps=40", "train.batch_size=25", "method.start_epoch=3"])
    with pytest.raises(UserError) as caught:
        fitted(recipe, images=512, world_size=1)
    assert str(caught.value) == (
        "method.start_epoch: masking would start at epoch 3, after the end of the run (train.steps=40 is 2 epochs of "
        "512 images); start it earlier"
    )


def test_the_resolved_recipe_reads_back(read, tmp_path):
    recipe = read("train: {epochs: 5}\n")
    (tmp_path / "recipe.yaml").write_text(recipe.resolved_yaml())
    again = read_recipe(tmp_path, try_model=False)
    assert again == recipe and again.notes == ()


def test_a_decay_needs_its_schedule_and_room_beside_the_warm_up():

    wsd = ("optimizer.schedule=wsd", "train.epochs=10")
    assert read_recipe("debug/tiny", *wsd, "optimizer.warmup_epochs=8", try_model=False).optimizer.decay_steps(10) == 2
    with pytest.raises(UserError, match="8.5 epochs and the decay in the last 2 are longer than the run of 10"):
        read_recipe("debug/tiny", *wsd, "optimizer.warmup_epochs=8.5", try_model=False)
    with pytest.raises(UserError, match="decay_share: is read with optimizer.schedule=wsd only"):
        read_recipe("debug/tiny", "optimizer.decay_share=0.1", try_model=False)
