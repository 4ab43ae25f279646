"""`maskwise bench cost` against Table 8 of the SimPool paper and counts by hand."""

import json

import pytest

from maskwise.bench import cost
from maskwise.cli.main import main
from maskwise.nn import POOLINGS


@pytest.fixture(scope="module")
def costs():
    return cost.run(cost.parser(make_parser).parse_args(["--poolings", "cls,gap,cait,slot,ge,simpool"]))["networks"]


def make_parser(prog, description):
    import argparse

    return argparse.ArgumentParser(prog, description=description)


def test_parameters_of_table_8(costs):
    for rows in costs.values():
        for row in rows:
            if row["published"] and row["parameters"] != 14_844_456:  # ResNet-18 with CaiT is printed with two blocks
                assert row["parameters"] / 1e6 == pytest.approx(row["published"][0], abs=0.0501), row
    exact = {(name, row["pooling"]): row["parameters"] for name, rows in costs.items() for row in rows}
    assert (
        exact["resnet18", "simpool"] == 12_214_824
        and exact["resnet50", "simpool"] == 33_949_736
        and exact["convnext_small", "simpool"] == 51_404_872
    )
    assert (
        exact["vit_small_patch16_224", "simpool"] == 22_345_576 and exact["vit_small_patch16_224", "cls"] == 22_050_664
    )


def test_multiply_adds_of_table_8(costs):
    for name, rows in costs.items():
        base = next(row for row in rows if row["pooling"] == ("cls" if "vit" in name else "gap"))
        for row in rows:
            if row["published"]:
                assert row["multiply_adds"] / 1e9 == pytest.approx(row["published"][1], rel=0.016), (
                    name,
                    row,
                )  # the paper counts batch norms, too
                added, printed = (
                    (row["multiply_adds"] - base["multiply_adds"]) / 1e9,
                    row["published"][1] - base["published"][1],
                )
                assert added == pytest.approx(printed, abs=0.013 if "vit" not in name else 0.035), (
                    name,
                    row,
                )  # two roundings; the paper's ViT may keep its class token


@pytest.mark.parametrize(
    "name, dim, count",
    [("resnet18", 512, 49), ("resnet50", 2048, 49), ("convnext_small", 768, 49), ("vit_small_patch16_224", 384, 196)],
)
def test_pooling_alone(costs, name, dim, count):
    rows = {row["pooling"]: row for row in costs[name]}
    simpool = rows["simpool"]
    assert simpool["pooling_multiply_adds"] == pytest.approx(dim**2 * (count + 1) + 2 * count * dim, rel=0.002)
    assert simpool["pooling_multiply_adds_here"] == 2 * dim**2 + 2 * count * dim
    assert (
        rows["cait"]["pooling_multiply_adds"] == dim**2 * (2 * (count + 1) + 10) + 2 * 4 * (count + 1) * dim
    )  # four heads as four queries
    assert rows["slot"]["pooling_multiply_adds"] == dim**2 * (2 * count + 3 * 3 * 9) + 3 * 3 * 2 * count * dim
    assert rows["gap"]["pooling_parameters"] == 0


def test_every_pooling_is_counted_as_the_command_does_by_default():
    rows = cost.run(cost.parser(make_parser).parse_args(["--networks", "vit_tiny_patch16_224", "--size", "64"]))[
        "networks"
    ]["vit_tiny_patch16_224"]
    assert [row["pooling"] for row in rows] == list(POOLINGS)
    bare = 5_717_416 - 192 - (197 - 16) * 192  # ViT-T/16 without the class token, and the positions of 64 px
    assert {row["parameters"] - row["pooling_parameters"] for row in rows if row["pooling"] != "cls"} == {bare}
    assert {row["pooling"] for row in rows if row["pooling_multiply_adds_here"] == 0} >= {"cls", "gap", "max"}


