"""The count holds to three witnesses: the published sizes, the closed forms, and the torch module itself."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegpt.architecture.counting import closed_form, count_parameters, formula_steps, sizes_of, weight_bytes
from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.config import ModelConfig
from scalegpt.errors import InputError
from scalegpt.units import format_bytes

GPT2 = {
    "gpt2": (12, 768, 12, 124_439_808),
    "gpt2-medium": (24, 1024, 16, 354_823_168),
    "gpt2-large": (36, 1280, 20, 774_030_080),
    "gpt2-xl": (48, 1600, 25, 1_557_611_200),
}


@st.composite
def models(draw: st.DrawFn, most_layers: int = 6) -> ModelConfig:
    heads = draw(st.integers(1, 8))
    return ModelConfig(
        n_layer=draw(st.integers(1, most_layers)),
        n_head=heads,
        n_embd=heads * draw(st.integers(1, 32)),
        block_size=draw(st.integers(1, 2048)),
        vocab_size=draw(st.integers(1, 60_000)),
        bias=draw(st.sampled_from([False, True, "qkv"])),
        tie_head=draw(st.booleans()),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        activation=draw(st.sampled_from(["gelu", "relu2", "swiglu", "geglu"])),
        n_inner=draw(st.none() | st.integers(1, 600)),
    )


def by_closed_form(model: ModelConfig) -> int:
    L, H, T, V, F = model.n_layer, model.n_embd, model.block_size, model.vocab_size, model.inner_width
    up = 2 * F if model.activation in ("swiglu", "geglu") else F
    biases = {False: 0, "qkv": 3 * H, True: 3 * H + H + up + H}[model.bias]
    norm = 2 * H if model.bias is True and model.norm == "layernorm" else H
    return L * (4 * H**2 + up * H + H * F + biases + 2 * norm) + norm + T * H + V * H * (1 if model.tie_head else 2)


@pytest.mark.parametrize(("layers", "width", "heads", "published"), GPT2.values(), ids=GPT2)
def test_gpt2_sizes_are_the_published_ones(layers: int, width: int, heads: int, published: int) -> None:
    model = ModelConfig(n_layer=layers, n_embd=width, n_head=heads, block_size=1024, vocab_size=50257, bias=True)
    assert count_parameters(model).total == published


@given(models(most_layers=2000))
def test_count_is_the_closed_form_at_any_depth(model: ModelConfig) -> None:
    assert count_parameters(model).total == by_closed_form(model)


@given(models())
def test_breakdown_is_the_sum_of_the_tensors(model: ModelConfig) -> None:
    shapes, count = parameter_shapes(model), count_parameters(model)

    def sum_of(*prefixes: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))

    assert count.total == sum_of("")
    assert count.token_embedding == sum_of("wte")
    assert count.position_embedding == sum_of("wpe")
    assert count.all_layers == sum_of("blocks.")
    assert count.layer.attention == sum_of("blocks.0.attn.")
    assert count.layer.feed_forward == sum_of("blocks.0.mlp.")
    assert count.layer.norms == sum_of("blocks.0.ln1.", "blocks.0.ln2.")
    assert count.final_norm == sum_of("ln_f")
    assert count.head == sum_of("head")
    assert sum(map(count.share, count.parts().values())) == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(models())
def test_module_has_exactly_these_tensors(model: ModelConfig) -> None:
    import torch

    from scalegpt.model.gpt import GPT

    with torch.device("meta"):
        module = GPT(model)
    own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert own == parameter_shapes(model)
    assert list(own) == list(parameter_shapes(model))
    assert sum(parameter.numel() for parameter in module.parameters()) == count_parameters(model).total


def test_names_and_shapes_with_everything_on() -> None:
    model = ModelConfig(n_layer=2, n_embd=8, n_head=2, block_size=16, vocab_size=32, bias=True, tie_head=False)
    shapes = parameter_shapes(model)
    assert shapes["wte.weight"] == (32, 8)
    assert shapes["wpe.weight"] == (16, 8)
    assert shapes["blocks.1.attn.qkv.weight"] == (24, 8)
    assert shapes["blocks.1.attn.qkv.bias"] == (24,)
    assert shapes["blocks.1.mlp.fc.weight"] == (32, 8)
    assert shapes["blocks.1.mlp.proj.weight"] == (8, 32)
    assert shapes["head.weight"] == (32, 8)
    assert "head.bias" not in shapes
    assert not any(name.endswith(".bias") for name in parameter_shapes(model.changed(bias=False)))
    assert "head.weight" not in parameter_shapes(model.changed(tie_head=True))


def test_two_norms_of_a_layer_without_biases_are_two_widths() -> None:
    model = ModelConfig(n_layer=16, n_embd=768, n_head=12, block_size=1024, vocab_size=50304)
    assert count_parameters(model).layer.norms == 1536
    assert count_parameters(model.changed(tie_head=False)).total == 191_324_928


@given(st.integers(1, 16), models())
def test_heads_dropout_and_activation_add_nothing(heads: int, model: ModelConfig) -> None:
    wide = model.changed(n_embd=16 * 9 * 5 * 7 * 11 * 13, n_head=1)
    if wide.n_embd % heads == 0:
        other = wide.changed(n_head=heads, dropout=0.5, activation="geglu" if wide.is_gated else "gelu_tanh")
        assert count_parameters(other) == count_parameters(wide)


@given(models())
def test_steps_of_the_formula_come_to_what_they_say(model: ModelConfig) -> None:
    steps = {step.part.strip(): step for step in formula_steps(model)}
    for step in steps.values():
        assert eval(step.numbers.replace("·", "*").replace("²", "**2")) == step.value, step
    parts = [step.value for step in formula_steps(model) if step.part.startswith("  ")]
    assert sum(parts) == steps["one layer"].value
    total = ("token embedding", "position embedding", "all layers", "final norm", "head")
    assert sum(steps[part].value for part in total) == count_parameters(model).total


@given(models())
def test_closed_form_in_symbols_gives_the_total(model: ModelConfig) -> None:
    symbols = closed_form(model).removeprefix("P = ").replace("·", "*").replace("²", "**2")
    assert eval(symbols, {**sizes_of(model)}) == count_parameters(model).total


@pytest.mark.parametrize(
    ("settings", "layer"),
    [
        ({}, "12·H² + 2·H"),
        ({"bias": True}, "12·H² + 13·H"),
        ({"activation": "swiglu", "norm": "rmsnorm"}, "4·H² + 3·H·F + 2·H"),
        ({"activation": "geglu", "bias": True, "norm": "rmsnorm"}, "4·H² + 3·H·F + 7·H + 2·F"),
        ({"activation": "relu2", "n_inner": 100, "bias": "qkv"}, "4·H² + 2·H·F + 5·H"),
        ({"activation": "swiglu", "n_inner": 768}, "16·H² + 2·H"),
    ],
)
def test_the_formula_is_that_of_the_model_asked_for(settings: dict[str, Any], layer: str) -> None:
    assert f"L·({layer})" in closed_form(ModelConfig(n_embd=192, n_head=3, **settings))


@pytest.mark.parametrize("count", [count_parameters, parameter_shapes, formula_steps])
def test_undecided_vocabulary_is_refused(count: object) -> None:
    with pytest.raises(InputError, match=r"vocab_size is auto.*give"):
        count(ModelConfig(vocab_size=0))  # type: ignore[operator]


def test_count_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        count_parameters(ModelConfig()).head = 1  # type: ignore[misc]


def test_memory_of_weights() -> None:
    assert weight_bytes(1000) == {"fp32": 4000, "bf16": 2000}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B (0 B)"),
        (999, "999 B (999 B)"),
        (1000, "1.00 kB (1000 B)"),
        (999_994, "999.99 kB (976.56 KiB)"),
        (999_999, "1.00 MB (976.56 KiB)"),
        (10**9, "1.00 GB (953.67 MiB)"),
        (2**30, "1.07 GB (1.00 GiB)"),
        (2**30 - 1, "1.07 GB (1.00 GiB)"),
        (5 * 10**15, "5000.00 TB (4547.47 TiB)"),
    ],
)
def test_sizes_name_their_units(size: int, text: str) -> None:
    assert format_bytes(size) == text
