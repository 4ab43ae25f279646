"""Every planted fault is noticed by the tests named beside it (see mutants.py)."""

import mutants
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_planted_fault_is_noticed(name):
    assert mutants.verdict(mutants.MUTANTS[name]) == "caught"


def test_every_fault_can_be_planted():
    for mutant in mutants.MUTANTS.values():
        text = (mutants.ROOT / mutants.PACKAGE / mutant.file).read_text()
        assert [text.count(before) for before in mutant.changes] == [1] * len(mutant.changes), mutant
        for path in mutant.tests.partition(" -k ")[0].split():
            assert (mutants.ROOT / path).exists(), path
