"""Analysis against loops over single images: diversity, dead neurons, non-salient accuracy, errors of tokens."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from maskwise import api
from maskwise.errors import UserError
from maskwise.evaluation import EVALUATIONS
from maskwise.evaluation.features.extract import evaluating, extract
from maskwise.evaluation.knn import knn_classify
from maskwise.evaluation.masked import masked
from maskwise.evaluation.multi_token.activations import THRESHOLD, observe
from maskwise.evaluation.multi_token.analysis import analysis, of_classifier, pictures
from maskwise.evaluation.report import Report
from maskwise.evaluation.scoring.classifier import Classifier
from maskwise.functional import metrics
from maskwise.nn.multi_token.classifier import MAPClassifier
from maskwise.nn.tokens import Features
from support.tiny_sets import Colors, sets, tiny_encoder


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder("simpool", depth=3)


def images_of(encoder, dataset):
    return torch.stack([encoder.transform(dataset.image(i)) for i in range(len(dataset))])


# functions of tensors


def test_feature_variance_against_loops():
    maps = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = maps.flatten(2).tolist()

    def variance(values):
        middle = sum(values) / len(values)
        return sum((value - middle) ** 2 for value in values) / (len(values) - 1)

    spatial = [variance(channel) for image in rows for channel in image]
    channel = [variance([image[c][j] for c in range(3)]) for image in rows for j in range(4)]
    observed = metrics.feature_variance(maps)
    assert observed["spatial"] == pytest.approx(sum(spatial) / 6, rel=1e-12) and observed["channel"] == pytest.approx(
        sum(channel) / 8, rel=1e-12
    )
    flat = metrics.feature_variance(torch.ones(2, 3, 1, 1))
    assert math.isnan(flat["spatial"]) and flat["channel"] == 0


def test_token_errors_by_hand():
    single = torch.tensor([[0, 1], [1, 1], [2, 0]])
    together, labels = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])
    assert metrics.token_errors(single, together, labels) == pytest.approx(
        {"bias": 100 / 3, "variance": 100 * 2 / 6, "error": 100 * 4 / 6}
    )
    alike = torch.stack([together] * 4, dim=1)
    observed = metrics.token_errors(alike, together, labels)
    assert observed["variance"] == 0 and observed["error"] == observed["bias"]


# layers


def test_diversity_and_neurons_of_a_transformer_against_a_loop_over_images(encoder):
    data = Colors(7)
    observed = observe(encoder, data, batch_size=3)
    seen, hidden = [], []
    with evaluating(encoder), torch.no_grad():
        for image in images_of(encoder, data):
            tokens = encoder.backbone(image[None], layers=(0, 1, 2))
            seen.append(
                [
                    metrics.feature_variance(
                        stage[:, encoder.backbone.num_prefix :].transpose(1, 2).unflatten(2, tokens.grid)
                    )
                    for stage in tokens.stages
                ]
            )
            caught = []
            hooks = [
                block.mlp.act.register_forward_hook(lambda _, __, out: caught.append(out[0]))
                for block in encoder.backbone.blocks
            ]
            encoder.backbone(image[None])
            hidden.append(caught)
            for hook in hooks:
                hook.remove()
    for name in ("spatial", "channel"):
        assert observed.diversity[name] == pytest.approx(
            [sum(image[i][name] for image in seen) / 7 for i in range(3)], rel=1e-5
        )
    assert [layer.name for layer in observed.neurons] == [f"blocks.{i}.mlp.act" for i in range(3)]
    for i, layer in enumerate(observed.neurons):
        fires = torch.stack(
            [image[i].abs() >= THRESHOLD * image[i].square().mean().sqrt() for image in hidden]
        )  # [7, T, C]
        assert layer.silent == pytest.approx(1 - float(fires.double().mean()))
        assert layer.units == pytest.approx(1 - float(fires.any(0).double().mean()))
        assert layer.channels == pytest.approx(1 - float(fires.any(0).any(0).double().mean()))


class Half(nn.Module):
    """A map backbone of two channels behind one ReLU: the first passes bright places only, the second nothing."""

    stage_dims, num_prefix, has_class_token, name = (2,), 0, False, "half"

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, images, layers=()):
        gray = images.mean(1, keepdim=True) - 0.5
        x = self.act(torch.cat([gray, -images.square().mean(1, keepdim=True) - 1], dim=1))
        flat = x.flatten(2).transpose(1, 2)
        return type("Tokens", (), {"patches": flat, "stages": (x,), "grid": tuple(x.shape[2:])})


class HalfEncoder(nn.Module):
    """Black-and-white images of 2 x 2 pixels, of which the right column is dark."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.backbone = Half()

    def transform(self, image):
        return image

    def forward(self, images, attention=False, layers=()):
        tokens = self.backbone(images, layers=layers)
        return Features(tokens.patches.mean(1), tokens.patches, None, tokens.grid)


