"""A sample of the planted faults is detected by the tests listed for them (see mutants.py)."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

import mutants

IN_THIS_SUITE = 24  # faults; `python tests/mutants.py` plants all of them


@pytest.fixture(scope="module")
def verdicts(request):
    """Results of the selected faults, run in parallel on all cores: most of a trial is the import of torch."""
    selected = [
        item.callspec.params["name"]
        for item in request.session.items
        if hasattr(item, "callspec") and item.originalname == "test_planted_fault_is_detected"
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(mutants.verdict, mutants.MUTANTS[name]) for name in selected}


@pytest.mark.slow
@pytest.mark.parametrize("name", mutants.sampled(IN_THIS_SUITE, seed=len(mutants.MUTANTS)))
def test_planted_fault_is_detected(name, verdicts):
    assert verdicts[name].result() == "caught"


def test_every_fault_can_be_planted():
    for mutant in mutants.MUTANTS.values():
        text = (mutants.ROOT / mutants.PACKAGE / mutant.file).read_text()
        assert [text.count(before) for before in mutant.changes] == [1] * len(mutant.changes), mutant
        for path in mutant.paths:
            assert (mutants.ROOT / path).exists(), path


@pytest.mark.slow
def test_tests_of_every_fault_are_collected_in_a_copy(tmp_path):
    mutants.copied(tmp_path)
    paths = {path for mutant in mutants.MUTANTS.values() for path in mutant.paths}
    run = mutants.tests_of(tmp_path, "--collect-only", *sorted(paths))
    assert run.returncode == 0, run.stdout[-2000:]


def test_a_sample_is_repeated_by_its_printed_seed(monkeypatch, capsys):
    monkeypatch.setattr(mutants, "verdict", lambda mutant: "caught" if mutant.changes else "SURVIVED")
    assert mutants.main(["--sample", "5"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    seed = first.rpartition(" ")[2]
    assert first == f"5 of {len(mutants.MUTANTS)} faults, seed {seed}" and lines[-1] == "5 of 5 caught"
    assert [line.rpartition(":")[0] for line in lines[:-1]] == mutants.sampled(5, int(seed))
    assert mutants.main(["--sample", "5", "--seed", seed]) == 0
    assert capsys.readouterr().out.splitlines() == [first, *lines]
    assert set(mutants.sampled(10**6, 1)) == set(mutants.MUTANTS) and mutants.sampled(5, 1) != mutants.sampled(5, 2)


def test_the_script_of_tests_refuses_a_sample_without_a_number():
    for words in (["--mutants"], ["--mutants", "tests/nn"], ["--mutants", "0"]):
        run = subprocess.run(["bash", "launch/test.sh", *words], cwd=mutants.ROOT, capture_output=True, text=True)
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and "such as --mutants 10" in run.stderr
