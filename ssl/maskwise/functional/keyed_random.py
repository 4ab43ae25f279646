"""Keyed randomness: every draw is a pure function of integers, equal on every device and for every split.

A key is a 64-bit integer mixed from (stream, seed, step, sample, view, ...). No generator has a state, so nothing has
to be saved, advanced or synchronized between ranks and workers.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# streams: the first part of every key, so that two purposes have different numbers
CROP, COLOR, RATIO, COIN, HINT, MASK, DROP_PATH, ORDER, SHAPES = range(1, 10)
DATASET, TRANSFORM = range(20, 22)  # seeds of code of the user, which draws from global generators

# constants of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), as unsigned integers
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LINK = 0xD1342543DE82EF95  # an odd multiplier between the parts of a key, so that (a, b) and (b, a) differ
_BITS = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _BITS
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts arithmetically; the mask makes it logical


def _scramble(x):
    """Apply the SplitMix64 finalizer, a bijection of 64-bit integers, to a Python int or an int64 tensor."""
    if isinstance(x, int):
        x &= _BITS
        x = (x ^ (x >> 30)) * _FIRST & _BITS
        x = (x ^ (x >> 27)) * _SECOND & _BITS
        return x ^ (x >> 31)
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def make_key(*parts: int | Tensor) -> Tensor:
    """Mix integers into a key: ints and int64 tensors, broadcast -> int64 tensor (0-dim for ints alone)."""
    state: int | Tensor = 0
    for part in parts:
        if isinstance(part, Tensor):
            if isinstance(state, int):
                state = torch.full((), _signed(state), dtype=torch.int64, device=part.device)
            state = _scramble(state * _signed(_LINK) + part.to(torch.int64) + _signed(_GAMMA))
        elif isinstance(state, int):
            state = _scramble(state * _LINK + int(part) + _GAMMA)
        else:
            state = _scramble(state * _signed(_LINK) + _signed(int(part) + _GAMMA))
    return torch.tensor(_signed(state), dtype=torch.int64) if isinstance(state, int) else state


def uniform(key: int | Tensor, n: int) -> Tensor:
    """Draw n uniforms in [0, 1) for each key: int64 [*S] -> float64 [*S, n]; entry i is the same for any n."""
    key = torch.as_tensor(_signed(key) if isinstance(key, int) else key)
    counter = torch.arange(1, n + 1, dtype=torch.int64, device=key.device) * _signed(_GAMMA)
    return _shift(_scramble(key.unsqueeze(-1) + counter), 11).to(torch.float64) * 2.0**-53


def order(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order of n samples in an epoch, int64 [n]."""
    counter = torch.arange(n, dtype=torch.int64) * _signed(_GAMMA)
    return torch.argsort(_scramble(make_key(ORDER, seed, epoch) + counter))  # a bijection: no two values are equal


@contextlib.contextmanager
def seed_scope(key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch from a key, for code that draws from global generators; restore them afterwards."""
    key = int(key) & _BITS
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    # no CUDA context is created here: workers are forked
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(key)
    np.random.seed(_scramble(key) & 0xFFFFFFFF)
    torch.default_generator.manual_seed(_signed(key))
    if cuda is not None:
        torch.cuda.manual_seed_all(_signed(key))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
