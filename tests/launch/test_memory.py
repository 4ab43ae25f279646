"""Bytes by option: each saves what it says, and a larger batch counted is the one foretold."""

import json

from launch.reproduce import memory


def test_memory_options_save_and_predictions_match(tmp_path, capsys):
    out = tmp_path / "memory.json"
    words = ["debug/tiny", "masking=none", "--batch", "8", "--counted", "2", "--json", str(out)]
    assert memory.main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    none, lean, blocks = (rows[f"{name}, accumulate 1"] for name in ("none", "elementwise", "blocks"))
    assert none["activations"] > lean["activations"] > blocks["activations"] > 0
    assert (
        rows["none, accumulate 4"]["activations"] < none["activations"]
        and rows["none, accumulate 4"]["weights"] == none["weights"]
    )
    assert none["total"] == sum(value for kind, value in none.items() if kind != "total")
    direct = memory.measure("debug/tiny", ["masking=none"], batch=8, counted=4)["rows"]["none, accumulate 1"]
    assert abs(direct["activations"] / none["activations"] - 1) < 0.02 and direct["crops"] == none["crops"]
    assert "accumulate 2" in capsys.readouterr().out
