"""The settings of a model's shape: defaults that depend on others, and combinations that are refused."""

import pytest

from scalegpt.config import ModelConfig
from scalegpt.config.presets import resolve
from scalegpt.config.rope import RopeScaling
from scalegpt.errors import InputError
from scalegpt.training.runs.changes import differences


def test_defaults_are_gpt2s() -> None:
    model = ModelConfig(n_embd=768, n_head=12)
    assert (model.head_width, model.kv_heads, model.inner_width) == (64, 12, 3072)
    assert not model.is_gated
    assert not model.has_qkv_bias


@pytest.mark.parametrize(("width", "inner"), [(768, 2048), (1024, 2816), (2048, 5632), (4096, 11008)])
def test_a_gated_layer_is_eight_thirds_as_wide_rounded_up_to_256(width: int, inner: int) -> None:
    assert ModelConfig(n_embd=width, n_head=8, activation="swiglu").inner_width == inner


def test_qkv_biases_are_no_other_biases() -> None:
    model = ModelConfig(bias="qkv")
    assert model.has_qkv_bias
    assert not model.has_bias


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"n_head": 12, "n_embd": 768, "n_kv_head": 5},
            "n_head 12 is not divisible by n_kv_head 5; n_kv_head 4 would work",
        ),
        ({"n_head": 3, "n_embd": 128}, "n_embd 128 is not divisible by n_head 3"),
        ({"position": "rope", "head_size": 9}, "rotary positions turn pairs of numbers"),
        ({"position": "rope", "head_size": 64, "rotary_share": 0.01}, "rotary positions turn pairs of numbers"),
        ({"rope_scaling": "{type: linear, factor: 2}"}, "rope_scaling needs position rope; position is learned"),
        ({"position": "rope", "rope_scaling": "{type: llama3, factor: 8}"}, "type llama3 needs original_block_size"),
        (
            {"position": "rope", "rope_scaling": {"type": "linear", "beta_fast": 3}},
            "beta_fast does not belong to type linear",
        ),
        ({"position": "rope", "rope_scaling": {"typ": "linear"}}, "rope_scaling: unknown key 'typ'"),
        ({"position": "rope", "rope_scaling": "linear"}, "rope_scaling must be none or an object such as"),
        ({"bias": "all"}, "'all' is not a value of bias"),
        (
            {
                "position": "rope",
                "rope_scaling": {"type": "yarn", "original_block_size": 8, "beta_fast": 1, "beta_slow": 2},
            },
            "beta_slow 2 must be less than beta_fast 1",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as refused:
        ModelConfig.from_mapping(settings, "command line")
    assert message in str(refused.value)


def test_a_head_may_have_any_width() -> None:
    assert ModelConfig(n_embd=1024, n_head=16, head_size=128, n_kv_head=8).head_width == 128


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(type="linear", factor=2.0),
        RopeScaling(type="llama3", factor=32.0, original_block_size=8192),
        RopeScaling(type="yarn", factor=4.0, original_block_size=32768, attention_factor=1.1),
    ],
    ids=lambda scaling: scaling.type,
)
def test_a_scaling_reads_back_from_its_flag_and_from_a_runs_config(scaling: RopeScaling) -> None:
    for given in (str(scaling), scaling.as_dict()):
        run = resolve(flags={"position": "rope", "rope_scaling": given})
        assert run.model.rope_scaling == scaling
        assert ModelConfig.from_mapping(run.as_dict()["model"], "config.yaml") == run.model


def test_a_stored_scaling_is_no_change_of_the_run() -> None:
    scaled = {"position": "rope", "rope_scaling": "{type: llama3, factor: 4, original_block_size: 64}"}
    run = resolve(flags=scaled)
    stored = {**run.as_dict(), "model": {**run.as_dict()["model"], "rope_scaling": run.model.rope_scaling}}
    assert differences(stored, run.as_dict()) == {}
    other = resolve(flags={**scaled, "rope_scaling": "{type: linear, factor: 4}"})
    assert "rope_scaling" in differences(stored, other.as_dict())
