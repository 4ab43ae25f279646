"""Names of very many files without a Python object for each."""

from collections.abc import Iterable, Sequence

import numpy as np


class Names(Sequence):
    """An immutable list of strings kept as one run of bytes: a million paths take some sixty megabytes and are shared by forked workers."""

    def __init__(self, blob: bytes, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Pack strings."""
        raw = [name.encode("utf-8", "surrogateescape") for name in names]
        return cls(b"".join(raw), np.cumsum(np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return self.blob[start : self.ends[index]].decode("utf-8", "surrogateescape")

    def __iter__(self):
        start = 0
        for end in self.ends.tolist():
            yield self.blob[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __eq__(self, other) -> bool:
        return list(self) == list(other)

    __hash__ = None