def test_the_command(tmp_path, capsys):
    file = tmp_path / "cost.json"
    assert (
        main(
            [
                "bench",
                "cost",
                "--networks",
                "resnet18",
                "--poolings",
                "gap,simpool",
                "--size",
                "64",
                "--classes",
                "10",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "resnet18, 64 px, 10 classes" in shown and "simpool" in shown
    assert [row["pooling"] for row in json.loads(file.read_text())["networks"]["resnet18"]] == ["gap", "simpool"]
    for words, text in (
        (["--poolings", "gem9"], "no pooling 'gem9'; there are cls, simpool"),
        (["--size", "0"], "a size of at least 1"),
        (["--networks", "resnet19"], "timm has no model 'resnet19'"),
    ):
        assert main(["bench", "cost", *words]) == 2
        assert text in capsys.readouterr().err


def test_recipes_with_throughput(tmp_path, capsys):
    file = tmp_path / "cost.json"
    words = "bench cost --recipes debug/tiny_supervised,debug/tiny backbone.depth=1 --classes 10 --size 48"
    assert main([*words.split(), *f"--throughput --batch 3 --seconds 0 --device cpu --json {file}".split()]) == 0
    shown, result = capsys.readouterr().out, json.loads(file.read_text())
    rows = result["tables"]["recipes"]
    assert [row["label"] for row in rows] == ["debug/tiny_supervised", "debug/tiny"] and "networks" not in result
    assert all(row["overrides"] == ["backbone.depth=1"] and row["size"] == [48, 48] for row in rows)
    simpool, classifier, tokens = 2 * 48**2 + 2 * 48, 49 * 10, 3 * 48  # class token, its position, mask token
    assert rows[0]["parameters"] - rows[1]["parameters"] == simpool + classifier - tokens
    assert all(row["images_per_second"] > 0 for row in rows)
    assert (result["throughput"]["batch"], result["throughput"]["precision"]) == (3, "fp32")
    assert "debug/tiny_supervised" in shown and "float32, batch 3" in shown


def test_poolings_with_throughput(capsys):
    words = "bench cost --networks vit_tiny_patch16_224 --poolings cls,gap --size 32 --throughput --batch 1 --seconds 0"
    assert main(words.split()) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[-1] == "images/s" and all(float(line.split()[-1]) > 0 for line in shown[3:5])


def test_speeds_are_relative_to_the_first_row():
    def row(label, images, published):
        printed = {"images_per_second": published, "parameters_m": 25.6, "multiply_adds_g": None, "top1": 77.0}
        return {
            "label": label,
            "size": [224, 192],
            "parameters": 25_557_032,
            "multiply_adds": 4_089_000_000,
            "images_per_second": images,
            "published": printed,
        }

    lines = cost.table_text(
        "map9", [row("GAP", 50.0, 3334), row("MAP", 40.0, 2819), row("own", 20.0, None)]
    ).splitlines()
    assert lines[0] == "map9" and lines[1].split("  ")[0] == "network"
    assert lines[3].split() == ["GAP", "224x192", "25.56", "4.089", "25.6", "-", "77.0", "50", "20", "1", "3334", "1"]
    assert lines[4].split() == [
        "MAP",
        "224x192",
        "25.56",
        "4.089",
        "25.6",
        "-",
        "77.0",
        "40",
        "25",
        "0.8",
        "2819",
        "0.846",
    ]
    assert lines[5].split()[-5:] == ["20", "50", "0.4", "-", "-"]


def test_a_figure_is_counted_at_several_sizes(monkeypatch):
    calls = []
    monkeypatch.setattr(cost, "row_cost", lambda row, size, classes, timing: calls.append((row.label, size)) or {})
    options = cost.parser(make_parser).parse_args(["--tables", "map7d,map8"])
    assert list(cost.run(options)["tables"]) == ["map7d", "map8"]
    assert calls[:4] == [("GAP", 160), ("CAP", 160), ("MAP", 160), ("GAP", 192)]
    assert len(calls) == 15 + 4 and calls[15:17] == [("ViT-S", None), ("ViT-style MAP", None)]


@pytest.mark.parametrize(
    "words, text",
    [
        ("--tables map2", "no table 'map2'; there are map1, map3"),
        ("classifier.groups=1", "classifier.groups=1 changes a recipe, and none is given"),
        ("--throughput --batch 0", "a batch of at least 1"),
        ("--recipes map/resnet51", "map/resnet51"),
    ],
)
def test_wrong_words(words, text, capsys):
    assert main(["bench", "cost", *words.split()]) == 2
    assert text in capsys.readouterr().err