class BlackAndWhite:
    labels = classes = None

    def __len__(self):
        return 2

    def name(self, i):
        return str(i)

    def fingerprint(self):
        return "two"

    def image(self, i):
        picture = torch.zeros(3, 2, 2, dtype=torch.uint8)
        picture[:, 0, 0] = 255  # both images
        picture[:, 1, 0] = 255 * i  # the second only
        return picture


def test_dead_neurons_of_a_constructed_network():
    [layer] = observe(HalfEncoder(), BlackAndWhite(), batch_size=1).neurons
    assert (layer.name, layer.silent, layer.units, layer.channels) == ("act", 1 - 3 / 16, 1 - 2 / 8, 1 - 1 / 2)


def test_ranks_share_the_images(encoder):
    """Sums of two ranks, joined by hand, equal those of one."""

    class Rank:
        size = 2

        def __init__(self, rank, messages):
            self.rank, self.messages = rank, messages

        def gather(self, rows):
            return rows

        def gather_objects(self, value):
            self.messages.append(value)
            return [value]

    messages: list = []
    data = Colors(9, broken=(4,))
    alone = observe(encoder, data, batch_size=2)
    parts = []
    for rank in range(2):
        mine: list = []
        parts.append(observe(encoder, data, world=Rank(rank, mine), batch_size=2))
        messages.append(mine[0])
    from maskwise.evaluation.multi_token.activations import joined

    diversity, neurons = joined(messages)
    assert (
        sorted(torch.cat([part.index for part in parts]).tolist()) == alone.index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    )
    for name in alone.diversity:
        assert diversity[name] == pytest.approx(alone.diversity[name], rel=1e-6)
    for one, both in zip(alone.neurons, neurons):
        assert dataclasses.astuple(both) == pytest.approx(dataclasses.astuple(one))
    assert list(alone.corrupt) == ["4.png"]


def test_encoder_without_layers_is_refused():
    from maskwise.evaluation.features.views import RawPixels

    with pytest.raises(UserError, match="RawPixels has none"):
        observe(RawPixels(8), Colors(2))


# tokens


def test_tokens_of_a_classifier_against_single_images(encoder):
    torch.manual_seed(0)
    network = MAPClassifier(encoder, 3, dim=8, tokens=2, heads=2, gram_groups=1).eval()
    data = Colors(7, broken=(2,))
    single, together, labels = of_classifier(encoder, network, data, batch_size=3)
    readable = [i for i in range(7) if i != 2]
    with torch.no_grad():
        for row, i in enumerate(readable):
            features = encoder.eval()(encoder.transform(data.image(i))[None])
            assert (
                together[row] == network(features)[0].argmax()
                and single[row].tolist() == network.token_logits(features)[0].argmax(1).tolist()
            )
    assert labels.tolist() == [i % 3 for i in readable] and single.shape == (6, 4)


