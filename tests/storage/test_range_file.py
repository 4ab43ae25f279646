"""A file in storage as a stream: equal to a file in memory, in few requests."""

import io
import random

from maskwise.storage.range_file import FIRST, LARGEST, RangeFile


class Memory:
    """A store of one file."""

    def __init__(self, data):
        self.data = data

    def read(self, address, start, size):
        assert 0 < size <= LARGEST and start + size <= len(self.data)
        return self.data[start : start + size]


def test_reads_and_jumps_equal_those_in_memory():
    draw = random.Random(1)
    data = draw.randbytes(3 * FIRST + 17)
    file, plain = RangeFile(Memory(data), "s3://b/x", len(data)), io.BytesIO(data)
    for _ in range(400):
        if draw.random() < 0.5:
            whence = draw.randrange(3)
            offset = draw.randrange(len(data) + 50) * (-1 if whence == 2 else 1) // (1 if whence != 1 else 40)
            if whence == 2:
                offset = max(offset, -len(data))
            assert file.seek(offset, whence) == plain.seek(offset, whence)
        size = draw.choice([-1, 0, 1, 512, draw.randrange(2 * FIRST)])
        assert file.read(size) == plain.read(size) and file.tell() == plain.tell()


def test_sequential_reading_doubles_its_blocks_and_jumps_stay_small():
    data = bytes(8 * LARGEST)
    file = RangeFile(Memory(data), "s3://b/x", len(data))
    while file.read(512):
        pass
    growing = 0
    length, read = FIRST, 0
    while read < len(data):
        length = min(LARGEST, 2 * length)
        read, growing = read + length, growing + 1
    assert file.requests == growing
    file = RangeFile(Memory(data), "s3://b/x", len(data))
    file.length = LARGEST
    for k in range(1, 8):
        file.seek(k * LARGEST)
        file.read(512)
        assert len(file.block) == FIRST
