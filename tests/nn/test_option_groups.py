"""Constructors that accept the fields of their option dataclasses as keywords."""

import inspect
from dataclasses import dataclass
from typing import Annotated, get_type_hints

import pytest

from maskwise.bounds import AtLeast, Count
from maskwise.nn.option_groups import option_groups


@dataclass(frozen=True)
class Options:
    depth: Count = 2
    kind: str = "plain"


class Layer:
    @option_groups
    def __init__(self, dim: int, scale: float = 1.0, *, options: Options = Options(depth=3), last: bool = False):
        self.dim, self.scale, self.options, self.last = dim, scale, options, last


def test_fields_are_keywords_with_the_defaults_of_the_parameter():
    assert Layer(4).options == Options(depth=3)
    assert Layer(4, kind="wide").options == Options(depth=3, kind="wide")
    assert Layer(4, options=Options(depth=5)).options == Options(depth=5)
    assert Layer(4, options=Options(depth=5), kind="wide").options == Options(depth=5, kind="wide")
    layer = Layer(4, 0.5, depth=1, last=True)
    assert (layer.dim, layer.scale, layer.options, layer.last) == (4, 0.5, Options(depth=1), True)


def test_signature_lists_fields_in_place_of_the_dataclass():
    parameters = inspect.signature(Layer).parameters
    assert list(parameters) == ["dim", "scale", "depth", "kind", "last"]
    assert parameters["depth"].default == 3 and parameters["kind"].default == "plain"
    hints = get_type_hints(Layer.__init__, include_extras=True)
    assert hints["depth"] == Annotated[int, AtLeast(1)] and hints["dim"] is int and "options" not in hints


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="width"):
        Layer(4, width=1)
