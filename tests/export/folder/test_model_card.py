"""Model cards: tags and values of the header."""

import maskwise
from export.folder.test_folder import build, run_folder
from maskwise.evaluation.report import Report
from maskwise.export import release
from maskwise.export.folder import model_card


def test_cards_of_supervised_runs_are_not_tagged_self_supervised(tmp_path):
    from huggingface_hub import ModelCard

    run_folder(tmp_path / "run", method={"name": "supervised"}, masking={"name": "none"})
    for name, has_tag in (("run", False), ("memory", False)):
        release.export(tmp_path / "run" if name == "run" else build(), tmp_path / f"{name}_out", say=None)
        tags = ModelCard.load(tmp_path / f"{name}_out" / "README.md").data.tags
        assert ("self-supervised-learning" in tags) == has_tag and ("supervised" in tags) == (name == "run")


def test_values_in_the_header_are_rounded_as_in_the_table(tmp_path):
    report = Report({"top1": 200 / 3, "images": 1234567}, {"evaluation": "knn"}, "0" * 16, {})
    maskwise.export(build(), tmp_path / "out", reports=[report], say=None)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "value: 66.6667\n" in text and "| top1 | 66.6667 |" in text and "value: 1234567\n" in text


def test_words_valid_as_metadata_types():
    assert model_card.slugged("k-NN (20)") == "k-NN-20" and model_card.slugged("///") == "unnamed"
