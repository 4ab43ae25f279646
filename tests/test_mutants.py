"""Every planted fault is noticed by the tests named beside it (see mutants.py)."""

import os
from concurrent.futures import ThreadPoolExecutor

import mutants
import pytest


@pytest.fixture(scope="module")
def verdicts(request):
    """What becomes of each fault that is asked for, as many tried at a time as there are cores: most of a trial is the import of torch."""
    asked = [item.callspec.params["name"] for item in request.session.items if hasattr(item, "callspec") and item.originalname == "test_a_planted_fault_is_noticed"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(mutants.verdict, mutants.MUTANTS[name]) for name in asked}


@pytest.mark.slow
@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_planted_fault_is_noticed(name, verdicts):
    assert verdicts[name].result() == "caught"


def test_every_fault_can_be_planted():
    for mutant in mutants.MUTANTS.values():
        text = (mutants.ROOT / mutants.PACKAGE / mutant.file).read_text()
        assert [text.count(before) for before in mutant.changes] == [1] * len(mutant.changes), mutant
        for path in mutant.tests.partition(" -k ")[0].split():
            assert (mutants.ROOT / path).exists(), path
