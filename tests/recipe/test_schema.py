"""Keys, types and bounds of a recipe, read from signatures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from maskwise.bounds import Above, AtLeast, Between, Count, Probability
from maskwise.recipe.schema import REQUIRED, constructor_keys, tables
from maskwise.recipe.sections import SECTIONS
from maskwise.recipe.signatures import bounds_of, check_bounds, recipe_type, value_type
from maskwise.recipe.yaml_text import ParseError


@pytest.mark.parametrize(
    "hint, value, text",
    [
        (Count, 0, "must be at least 1, not 0"),
        (Count | None, -2, "must be at least 1, not -2"),
        (Annotated[float, AtLeast(0, below=1)], 1.0, "must be from 0 to below 1, not 1.0"),
        (Annotated[float, Above(0)], 0.0, "must be above 0, not 0.0"),
        (Annotated[float, Above(0, at_most=1)], 1.5, "must be above 0 and at most 1, not 1.5"),
        (Annotated[int, Between(2, 4)], 5, "must be from 2 to 4, not 5"),
        (Probability | tuple[Probability, ...], (0.5, 2.0), "must be from 0 to 1, not 2.0"),
    ],
)
def test_a_number_out_of_bounds_is_refused(hint, value, text):
    with pytest.raises(ParseError, match=f"^{text}$"):
        check_bounds(hint, value)


@pytest.mark.parametrize(
    "hint, value",
    [
        (Count, 1),
        (Count | None, None),
        (Annotated[float, AtLeast(0, below=1)], 0.0),
        (Annotated[float, Above(0, at_most=1)], 1.0),
        (Annotated[int, Between(2, 4)], 2),
        (Annotated[int, Between(2, 4)], 4),
        (Count | Literal["auto"], "auto"),
        (int, -5),
    ],
)
def test_a_number_within_its_bounds_passes(hint, value):
    check_bounds(hint, value)


@pytest.mark.parametrize(
    "hint, default, result",
    [
        (str | Path | None, None, str | None),
        (Probability | Sequence[Probability], 0.3, Probability | tuple[Probability, ...]),
        (Sequence[int], (1, 2, 3), tuple[int, int, int]),
        (None, 0.5, float),
        (None, (1, 2), tuple[int, int]),
        (type, None, Any),
        (Literal["a", "b"], "a", Literal["a", "b"]),
    ],
)
def test_types_are_those_of_annotations_or_of_defaults(hint, default, result):
    assert value_type(hint, default) == result


def test_types_outside_recipes():
    assert recipe_type(dict) is None and recipe_type(tuple[dict, ...]) is None and recipe_type(None) is None


class Parent:
    def __init__(self, width: Count, seed: int = 0, rate: Probability = 0.5):
        pass


class Child(Parent):
    def __init__(self, width: Count, depth: int = 2, **options):
        pass


def test_keys_follow_the_constructors_that_get_the_rest():
    keys = constructor_keys("masking", Child)
    assert list(keys) == ["width", "depth", "rate"]  # the seed is set by build
    assert keys["width"].default is REQUIRED and keys["rate"].default == 0.5
    assert bounds_of(keys["rate"].type) == [Between(0, 1)]


def test_arguments_set_by_build_are_arguments():
    """No section lists an argument that no class of its table has."""
    for section, table in tables().items():
        accepted = {name for cls in table.values() for name in parameters(cls)}
        assert SECTIONS[section].set_by_build <= accepted, section


def parameters(cls) -> set[str]:
    from maskwise.recipe.signatures import parameters_of

    return set(parameters_of(cls)[0])
