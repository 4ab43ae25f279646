"""Traffic of a step and predicted efficiency by hand, and the tables for the page against their own sources."""

import json
import math

import pytest

from launch.reproduce import number_sources
from launch.reproduce.growth import __main__ as growth
from launch.reproduce.growth import efficiency, tables, traffic, weak_scaling
from launch.reproduce.growth.traffic import Collective, Volume
from launch.reproduce.page_numbers import PAGES, checked_page
from maskwise.build.networks import method as build_method
from maskwise.distributed.world import World
from maskwise.errors import UserError
from maskwise.recipe.reading import read_recipe

K, D, d, HIDDEN, PATCHES, LAYERS = 64, 48, 16, 64, 16, 2  # debug/tiny
MLP = D * HIDDEN + HIDDEN + HIDDEN * HIDDEN + HIDDEN + HIDDEN * d + d
BLOCK = 12 * D * D + 13 * D
EMBEDDING = D + (PATCHES + 1) * D + D + (3 * 64 * D + D)  # class token, positions, mask token, patches of 8 x 8
TRAINABLE = EMBEDDING + LAYERS * BLOCK + 2 * D + MLP + K * d + K
LINK = efficiency.Interconnect("made up", 100e9, 0.0)
NO_LATENCY = efficiency.Assumptions(rate=1.0, backward=0.5, call=0.0, nvlink_hop=0.0)


def step(ranks, *words, **options):
    recipe = read_recipe("debug/tiny", *words, try_model=False)
    return traffic.step_traffic(recipe, build_method(recipe, World(), "fp32"), ranks, **options)


def test_bucket_is_closed_by_the_gradient_that_reaches_its_limit():
    assert traffic.bucket_sizes([4, 4, 4, 20, 10, 3], (10, 25)) == [12, 30, 3]
    assert traffic.bucket_sizes([10, 25], (10, 25)) == [10, 25]
    assert traffic.bucket_sizes([1, 2], (10, 25)) == [3] and traffic.bucket_sizes([]) == []


def test_traffic_of_ibot_with_centers():
    assert step(4, loop=True) == {
        Collective("centers", "all_reduce", 4): Volume(1, 2 * d * 4),
        Collective("gradients", "all_reduce", 4): Volume(1, 4 * TRAINABLE),
        Collective("non-finite steps", "all_reduce", 4): Volume(1, 3 * 8),
        Collective("stop signal", "all_reduce", 4): Volume(1, 8),
    }
    assert step(1, loop=True) == {}


def test_traffic_of_sinkhorn_knopp_grows_with_the_head():
    key = Collective("Sinkhorn-Knopp", "all_reduce", 2)
    assert step(2, "method=dino", "masking=none", "method.targets=sinkhorn")[key] == Volume(6, 72 * K)
    both = step(2, "method.targets=sinkhorn", "head.patch_prototypes=100", "method.patch_loss=token")
    assert both[key] == Volume(12, 72 * (K + 100))
    assert both[Collective("number of patches", "all_reduce", 2)] == Volume(1, 4)


def test_koleo_sends_the_features_of_all_ranks():
    made = step(2, "method.koleo=0.1", "train.batch_size=12", "train.accumulate=3")
    assert made[Collective("KoLeo", "all_reduce", 2)] == Volume(1, 2 * 12 * D * 4)
    assert made[Collective("centers", "all_reduce", 2)] == Volume(3, 3 * 2 * d * 4)


