"""What the base class of methods requires of a method."""

import pytest

from maskwise.methods import METHODS
from maskwise.methods.base import Method


@pytest.mark.parametrize("missing", ["forward", "update_teacher"])
def test_a_method_must_implement_forward_and_update_teacher(missing):
    members = {name: lambda self: None for name in ("forward", "update_teacher") if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Half", (Method,), members)()


def test_every_row_is_a_method():
    assert all(issubclass(row, Method) for row in METHODS.values())
