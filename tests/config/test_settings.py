"""Settings convert what files and flags give them, and refuse the rest with a reason."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalegpt.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from scalegpt.config.settings import Section, coerce
from scalegpt.errors import InputError, nearest


def converted(section: type[Section], key: str, value: Any) -> Any:
    return coerce(section.settings()[key], value)


@pytest.mark.parametrize(
    ("key", "value", "result"),
    [
        ("max_tokens", "5e5", 500_000),
        ("max_tokens", "500_000", 500_000),
        ("max_tokens", 5e5, 500_000),
        ("max_tokens", "none", None),
        ("max_tokens", None, None),
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", 1, 1.0),
        ("fused", "off", False),
        ("fused", "Yes", True),
        ("fused", 0, False),
        ("precision", "bf16", "bf16"),
        ("max_minutes", "2.5", 2.5),
    ],
)
def test_values_take_their_setting_s_type(key: str, value: Any, result: Any) -> None:
    given_back = converted(TrainConfig, key, value)
    assert given_back == result
    assert type(given_back) is type(result)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("micro_batch", "two", "micro_batch must be a whole number, not 'two'"),
        ("micro_batch", 1.5, "micro_batch must be a whole number, not 1.5"),
        ("micro_batch", True, "micro_batch must be a whole number, not True"),
        ("micro_batch", None, "micro_batch must be a whole number, not None"),
        ("micro_batch", [1], "micro_batch must be a whole number"),
        ("max_tokens", "inf", "max_tokens must be a whole number or none"),
        ("learning_rate", "nan", "learning_rate must be a number"),
        ("learning_rate", False, "learning_rate must be a number"),
        ("fused", "maybe", "fused must be true or false, not 'maybe'"),
        ("precision", 16, "precision must be one of auto, bf16, fp16, fp32, not 16"),
    ],
)
def test_values_of_another_type_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        converted(TrainConfig, key, value)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (TrainConfig, {"learning_rate": 0.0}, "learning_rate must be more than 0, not 0"),
        (TrainConfig, {"beta2": 1.0}, "beta2 must be less than 1"),
        (TrainConfig, {"min_lr_ratio": 1.1}, "min_lr_ratio must be at most 1"),
        (TrainConfig, {"micro_batch": 0}, "micro_batch must be at least 1"),
        (TrainConfig, {"precision": "bf61"}, "'bf61' is not a value of precision; did you mean bf16"),
        (TrainConfig, {"max_iters": None}, "needs an end"),
        (ModelConfig, {"n_embd": 100, "n_head": 3}, "n_embd 100 is not divisible by n_head 3; n_head 2 would work"),
        (ModelConfig, {"dropout": 1.0}, "dropout must be less than 1"),
        (ModelConfig, {"activation": "gelo"}, "did you mean gelu"),
        (DataConfig, {"tokenizer": "gpt3"}, "did you mean gpt2"),
        (ParallelConfig, {"backend": "fsdp", "zero_stage": 1}, "zero_stage 1 does not exist for backend fsdp"),
        (ParallelConfig, {"offload": "all"}, "needs backend fsdp or deepspeed"),
        (ParallelConfig, {"backend": "fsdp", "offload": "optimizer"}, "--offload all --zero_stage 3"),
        (ParallelConfig, {"backend": "deepspeed", "zero_stage": 0, "offload": "optimizer"}, "from stage 1 on"),
        (ParallelConfig, {"backend": "deepspeed", "zero_stage": 2, "offload": "all"}, "at stage 3 only"),
    ],
)
def test_values_outside_the_bounds_are_refused(section: type[Section], values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        section(**values)
    assert message in str(refused.value)


def test_mistake_names_its_source() -> None:
    with pytest.raises(InputError, match=r"^mine\.json: unknown key 'n_layr'; did you mean n_layer"):
        ModelConfig.from_mapping({"n_layr": 3}, "mine.json")
    with pytest.raises(InputError, match=r"^mine\.json: n_layer must be at least 1"):
        ModelConfig.from_mapping({"n_layer": 0}, "mine.json")


def test_sections_are_frozen_and_copies_are_checked() -> None:
    model = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.n_layer = 3  # type: ignore[misc]
    assert model.changed(n_layer=9).n_layer == 9
    with pytest.raises(InputError):
        model.changed(n_layer=0)


@pytest.mark.parametrize("section", [ModelConfig, TrainConfig, DataConfig, ParallelConfig])
def test_every_default_survives_being_written_and_read(section: type[Section]) -> None:
    default = section()
    assert section.from_mapping(dataclasses.asdict(default), "test") == default
    for key, field in section.settings().items():
        assert field.metadata["help"], key


@given(st.integers(-(10**15), 10**15))
def test_whole_numbers_survive_text(number: int) -> None:
    assert converted(TrainConfig, "micro_batch", str(number)) == number
    assert converted(TrainConfig, "micro_batch", f"{number:_}") == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_text(number: float) -> None:
    assert converted(TrainConfig, "learning_rate", repr(number)) == number


@given(st.text() | st.binary() | st.lists(st.none()) | st.dictionaries(st.text(), st.none()) | st.floats() | st.none())
def test_anything_else_is_converted_or_refused(value: Any) -> None:
    for section in (ModelConfig, TrainConfig, DataConfig, ParallelConfig):
        for key in section.settings():
            with contextlib.suppress(InputError):  # anything but an InputError fails the test
                made = section.from_mapping({key: value}, "test")
                assert getattr(made, key) is None or isinstance(getattr(made, key), str | int | float | bool)


def test_mistyped_width_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="n_embd 999983 is not divisible by n_head 3; n_head 1 would work"):
        ModelConfig(n_embd=999_983)


def test_nearest_offers_close_words_or_all() -> None:
    assert nearest("blok_size", ["block_size", "n_layer"]) == "; did you mean block_size?"
    assert nearest("BLOCK_SIZE", ["block_size", "n_layer"]) == "; did you mean block_size?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"


SETTINGS = sorted({*TrainConfig.settings(), *ModelConfig.settings(), *DataConfig.settings()})


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "learning_rate"),
        ("wd", "weight_decay"),
        ("keep", "keep_best, keep_checkpoints"),
        ("--keep", "keep_best, keep_checkpoints"),
        ("maxiter", "max_iters"),
        ("WD", "weight_decay"),
        ("batch_size", "block_size, head_size, vocab_size"),
        ("n_layers", "n_layer"),
    ],
)
def test_nearest_knows_abbreviations(word: str, meant: str) -> None:
    assert nearest(word, SETTINGS) == f"; did you mean {meant}?"


def test_nearest_offers_no_abbreviation_for_a_letter_or_none() -> None:
    assert nearest("k", ["keep_best"]) == "; known: keep_best"
    assert nearest("--", ["keep_best"]) == "; known: keep_best"


def test_a_list_too_long_for_a_line_is_replaced_by_a_command() -> None:
    assert nearest("zzz", SETTINGS, "scalegpt train --help") == "; `scalegpt train --help` lists the valid names"
    assert nearest("zzz", ["b", "a"], "scalegpt train --help") == "; known: a, b"


def test_a_path_of_python_is_a_path() -> None:
    made = DataConfig.from_mapping({"tokenizer": Path("some/folder"), "input_file": Path("a.txt")}, "train()")
    assert (made.tokenizer, made.input_file) == ("some/folder", "a.txt")
    with pytest.raises(InputError, match="encoding must be a word"):
        DataConfig.from_mapping({"encoding": Path("utf-8")}, "train()")
