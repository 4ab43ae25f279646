"""Stop signals: before, during and outside the training loop."""

import os
import signal

import pytest

from engine.test_loop import run, same_state
from maskwise.engine.signals import Stopped, StopSignals, stop_at_once
from support.run_contents import untimed_lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signal_received_before_the_loop_is_seen_inside(number):
    before = signal.getsignal(number)
    with StopSignals(ctrl_c=False) as outer:
        with StopSignals() as inner:
            assert not inner.asked
        os.kill(os.getpid(), number)
        assert outer.asked
        with StopSignals() as inner:
            assert inner.asked
    assert signal.getsignal(number) == before


def test_ctrl_c_handler_can_be_left_unchanged():
    with StopSignals(ctrl_c=False), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with StopSignals() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_signal_during_a_step_saves_that_step(tmp_path, number):
    result, _ = run(tmp_path, on_batch=lambda step: os.kill(os.getpid(), number) if step == 5 else None)
    assert result == {"status": "preempted", "step": 6, "skipped": 0}
    assert (tmp_path / "checkpoints" / "last").read_text() == "step_00000006\n"


def test_second_ctrl_c_interrupts_at_once():
    for first in (signal.SIGINT, signal.SIGTERM):
        with StopSignals() as signals:
            signal.raise_signal(first)
            assert signals.asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


@pytest.fixture
def nohup():
    """Ignore SIGHUP, as a process that nohup started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_process_of_nohup_continues_to_ignore_a_hangup(nohup):
    with StopSignals() as signals, stop_at_once():
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_commands_end_at_once_and_clean_up(number):
    before, cleaned = signal.getsignal(number), []
    with pytest.raises(Stopped) as stopped, stop_at_once():
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)
    assert stopped.value.number == number and cleaned and signal.getsignal(number) == before


def test_worker_processes_end_as_usual():
    with stop_at_once():
        worker = os.fork()
        if not worker:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM


def test_run_stopped_before_its_first_step_writes_nothing_and_can_be_started(tmp_path):
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    uninterrupted.mkdir(), interrupted.mkdir()
    _, expected = run(uninterrupted)
    with StopSignals(ctrl_c=False):
        os.kill(os.getpid(), signal.SIGTERM)
        result, _ = run(interrupted, stream=lambda start: pytest.fail("a step was taken"))
    assert result == {"status": "preempted", "step": 0, "skipped": 0}
    assert (interrupted / "preempted").read_text() == "0\n" and not (interrupted / "checkpoints").exists()
    result, resumed = run(interrupted)
    assert (
        result["status"] == "complete"
        and same_state(expected, resumed)
        and untimed_lines(uninterrupted) == untimed_lines(interrupted)
        and not (interrupted / "preempted").exists()
    )


def test_command_handles_signals_while_reading_its_recipe(tmp_path, monkeypatch, capfd):
    from maskwise import cli
    from maskwise.recipe import reading

    read = reading.read_recipe

    def read_after_signal(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_recipe", read_after_signal)
        assert cli.main(["train", "debug/tiny", "--out", str(tmp_path / "run")]) == 0
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted: no step was done yet; the same command continues"
    assert (tmp_path / "run" / "preempted").read_text() == "0\n" and not (tmp_path / "run" / "checkpoints").exists()