class TwoVectors(nn.Module):
    """An encoder whose pooling gives its vector and noise."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.mean, self.std, self.transform = encoder, encoder.mean, encoder.std, encoder.transform

    def forward(self, images, **asked):
        features = self.encoder(images, **asked)
        noise = torch.sin(1000 * features.pooled)
        features.vectors = torch.stack([features.pooled, noise], dim=1)
        return features


def test_tokens_of_a_pooling_by_knn(encoder):
    model, data = TwoVectors(encoder), sets()
    report = analysis(model, data, parts="tokens", k=5)
    bank, queries = (extract(model, data[role], ("pooled", "vectors")) for role in ("train", "test"))
    noisy = knn_classify(bank["vectors"][:, 1], bank.labels, queries["vectors"][:, 1], 5)[:, 0]
    clean = knn_classify(bank["pooled"], bank.labels, queries["pooled"], 5)[:, 0]
    expected = metrics.token_errors(torch.stack([clean, noisy], 1), clean, queries.labels)
    assert report.numbers == pytest.approx({f"token_{name}": value for name, value in expected.items()})
    assert [y for _, y in report.curves["token_variance"]] == pytest.approx(
        [0.0, 100 * float((noisy != clean).double().mean())]
    )
    with pytest.raises(UserError, match="the training images have none"):
        analysis(model, {"test": data["test"]}, parts="tokens")


def test_vectors_of_a_pooling_that_averages_them():
    model, data = tiny_encoder("map", depth=1), sets(train=9, test=6)
    report = analysis(model, data, parts="tokens", k=3)
    assert len(report.curves["token_error"]) == 8 and model.pooling.reduce == "mean"


# end to end


def test_analysis_end_to_end(encoder, tmp_path):
    data = sets(train=24, test=9)
    report = analysis(encoder, data, ratios=[0.0, 0.5], k=5)
    hidden = masked(encoder, data, preset="map", ratios=[0.0, 0.5], k=5).numbers
    assert {name: report.numbers[f"salient_{name}"] for name in hidden} == hidden
    assert report.curves["salient_high"] == [(0.0, hidden["high_0_top1"]), (50.0, hidden["high_0.5_top1"])]
    observed = observe(encoder, data["test"])
    assert report.numbers["spatial_diversity"] == pytest.approx(np.mean(observed.diversity["spatial"]))
    assert [x for x, _ in report.curves["channel_diversity"]] == [0.0, 0.5, 1.0]
    assert (
        report.protocol["parts"] == ["diversity", "dead", "salient"]
        and "gives no vectors" in report.protocol["left_out"]["tokens"]
    )
    report.save(tmp_path / "analysis.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "analysis.json",
        "analysis_dead.png",
        "analysis_diversity.png",
        "analysis_salient.png",
    ]
    written = json.loads((tmp_path / "analysis.json").read_text())
    assert "pictures" not in written and written["curves"]["dead_units"] == [
        [x, y] for x, y in report.curves["dead_units"]
    ]
    with Image.open(tmp_path / "analysis_diversity.png") as picture:
        assert picture.size == (960, 2 * 540)
    both = analysis(encoder, data, parts=["diversity"], beside=tmp_path / "analysis.json")
    assert not np.array_equal(both.pictures["diversity"], report.pictures["diversity"])  # a second curve with its name
    again = Report.load(tmp_path / "analysis.json")
    assert (
        again.curves["spatial_diversity"] == [list(point) for point in report.curves["spatial_diversity"]]
        and pictures({"a": again}).keys() == report.pictures.keys()
    )


def test_unlabeled_images_allow_only_parts_about_layers():
    report = api.evaluate("analysis", HalfEncoder(), test=BlackAndWhite())
    assert report.protocol["parts"] == ["diversity", "dead"] and set(report.protocol["left_out"]) == {
        "salient",
        "tokens",
        "logits",
    }
    assert EVALUATIONS["analysis"].run is analysis


def test_requested_parts_that_cannot_be_computed_are_refused(encoder):
    data = sets(train=6, test=3)
    for options, words in (
        ({"parts": "color"}, "no part 'color'"),
        ({"parts": ["tokens"]}, "gives no vectors"),
        ({"parts": ["logits"]}, "give a supervised run with classifier map or class_tokens"),
        ({"beside": "nowhere.json"}, "is not a report"),
    ):
        with pytest.raises(UserError, match=words):
            analysis(encoder, data, **options)


def test_given_classifier_scores(encoder):
    torch.manual_seed(0)
    probe = Classifier(encoder, nn.Linear(24, 3), "pooled")
    report = analysis(encoder, {"test": Colors(6)}, classifier=probe, parts=["salient"], ratios=[0.5])
    assert report.protocol["salient"]["classifier"] == "linear probe" and "salient_high_0.5_top1" in report.numbers


@pytest.mark.parametrize(
    "name, options, acts",
    [
        ("seresnet50", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}, 1 + 4 * 3),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 12]}, 4),
    ],
)
def test_stages_and_activations_of_convolutional_networks(name, options, acts):
    from maskwise.nn import POOLINGS, Backbone, Encoder

    torch.manual_seed(0)
    backbone = Backbone(name, image_size=32, **options)
    model, data = Encoder(backbone, POOLINGS["gap"](backbone.dim)), Colors(3, size=32)
    observed = observe(model, data, batch_size=2)
    with evaluating(model), torch.no_grad():
        stages = backbone(images_of(model, data), layers=(0, 1, 2, 3, 4)).stages
    expected = [metrics.feature_variance(stage) for stage in stages]
    assert observed.diversity["channel"] == pytest.approx([variance["channel"] for variance in expected], rel=1e-4)
    assert observed.diversity["spatial"][:4] == pytest.approx(
        [variance["spatial"] for variance in expected][:4], rel=1e-4
    )
    assert len(observed.neurons) == acts and not any(
        ".se." in layer.name for layer in observed.neurons
    )  # gates are not neurons
    assert all(0 <= layer.channels <= layer.units <= layer.silent <= 1 for layer in observed.neurons)
