"""What others wrote is shown, not obeyed, and never becomes a page."""

import pytest

from scalegpt.text import distinct, one_line, shortened, shown


def test_a_cell_is_one_line() -> None:
    assert one_line("a\nb\tc\x1b") == "a\\nb\\tc\\x1b"
    assert one_line("plain") == "plain"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        ("\x1b[2J", "'\\x1b[2J'"),
        (1.5, "1.5"),
        (None, "None"),
        ([1] * 10**6, "a list"),
        ({"a": 1}, "an object"),
        (10**400, "about 1e400"),
        (-(10**4000), "about -1e4000"),
    ],
)
def test_values_are_shown_shortly(value: object, text: str) -> None:
    assert shown(value) == text


def test_long_texts_lose_their_middle() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcdef…ijk"
    assert len(shown("x" * 10**6)) < 70


def test_names_that_come_twice_get_numbers_that_no_other_name_has() -> None:
    assert distinct(["a", "b", "a"], "{} {}") == ["a 1", "b", "a 2"]
    assert distinct(["a", "a 1", "a"], "{} {}") == ["a 2", "a 1", "a 3"]