def test_traffic_of_sharded_weights():
    made = step(4, "speed.shard=fsdp", "method=dino", "masking=none")
    rows = [1, (PATCHES + 1), 1]  # of dimension one: a rank holds them, the others padding
    padding = 4 * 3 * D * (rows[0] + rows[1])
    others = 4 * (EMBEDDING - D + 2 * D + MLP + K * d + K)  # no mask token
    assert made[Collective("gradients", "reduce_scatter", 4)] == Volume(3, 4 * LAYERS * BLOCK + others + padding)
    gathers = LAYERS * (1 + 2 * 2) + 1  # teacher, student twice forward and backward, prefetched
    weights = gathers * 4 * BLOCK + 2 * (others + padding)
    assert made[Collective("weights", "all_gather", 4)] == Volume(gathers + 1, weights)
    packed = step(4, "speed.shard=fsdp", "method=dino", "masking=none", packed=True)
    assert packed[Collective("weights", "all_gather", 4)].calls == gathers + 1 - 2 * LAYERS
    both = step(4, "speed.shard=hsdp", "method=dino", "masking=none", nodes=2)
    reduced = both[Collective("gradients", "reduce_scatter", 2)]
    assert both[Collective("gradients", "all_reduce", 2)] == Volume(reduced.calls, reduced.bytes // 2)


def test_rows_are_padded_to_a_multiple_of_the_shards():
    import torch

    assert traffic.padded_bytes([torch.zeros(5, 3), torch.zeros(8)], 4) == 8 * 3 * 4 + 8 * 4


def test_ring_sends_twice_the_payload_of_an_all_reduce():
    made = {Collective("a", "all_reduce", 4): Volume(1, 800), Collective("b", "all_gather", 2): Volume(1, 80)}
    assert traffic.wire_bytes(made) == 2 * 3 / 4 * 800 + 1 / 2 * 80


def test_batch_norm_is_not_counted():
    recipe = read_recipe("debug/tiny", "head.norm=batch", try_model=False)
    with pytest.raises(UserError, match="batch norm"):
        traffic.step_traffic(recipe, build_method(recipe, World(), "fp32"), 2)


def test_seconds_of_a_collective():
    assumed = efficiency.Assumptions(rate=0.8, call=1e-5, nvlink_hop=1e-6)
    hdr = efficiency.INTERCONNECTS["HDR"]
    seconds = efficiency.collective_seconds(1e9, Collective("a", "all_reduce", 16), hdr, assumed)
    assert seconds == pytest.approx(2 * 15 / 16 * 1e9 / 160e9 + 2 * (3 * 1e-6 + 5e-6) + 1e-5)
    seconds = efficiency.collective_seconds(1e9, Collective("a", "all_gather", 8), hdr, assumed)
    assert seconds == pytest.approx(7 / 8 * 1e9 / 360e9 + 3 * 1e-6 + 1e-5)


def test_one_bucket_overlaps_nothing_and_many_leave_the_last():
    recipe = read_recipe("debug/tiny", try_model=False)
    method = build_method(recipe, World(), "fp32")
    made = efficiency.predict(recipe, method, 16, LINK, 1e-3, NO_LATENCY)
    assert efficiency.buckets(method) == [(4 * TRAINABLE, 1.0)]
    seconds = 2 * 15 / 16 * (4 * TRAINABLE + 2 * d * 4 + 3 * 8) / 100e9
    assert made["exposed_ms"] == pytest.approx(1e3 * seconds)
    assert made["efficiency"] == made["efficiency_without_overlap"] == pytest.approx(1e-3 / (1e-3 + seconds))

    recipe = read_recipe(
        "debug/tiny", "head.hidden=2048", "head.bottleneck=256", "head.prototypes=2048", try_model=False
    )
    method = build_method(recipe, World(), "fp32")
    (first, early), *middle, (last, end) = efficiency.buckets(method)
    assert (
        early == 0.0
        and end == 1.0
        and first + last + sum(size for size, _ in middle)
        == 4 * sum(weight.numel() for weight in traffic.trainable(method))
    )
    made = efficiency.predict(recipe, method, 16, LINK, 1.0, NO_LATENCY)  # a slow step
    assert made["exposed_ms"] == pytest.approx(1e3 * 2 * 15 / 16 * last / 100e9 + made["others_ms"])
    made = efficiency.predict(recipe, method, 16, LINK, 1e-9, NO_LATENCY)  # no time to overlap with
    assert made["exposed_ms"] == pytest.approx(made["gradients_ms"] + made["others_ms"], rel=1e-3)
    assert made["stop_signal_on_host_ms"] == pytest.approx(2 * 15 * 0.05)


def test_efficiency_is_predicted_for_ddp_only():
    recipe = read_recipe("debug/tiny", "speed.shard=fsdp", try_model=False)
    with pytest.raises(UserError, match="DDP"):
        efficiency.predict(recipe, build_method(recipe, World(), "fp32"), 16, LINK, 1e-3, NO_LATENCY)


def mistakes(table, name, result, monkeypatch, folder):
    """Return what the check of the pages says about a table and its sources."""
    (folder / name).write_text(json.dumps(result))
    monkeypatch.setattr(number_sources, "RESULTS", folder)
    number_sources.content.cache_clear()
    monkeypatch.setitem(PAGES, "docs/page.md", ("table", None))
    return checked_page(f"# A page\n\n## Section\n\n[raw](results/{name})\n\n{table}\n", "docs/page.md")[1]


def test_predict_prints_tables_whose_numbers_have_sources(tmp_path, monkeypatch, capsys):
    out = tmp_path / "one.json"
    assert growth.main(["predict", "debug/tiny", "--step-ms", "5", "--batch", "4", "--json", str(out)]) == 0
    assert "NDR" in capsys.readouterr().out
    result = json.loads(out.read_text())
    case = result["cases"]["debug/tiny"]
    assert case["gradients_bytes"] == 4 * TRAINABLE and case["others_bytes"] == 2 * d * 4 + 3 * 8
    assert case["efficiency"].keys() == {f"{link}, 5 ms" for link in ("NVLink 4", *efficiency.INTERCONNECTS)}
    rates = [row["efficiency"] for row in case["efficiency"]["25 GbE, 5 ms"].values()]
    assert len(rates) == 6 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < rates[0] < 1
    page = tables.predicted_page(result, "one.json")
    assert mistakes(page, "one.json", result, monkeypatch, tmp_path) == []
    assert mistakes(page.replace("5 ms |", "5 ms | 7", 1), "one.json", result, monkeypatch, tmp_path) != []


def turn(ranks, wall):
    """Return what the ranks of a turn print."""
    rows = [{"wall": wall, "cpu": 2.0, "main_thread_cpu": 1.9, "gradients_wait": 0.01, "others_wait": 0.001}] * 2
    equal = [{"purpose": "gradients", "bytes": 5}]
    one = {
        "steps": rows,
        "loopback_bytes": 1e6,
        "counted": equal,
        "formula": equal,
        "payload_bytes": 9,
        "ring_bytes": 8,
    }
    return [one] * ranks


def test_measure_takes_turns_and_leaves_wall_times_of_shared_cores_out(tmp_path, monkeypatch):
    order = []

    def start(ranks, *settings):
        order.append(ranks)
        return turn(ranks, 2.0 * ranks)

    monkeypatch.setattr(weak_scaling, "start", start)
    monkeypatch.setattr(weak_scaling, "usable_cores", lambda: [0, 1])
    result = weak_scaling.measure(["debug/tiny"], [1, 2, 4], 2, 1, 2)
    assert order == [1, 2, 4, 4, 2, 1]
    two, four = result["ranks"]["2"], result["ranks"]["4"]
    assert two["efficiency"] == 0.5 and two["steps"] == 8 and two["counted_equals_formula"]
    assert four["efficiency"] is None and four["cpu_efficiency"] == 1.0 and four["wall"] == 8.0
    table = tables.measured(result, "two.json")
    assert "8.00" not in table and mistakes(table, "two.json", result, monkeypatch, tmp_path) == []


@pytest.mark.slow
def test_measure_runs_ranks(tmp_path, capsys):
    out = tmp_path / "growth.json"
    words = ["measure", "debug/tiny", "--ranks", "1", "2", "--steps", "2", "--turns", "1", "--batch", "4"]
    assert growth.main([*words, "--json", str(out)]) == 0
    ranks = json.loads(out.read_text())["ranks"]
    assert all(row["counted_equals_formula"] for row in ranks.values())
    assert ranks["1"]["payload_bytes"] == 0 and ranks["2"]["payload_bytes"] == 4 * TRAINABLE + 2 * d * 4 + 3 * 8
    assert all(math.isfinite(row["cpu"]) and row["cpu"] > 0 for row in ranks.values())
    sent = ranks["2"]["loopback_bytes"]
    assert sent is None or sent > ranks["2"]["ring_bytes"]  # other programs and headers add to it
