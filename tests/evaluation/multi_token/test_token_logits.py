"""Distribution of the logits of single tokens, against loops over images."""

import numpy as np
import pytest
import torch
from torch import nn

from maskwise.evaluation.multi_token import token_logits
from maskwise.evaluation.multi_token.analysis import analysis, pictures
from maskwise.evaluation.report import Report
from maskwise.evaluation.scoring.classifier import Classifier, Logits
from maskwise.nn.multi_token.class_tokens import ClassTokensClassifier
from maskwise.nn.multi_token.classifier import MAPClassifier
from support.tiny_sets import Colors, tiny_encoder


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder("simpool", depth=2)


def map_network(encoder, **options):
    torch.manual_seed(0)
    made = MAPClassifier(encoder, 5, dim=8, tokens=3, gram_width=3, heads=2, gram_groups=1, **options).eval()
    with torch.no_grad():
        for parameter in made.head.parameters():
            parameter.normal_(std=0.5)
    return made


def classifier(encoder, network):
    made = Classifier(Logits(encoder, network), nn.Identity(), "pooled")
    made.kind, made.count, made.classes = "test", network.classes, None
    return made


def single_images(encoder, network, data, indices):
    with torch.no_grad():
        return [
            network.token_logits(
                encoder.eval()(encoder.transform(data.image(i))[None], attention=False, layers=network.layers)
            )[0].double()
            for i in indices
        ]


def test_numbers_and_points_against_a_loop(encoder):
    network, data = map_network(encoder), Colors(8, broken=(2,))
    readable = [i for i in range(8) if i != 2]
    report = analysis(encoder, {"test": data}, parts=["logits"], classifier=classifier(encoder, network), batch_size=3)
    within = between = 0.0
    rows = []
    for tokens in single_images(encoder, network, data, readable):  # [6, 5]: two groups of three
        center = sum(tokens) / 6
        groups = [sum(tokens[:3]) / 3, sum(tokens[3:]) / 3]
        for k in range(6):
            rows.append(tokens[k] - center)
            within += float(((tokens[k] - groups[k // 3]) ** 2).sum()) / (6 * 5 * 7)
        between += sum(float(((group - center) ** 2).sum()) / (2 * 5 * 7) for group in groups)
    assert report.numbers == pytest.approx({"logit_within": within, "logit_between": between}, rel=1e-4)
    assert within > 1e-6 and between > 1e-6
    assert report.protocol["logits"] == {"groups": 2, "tokens_per_group": 3, "images": 7, "drawn": 7}
    rows = torch.stack(rows)
    values, vectors = torch.linalg.eigh(rows.T @ rows)  # the second way to main directions
    found = torch.tensor(
        [report.curves[f"logits_group_{1 + k // 3}"][3 * i + k % 3] for i in range(7) for k in range(6)],
        dtype=torch.float64,
    )
    expected = (rows @ vectors[:, [-1, -2]]) * torch.where(vectors[:, [-1, -2]].sum(0) < 0, -1.0, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    centers = [np.mean(report.curves[f"logits_group_{g}"], axis=0).tolist() for g in (1, 2)]
    assert np.allclose(report.curves["logits_centers"], centers)
    assert report.pictures["logits"].shape == (720, 960, 3)


def test_light_has_one_token_per_group(encoder):
    network = map_network(encoder, light=True)
    report = analysis(encoder, {"test": Colors(4)}, parts=["logits"], classifier=classifier(encoder, network))
    assert report.numbers["logit_within"] == 0 and report.numbers["logit_between"] > 0
    assert len(report.curves["logits_group_2"]) == 4 and "logits_group_3" not in report.curves


def test_class_tokens_and_evenly_spaced_pictures(monkeypatch):
    torch.manual_seed(0)
    encoder = tiny_encoder("cls", depth=2, reg_tokens=3)
    network = ClassTokensClassifier(encoder, 5, groups=2).eval()
    monkeypatch.setattr(token_logits, "PICTURED", 3)
    data = Colors(9)
    report = analysis(encoder, {"test": data}, parts=["logits"], classifier=classifier(encoder, network), batch_size=2)
    assert report.protocol["logits"] == {"groups": 2, "tokens_per_group": 2, "images": 9, "drawn": 3}
    logits = torch.stack(single_images(encoder, network, data, [0, 3, 6])).unflatten(1, (2, 2))
    expected = dict(token_logits.plane(logits))
    torch.testing.assert_close(
        torch.tensor(report.curves["logits_group_1"], dtype=torch.float64),
        expected["logits_group_1"],
        atol=1e-5,
        rtol=1e-3,
    )


def test_other_reports_are_drawn_below(encoder, tmp_path):
    network, data = map_network(encoder), {"test": Colors(4)}
    options = {"parts": ["logits"], "classifier": classifier(encoder, network)}
    first = analysis(encoder, data, **options)
    first.save(tmp_path / "first.json")
    assert (tmp_path / "first_logits.png").is_file()
    both = analysis(encoder, data, **options, beside=tmp_path / "first.json")
    assert both.pictures["logits"].shape == (1440, 960, 3)
    again = Report.load(tmp_path / "first.json")
    assert np.array_equal(pictures({"this encoder": again})["logits"], first.pictures["logits"])
