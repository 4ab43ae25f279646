"""Two gloo ranks give the features of one process bit for bit, and the probes' numbers."""

import json

import pytest
import torch

from support import pair

NAMES = ("pooled", "cls2", "patches")
PROBES = {
    "knn": ("knn", {"k": [5], "batch_size": 8}),
    "linear": ("linear", {"augment": False, "epochs": 6, "batch_size": 16, "lr": [0.5, 5.0], "feature_batch": 8}),
    "linear on crops": ("linear", {"epochs": 2, "batch_size": 16, "lr": 5.0, "feature_batch": 8}),
    "logistic": ("logistic", {"penalty": [0.1], "batch_size": 8}),
    "attentive": ("attentive", {"epochs": 3, "batch_size": 16, "warmup_epochs": 1, "lr": 0.2}),
    "clustering": ("clustering", {"batch_size": 8}),
    "masked": ("masked", {"ratios": [0.5], "modes": ["high", "random"], "k": 5, "batch_size": 8}),
    "recall": ("recall", {"ks": [1, 5], "batch_size": 8}),
    "retrieval": ("retrieval", {"long_side": 16}),
    "copies": ("copy_detection", {"batch_size": 8}),
    "finetune": ("finetune", {"epochs": 2, "batch_size": 16, "warmup_epochs": 0, "lr": 5e-3, "repeats": 1}),
}  # fmt: skip


def measure(world, folder):
    """Return features, those of a cache, and the numbers of the probes, as computed by one rank."""
    from maskwise.evaluation import EVALUATIONS
    from maskwise.evaluation.features import cache, extract
    from support.tiny_sets import Colors, sets, tiny_encoder

    default, cache.PART = cache.PART, 8
    encoder, data = tiny_encoder("simpool", class_token=True), Colors(45, broken=(3, 8, 9, 10, 11, 12, 13, 14, 15))
    plain = extract.extract(encoder, data, NAMES, world=world, batch_size=8)
    cached = [
        extract.extract(encoder, data, NAMES, world=world, batch_size=8, cache=folder / "cache") for _ in range(2)
    ]
    cache.PART = default
    features = {
        f"{kind}/{name}": bank[name].clone()
        for kind, bank in (("plain", plain), ("cold", cached[0]), ("warm", cached[1]))
        for name in NAMES
    }
    features["index"] = plain.index
    truth = [
        {"bbx": torch.tensor([0.0, 0.0, 16.0, 16.0]), "easy": [i, i + 6], "hard": [i + 12], "junk": []}
        for i in range(6)
    ]
    others = {
        "retrieval": {"query": Colors(6), "database": Colors(20, seed=1, broken=(5,)), "ground_truth": truth},
        "copies": {
            "database": Colors(12, classes=12),
            "copies": {"strong": Colors(12, classes=12, seed=2, broken=(5,))},
        },
    }
    reports = {
        name: EVALUATIONS[row](encoder, others.get(name) or sets(48, 30, broken=(5,)), world, **options)
        for name, (row, options) in PROBES.items()
    }
    numbers = {name: report.numbers for name, report in reports.items()}
    return features, {
        **numbers,
        "origins": [bank.origin for bank in cached],
        "corrupt": sorted(plain.corrupt),
        "unread": {name: sorted(report.corrupt) for name, report in reports.items()},
    }


def rank(folder):
    """Run one of the two processes."""
    from pathlib import Path

    from maskwise.distributed.world import World

    torch.set_num_threads(1)
    world, folder = World.start("cpu"), Path(folder)
    features, numbers = measure(world, folder)
    torch.save(features, folder / f"features_{world.rank}.pt")
    (folder / f"numbers_{world.rank}.json").write_text(json.dumps(numbers))
    world.close()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    pair.end(pair.start("-c", f"from evaluation.test_ranks import rank; rank({str(folder)!r})"))
    alone = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = measure(None, alone)
    torch.set_num_threads(threads)
    return whole, [
        (
            torch.load(folder / f"features_{r}.pt", weights_only=True),
            json.loads((folder / f"numbers_{r}.json").read_text()),
        )
        for r in (0, 1)
    ]


def test_features_bit_for_bit(both):
    (whole, numbers), ranks = both
    for features, by_rank in ranks:
        assert features.keys() == whole.keys() and all(torch.equal(features[name], whole[name]) for name in whole)
        assert (
            by_rank["origins"]
            == numbers["origins"]
            == [dict.fromkeys(NAMES, "computed"), dict.fromkeys(NAMES, "cached")]
        )
        assert by_rank["corrupt"] == numbers["corrupt"] and len(by_rank["corrupt"]) == 9
        assert by_rank["unread"] == numbers["unread"] == dict.fromkeys(PROBES, ["5.png"])


@pytest.mark.parametrize("name", PROBES)
def test_numbers(both, name):
    (_, alone), ranks = both
    for _, by_rank in ranks:
        assert by_rank[name] == pytest.approx(json.loads(json.dumps(alone[name])), abs=1e-3, nan_ok=True)
