"""Values of the command line: text keys take the word as it is, other keys read it as YAML."""

from typing import Any, Optional, Union

import pytest

from maskwise.recipe.reading import read_recipe
from maskwise.recipe.yaml_text import ParseError, Word, convert

ODD = [
    "photos #2",
    "'photos'",
    '"photos"',
    "!important",
    "&anchor",
    "*all",
    "[2021]",
    "{a: 1}",
    "null",
    "photos ",
    " photos",
    "a: b",
    "2012-01-01",
    "007",
    "yes",
    "1e3",
    "%x",
    "@x",
    "`x`",
    "- x",
    "a\\b",
    "x: [",
    "a\nb",
    "a\u2028b",
    "a\x85b",
    "\x7f",
    "caf\udce9",
    "\N{GRINNING FACE} é",
]


@pytest.mark.parametrize("word", ODD)
def test_a_text_key_takes_the_word_as_it_is(word):
    assert convert(Word(word), str) == word
    recipe = read_recipe("debug/tiny", "data=folder", f"data.path={word}", "evaluate.knn_every=0")
    assert recipe.values["data.path"] == word


@pytest.mark.parametrize("word", ODD)
def test_it_is_written_to_the_run_folder_and_read_back(word, tmp_path):
    recipe = read_recipe("debug/tiny", "data=folder", f"data.path={word}", "evaluate.knn_every=0", try_model=False)
    (tmp_path / "recipe.yaml").write_text(recipe.resolved_yaml())
    assert read_recipe(tmp_path, try_model=False) == recipe


@pytest.mark.parametrize(
    "word, hint, value",
    [
        ("null", Optional[str], None),
        ("none", Optional[str], None),
        ("", Optional[str], None),
        ("train #2", Optional[str], "train #2"),
        ("[cat, dog]", Union[str, tuple[str, ...], None], ("cat", "dog")),
        ("cats #1.txt", Union[str, tuple[str, ...], None], "cats #1.txt"),
        ("null", Union[str, tuple[str, ...], None], None),
        ("3", Union[int, str], 3),
        ("three #", Union[int, str], "three #"),
        ("3", int, 3),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("[1, 2]", Any, (1, 2)),
        ("x", Any, "x"),
        ("off", bool, False),
    ],
)
def test_the_type_of_the_key_decides(word, hint, value):
    assert convert(Word(word), hint) == value


def test_no_text_is_an_error_for_a_key_that_needs_some():
    with pytest.raises(ParseError, match="expects text, not nothing"):
        convert(Word(""), str)


def test_the_same_words_in_a_file_are_yaml(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("extends: debug/tiny\ndata: {name: folder, path: photos #2\n}\nevaluate: {knn_every: 0}\n")
    assert read_recipe(file).values["data.path"] == "photos"
