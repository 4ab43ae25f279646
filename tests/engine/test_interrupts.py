"""Being told to stop: when, by what, and before the first step."""

import os
import signal

import pytest
from engine.test_loop import lines, run, same

from maskwise.engine.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_was_asked_outside_is_known_inside(number):
    before = signal.getsignal(number)
    with Interrupts(ctrl_c=False) as outer:
        with Interrupts() as inner:
            assert not inner.asked
        os.kill(os.getpid(), number)
        assert outer.asked
        with Interrupts() as inner:
            assert inner.asked
    assert signal.getsignal(number) == before


def test_ctrl_c_can_be_left_alone():
    with Interrupts(ctrl_c=False), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked


def test_a_run_told_to_stop_before_it_began_does_nothing_and_can_be_begun(tmp_path):
    whole, told = tmp_path / "whole", tmp_path / "told"
    whole.mkdir(), told.mkdir()
    _, one = run(whole)
    with Interrupts(ctrl_c=False):
        os.kill(os.getpid(), signal.SIGTERM)
        result, _ = run(told, stream=lambda start: pytest.fail("a step was made"))
    assert result == {"status": "preempted", "step": 0, "skipped": 0}
    assert (told / "preempted").read_text() == "0\n" and not (told / "checkpoints").exists()
    result, two = run(told)
    assert result["status"] == "complete" and same(one, two) and lines(whole) == lines(told) and not (told / "preempted").exists()


def test_the_command_listens_while_it_reads_its_recipe(tmp_path, monkeypatch, capfd):
    from maskwise import cli, recipe

    read = recipe.read_recipe

    def told(*words):
        os.kill(os.getpid(), signal.SIGUSR1)
        return read(*words)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "read_recipe", told)
        assert cli.main(["train", "debug/tiny", "--out", str(tmp_path / "run")]) == 0
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted: nothing was done yet; the same command continues"
    assert (tmp_path / "run" / "preempted").read_text() == "0\n" and not (tmp_path / "run" / "checkpoints").exists()
