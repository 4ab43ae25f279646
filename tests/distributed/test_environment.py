"""A launcher's variables: read, or refused in one line."""

import subprocess
import sys

import pytest

import maskwise
from maskwise import cli
from maskwise.distributed.environment import Ranks, local_world_size, read_ranks, world_size
from maskwise.errors import UserError
from support.tiny_sets import Colors, tiny_encoder

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TWO = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
REMEDY = "start with torchrun, which sets it, or unset WORLD_SIZE for a single process"


@pytest.fixture
def set_variables(monkeypatch):
    """Set exactly these of a launcher's variables."""

    def variables(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return variables


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Ranks()),
        ({"WORLD_SIZE": "", "RANK": ""}, Ranks()),
        ({"WORLD_SIZE": "1", "RANK": "x", "LOCAL_RANK": "5"}, Ranks()),
        (TWO, Ranks(1, 2, 1)),
        ({**TWO, "LOCAL_RANK": "0"}, Ranks(1, 2, 0)),
    ],
)
def test_ranks(set_variables, values, expected):
    set_variables(**values)
    assert read_ranks() == expected and world_size() == expected.size


def test_ranks_of_this_machine(set_variables):
    set_variables()
    assert local_world_size(8) == 8
    set_variables(LOCAL_WORLD_SIZE="4")
    assert local_world_size(8) == 4


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a whole number of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a whole number of at least 1"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE=² is not a whole number of at least 1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set"),
        ({**TWO, "MASTER_ADDR": ""}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({**TWO, "RANK": "2"}, "RANK=2 is not a whole number from 0 to 1"),
        ({**TWO, "RANK": "-1"}, "RANK=-1 is not a whole number from 0 to 1"),
        ({**TWO, "LOCAL_RANK": "a"}, "LOCAL_RANK=a is not a whole number of at least 0"),
        ({**TWO, "MASTER_PORT": "node1:29500"}, "MASTER_PORT=node1:29500 is not a whole number from 1 to 65535"),
    ],
)
def test_other_values_are_refused(set_variables, values, text):
    set_variables(**values)
    with pytest.raises(UserError) as caught:
        read_ranks()
    assert str(caught.value) == f"{text}: {REMEDY}"


def test_commands_and_evaluations_refuse_them_in_one_line(set_variables, capfd, tmp_path):
    line = f"WORLD_SIZE=two is not a whole number of at least 1: {REMEDY}"
    set_variables(WORLD_SIZE="two")
    assert cli.main(["train", "debug/tiny", "--out", str(tmp_path / "run")]) == 2
    assert capfd.readouterr().err == f"maskwise: {line}\n" and list(tmp_path.iterdir()) == []
    with pytest.raises(UserError) as caught:
        maskwise.evaluate("knn", tiny_encoder(), train=Colors(6), test=Colors(6, seed=1), k=(1,))
    assert str(caught.value) == line


def test_reading_imports_no_torch():
    program = "import sys, maskwise.distributed.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
