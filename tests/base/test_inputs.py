"""What ``input_file`` names: one corpus, several inputs, or weighted sources, in all the forms that users write."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scalegpt.cli.main import main
from scalegpt.config import DataConfig
from scalegpt.config.presets import as_file, from_run, resolve
from scalegpt.errors import InputError
from scalegpt.inputs import MIXTURE_BLOCK, as_text, paths_of, shares_of


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("a", "b", "c,d", "e=0.5", "f=x", "g"):
        Path(name).touch()


def config(value: Any) -> DataConfig:
    return DataConfig.from_mapping({"input_file": value}, "command line")


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (Path("a"), ["a"]),
        ("a, b", ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        (["a,b", Path("g")], ["a", "b", "g"]),
        ("c,d", ["c,d"]),
        (["c,d", "a"], ["c,d", "a"]),
        ("e=0.5", ["e=0.5"]),
        (["e=0.5", "f=x"], ["e=0.5", "f=x"]),
        (["~/a", "b"], ["home/a", "b"]),
        ("s3://bucket/date=2024", ["s3://bucket/date=2024"]),
        ("none.txt", ["none.txt"]),
    ],
)
def test_inputs_without_weights_are_one_corpus(given: Any, paths: list[str], tmp_path: Path) -> None:
    data = config(given)
    found = [path.replace(f"{tmp_path}/", "") for path in paths_of(data.input_file or "")]
    assert found == paths
    assert [(source.text, source.weight) for source in data.sources] == [(data.input_file, 1.0)]


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ("a=0.7,b=0.3", {"a": 0.7, "b": 0.3}),
        (["a=0.7", "b=0.3"], {"a": 0.7, "b": 0.3}),
        ({"a": 0.7, "b": "3e-1"}, {"a": 0.7, "b": 0.3}),
        ({Path("a"): 7, "b": 3}, {"a": 7, "b": 3}),
        ("c,d=2", {"c,d": 2}),
        (["c,d=2", "a=1"], {"c,d": 2, "a": 1}),
        (["e=0.5=2", "a=1"], {"e=0.5": 2, "a": 1}),
        ({"a,b": 2, "g": 1}, {"a,b": 2, "g": 1}),
        (["s3://x/a=0.5", "s3://x/b=0.5"], {"s3://x/a": 0.5, "s3://x/b": 0.5}),
        ("a=5", {"a": 5}),
    ],
)
def test_weights_make_a_mixture(given: Any, weights: dict[str, float]) -> None:
    data = config(given)
    assert dict(data.sources) == weights
    assert config(data.input_file) == data, "the text of a value is read as the value"
    with pytest.raises(InputError, match="has a weight, but here all inputs are one text"):
        paths_of(data.input_file or "")


def test_a_file_has_a_list_or_a_mapping_and_a_run_keeps_what_it_was_given(tmp_path: Path) -> None:
    for text in ("input_file: [a=0.7, b=0.3]", "input_file: {a: 0.7, b: 0.3}", "input_file: a=0.7,b=0.3"):
        Path("run.yaml").write_text(f"data:\n  {text}")
        run = resolve(config_file="run.yaml")
        assert dict(run.data.sources) == {"a": 0.7, "b": 0.3}
        again = from_run(yaml.safe_load(yaml.safe_dump(as_file(run))), "config.yaml")
        assert again["data"]["input_file"] == run.data.input_file == "a=0.7,b=0.3"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a=0.7,b", "'b' has no weight, and another source has one; give one to each"),
        ("a=0,b=1", "the weight of 'a' must be more than 0 and at most 1e+12, not 0"),
        ("a=-1,b=1", "not -1"),
        ("a=nan,b=1", "not nan"),
        ("a=inf,b=1", "not inf"),
        ({"a": True, "b": 1}, "a mapping holds sources and their weights, not 'a': True"),
        ({"a": None, "b": 1}, "a mapping holds sources and their weights"),
        ({"a": "x", "b": 1}, "the weight of 'a' must be a number, not 'x'"),
        ("a=x,b=1", "the weight of 'a' must be a number, not 'x'"),
        ("a=1,b=1,./a=2", "names 'a' twice; name it once, with the sum"),
        ("a=1,b=1e-5", "the weight of 'b' is less than 1/10,000 of the sum"),
        (["a", 1], "a list holds paths, with or without =WEIGHT, not 1"),
        ([], "has no input"),
        (",", "has no input"),
        ("", "has no input"),
        (["~nobody-here/a", "b"], "there is no user"),
    ],
)
def test_weights_that_cannot_be_are_refused_in_a_line(given: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        config(given)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_none_is_no_input() -> None:
    assert config(["none"]).input_file is config(None).input_file is None
    assert DataConfig().sources == ()


def test_the_command_line_takes_several_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--preset", "tiny", "--gpu", "cpu", "--input_file", "a=0.7", "b=0.3", "--max_iters", "5"]
    assert main(words) == 0
    assert "--input_file a=0.7,b=0.3" in capsys.readouterr().out
    assert main(["plan", "--preset", "tiny", "--gpu", "cpu", "--input_file", "a=0.7", "b"]) == 2
    assert "'b' has no weight" in capsys.readouterr().err


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_shares_are_the_weights_to_less_than_one_window(weights: list[float]) -> None:
    shares = shares_of(weights)
    assert sum(shares) == MIXTURE_BLOCK
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * MIXTURE_BLOCK) < 1


def test_round_weights_have_exact_shares() -> None:
    assert shares_of([0.7, 0.3]) == (7000, 3000)
    assert shares_of([70, 30]) == (7000, 3000)
    assert shares_of([0.1, 0.2, 0.7]) == (1000, 2000, 7000)
    assert shares_of([1, 1, 1]) == (3334, 3333, 3333)


def test_other_values_are_left_to_the_setting() -> None:
    assert as_text(3) == 3
    with pytest.raises(InputError, match=r"input_file must be a word or none, not 3\.5"):
        config(3.5)
