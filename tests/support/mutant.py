"""A fault that is planted in a copy of the package."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault: each key of `changes` in `file` is replaced by its value; one of `tests` must fail."""

    file: str
    changes: dict[str, str]
    tests: str

    @property
    def paths(self) -> list[str]:
        """Files and folders of `tests`, without the expression of -k."""
        return self.tests.partition(" -k ")[0].split()
