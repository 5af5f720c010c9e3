"""JSON and YAML of others: bounded in depth, digits and keys, and never quoted in an error."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalegpt.errors import InputError
from scalegpt.structured import LINE_LIMIT, parse_json, parse_yaml, read_lines, read_object

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"

BAD_JSON = {
    "depth": ("[" * 40 + "]" * 40, "nest deeper than 32"),
    "more depth than Python's stack": ("[" * 100_000, "nest deeper than 32"),
    "digits": ("9" * 41, "a number of 41 digits is too large"),
    "more digits than Python converts": ('{"a": ' + "9" * 5000 + "}", "a number of 5,000 digits"),
    "a key twice": ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
    "syntax": ('{"a": 1,\n "b" 2}', "x.json:2: not JSON: Expecting ':' delimiter"),
    "nothing": ("", "x.json:1: not JSON"),
}

BAD_YAML = {
    "aliases": (BOMB, "x.yaml:2: aliases"),
    "a merge key": ("a: &a {b: 1}\nc:\n  <<: *a\n", "x.yaml:3: aliases"),
    "tags": ("a: 1\nb: !!python/object:os.system x\n", "x.yaml:2: tags"),
    "depth": ("[" * 40 + "]" * 40, "nest deeper than 32"),
    "more depth than the stack": ("[" * 300_000, "nest"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", "x.yaml:3: the key 'a' appears twice"),
    "a key that is a list": ("? [a]\n: 1\n", "x.yaml:1: a key must be a word"),
    "two documents": ("a: 1\n---\nb: 2\n", "x.yaml:2: the file has a second YAML document"),
    "syntax": ("a: [1\nb: 2", "x.yaml:2: not YAML"),
    "control characters": ("a: \x01", "x.yaml: not YAML: it has a character"),
    "bytes that are not UTF-8": ("a: \udcff", "x.yaml: not YAML: it has a character"),
}


@pytest.mark.parametrize(("text", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_scalegpt_does_not_write_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_json(text, "x.json")
    assert message in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(("text", "message"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_scalegpt_does_not_write_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_yaml(text, "x.yaml")
    assert message in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_bomb_of_aliases_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    with pytest.raises(InputError, match="aliases"):
        parse_yaml("\n".join(lines), "x.yaml")


def test_without_the_c_parser_yaml_is_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CBaseLoader", raising=False)
    assert parse_yaml("a: off\nb: [1e-3, ~, '~']\n", "x.yaml") == {"a": "off", "b": ["1e-3", None, "~"]}
    with pytest.raises(InputError, match="aliases"):
        parse_yaml(BOMB, "x.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: off", {"a": "off"}),
        ("a: 2024-01-01", {"a": "2024-01-01"}),
        ("a: 1:30", {"a": "1:30"}),
        ("a: 0123", {"a": "0123"}),
        ("a: null\nb: ~\nc:\nd: 'null'\n", {"a": None, "b": None, "c": None, "d": "null"}),
        ("", None),
        ("{}", {}),
        ("[a, {b: c}]", ["a", {"b": "c"}]),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
    ],
)
def test_scalars_of_yaml_stay_text(text: str, value: Any) -> None:
    assert parse_yaml(text, "x.yaml") == value


def test_an_object_is_read_from_a_plain_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": 1}')
    assert read_object(path) == {"a": 1}
    for content in (b"[1]", b"3", b"\xff", b"{", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.json"):
            read_object(path)
    os.truncate(path, 1 << 30)
    with pytest.raises(InputError, match="has more than"):
        read_object(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a plain file"):
        read_object(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_object(path)


def test_lines_that_are_not_objects_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = '{"step": 1}\n'
    long = json.dumps({"step": 2, "text": "x" * LINE_LIMIT}) + "\n"
    lines = [
        good,
        "{\n",
        "null\n",
        "[1]\n",
        long,
        "9" * 5000 + "\n",
        "\x00\n",
        "[" * 5000 + "\n",
        '{"a": 1, "a": 2}\n',
        good,
        good[:-1],
    ]
    path.write_text("".join(lines))
    assert list(read_lines(path)) == [(good, {"step": 1})] * 2
    os.truncate(path, 1 << 34)
    with pytest.raises(InputError, match="a line of more than"):
        list(read_lines(path))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(read_lines(path))
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a plain file"):
        list(read_lines(path))
