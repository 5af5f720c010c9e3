"""Hugging Face configurations, read and written; transformers itself says what its own files mean."""

import json
from pathlib import Path
from typing import Any

import pytest

from scalegpt.config.rope import RopeScaling
from scalegpt.config.shape import ModelConfig
from scalegpt.errors import InputError
from scalegpt.interop.families import FAMILIES, as_config, families_of, read_config

MODERN = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu"}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**MODERN, "n_head": 6, "n_kv_head": 2, "rope_theta": 500_000.0, "norm_eps": 1e-6},
    "qwen3": {**MODERN, "n_head": 6, "n_kv_head": 2, "head_size": 48, "qk_norm": True, "tie_head": True},
    "qwen2": {**MODERN, "n_head": 6, "n_kv_head": 2, "bias": "qkv", "tie_head": False},
    "gpt2": {"bias": True, "activation": "gelu_tanh", "dropout": 0.1},
    "gpt_neox": {"bias": True, "position": "rope", "rotary_share": 0.25, "parallel_block": True, "n_inner": 500},
    "mistral": {**MODERN, "n_embd": 200, "n_head": 6, "n_kv_head": 2, "head_size": 32},
    "smollm3": {**MODERN, "position": "none", "n_inner": 500},
}
"""Family → a shape that this family is the first to have."""


def folder(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def small(family: str, **changes: Any) -> dict[str, Any]:
    """A small model's configuration of a family, with some keys changed; a key that is changed to ``...`` is left out."""
    config = as_config(ModelConfig(**SHAPES[family]), family) | changes
    return {key: value for key, value in config.items() if value is not ...}


def refusal(path: Path, config: dict[str, Any], block_size: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_config(folder(path, config), block_size)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_shape_is_read_again(family: str, tmp_path: Path) -> None:
    model = ModelConfig(**SHAPES[family])
    assert families_of(model)[0] == family
    read = read_config(folder(tmp_path / "small-model", as_config(model)))
    assert (read.family, read.name, read.bos, read.pad, read.eos) == (family, "small-model", None, None, ())
    assert read.model == model
    assert read_config(tmp_path / "small-model" / "config.json") == read


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["earlier", "of transformers 5"])
def test_transformers_reads_what_is_written_and_its_own_files_are_read(family: str, form: str, tmp_path: Path) -> None:
    """Both forms of rotary parameters; the file that transformers writes back says the same model."""
    transformers = pytest.importorskip("transformers")
    model = ModelConfig(**SHAPES[family])
    config = as_config(model)
    if form == "of transformers 5":
        loaded = transformers.AutoConfig.from_pretrained(folder(tmp_path / "ours", config))
        loaded.save_pretrained(tmp_path / "theirs")
        config = json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
        assert ("rope_parameters" in config) == (FAMILIES[family].theta is not None)
        config["architectures"] = [FAMILIES[family].architecture]
    assert read_config(folder(tmp_path / "again", config)).model == model


# --- rotary positions --------------------------------------------------------------------------------------------------

LLAMA3 = RopeScaling(type="llama3", factor=8.0, original_block_size=8192)
SCALINGS = {
    "none": ({}, None),
    "default": ({"rope_type": "default"}, None),
    "linear": ({"type": "linear", "factor": 2}, RopeScaling(factor=2.0)),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        LLAMA3,
    ),
    "llama3 of the whole context": (
        {"rope_type": "llama3", "factor": 8.0},
        RopeScaling(type="llama3", factor=8.0, original_block_size=256),
    ),
    "yarn": (
        {"type": "yarn", "original_max_position_embeddings": 64},
        RopeScaling(type="yarn", factor=4.0, original_block_size=64),
    ),
    "yarn with scales": (
        {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale": 1, "mscale_all_dim": 1},
        RopeScaling(type="yarn", factor=40.0, original_block_size=64, attention_factor=1.0),
    ),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaling_in_both_forms(scaling: str, tmp_path: Path) -> None:
    values, expected = SCALINGS[scaling]
    earlier = small("llama", rope_scaling=values or None, rope_theta=1e6)
    newer = small("llama", rope_scaling=..., rope_theta=..., rope_parameters={**values, "rope_theta": 1e6})
    for form, config in {"earlier": earlier, "newer": newer}.items():
        model = read_config(folder(tmp_path / form, config)).model
        assert (model.rope_scaling, model.rope_theta) == (expected, 1e6), form
        assert read_config(folder(tmp_path / form / "again", as_config(model))).model == model


def test_parameters_by_kind_of_layer(tmp_path: Path) -> None:
    by_kind = {"full_attention": {"rope_type": "default", "rope_theta": 5e6}}
    config = small("qwen3", rope_theta=..., rope_scaling=..., rope_parameters=by_kind)
    assert read_config(folder(tmp_path, config)).model.rope_theta == 5e6


def test_defaults_are_the_family_s(tmp_path: Path) -> None:
    neox = small("gpt_neox", rotary_pct=..., rotary_emb_base=..., tie_word_embeddings=..., rope_scaling=...)
    model = read_config(folder(tmp_path / "neox", neox)).model
    assert (model.rotary_share, model.rope_theta, model.tie_head) == (0.25, 10_000, False)
    gpt2 = small(
        "gpt2", n_inner=None, activation_function=..., tie_word_embeddings=..., attn_pdrop=..., n_positions=...
    )
    model = read_config(folder(tmp_path / "gpt2", gpt2)).model
    assert (model.n_inner, model.activation, model.tie_head, model.dropout) == (None, "gelu_tanh", True, 0.1)
    assert model.block_size == 1024
    qwen = small("qwen3", head_dim=..., tie_word_embeddings=..., num_key_value_heads=None)
    model = read_config(folder(tmp_path / "qwen3", qwen)).model
    assert (model.head_width, model.tie_head, model.kv_heads) == (128, False, 6)


def test_dtype_and_special_tokens(tmp_path: Path) -> None:
    read = read_config(
        folder(tmp_path / "a", small("llama", torch_dtype="bfloat16", eos_token_id=[5, 7], bos_token_id=1))
    )
    assert (read.dtype, read.bos, read.eos, read.pad) == ("bfloat16", 1, (5, 7), None)
    assert read_config(folder(tmp_path / "b", small("llama", dtype="float16"))).dtype == "float16"
    read = read_config(folder(tmp_path / "c", small("gpt2", eos_token_id=..., bos_token_id=...)))
    assert (read.bos, read.eos, read.dtype) == (50256, (50256,), None)


# --- windows -----------------------------------------------------------------------------------------------------------


def test_a_window_bounds_the_block(tmp_path: Path) -> None:
    folder(tmp_path, small("mistral", max_position_embeddings=1024, sliding_window=128))
    read = read_config(tmp_path)
    assert (read.model.block_size, read.window, read.positions) == (128, 128, 1024)
    assert "looks back 128 tokens" in read.notes[0]
    read = read_config(tmp_path, block_size=64)
    assert (read.model.block_size, read.notes) == (64, ())
    assert "give --block_size 128 or less" in refusal(tmp_path, json.loads((tmp_path / "config.json").read_text()), 256)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 64}, None),
        ({"sliding_window": 64, "use_sliding_window": True}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, 64),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 4}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, 64),
        ({"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 2}, None),
    ],
)
def test_a_window_counts_where_it_is_switched_on(changes: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    read = read_config(folder(tmp_path, small("qwen2", **changes)))
    assert (read.window, read.model.block_size) == (window, window or 256)


def test_learned_positions_have_an_end_and_rotary_ones_have_none(tmp_path: Path) -> None:
    assert read_config(folder(tmp_path / "gpt2", small("gpt2")), block_size=128).model.block_size == 128
    assert "256 positions" in refusal(tmp_path / "gpt2", small("gpt2"), 512)
    assert read_config(folder(tmp_path / "llama", small("llama")), block_size=512).model.block_size == 512


def test_dropouts_that_differ_are_said(tmp_path: Path) -> None:
    read = read_config(folder(tmp_path, small("gpt2", attn_pdrop=0.0)))
    assert read.model.dropout == 0
    assert "attn_pdrop 0.0 is not used" in read.notes[0]


# --- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no model": ("llama", {"model_type": ...}, "model_type is missing"),
    "unknown": ("llama", {"model_type": "nonesuch"}, "'nonesuch' is not supported; supported: llama, qwen3"),
    "post-norms": ("llama", {"model_type": "olmo2"}, "norms come after"),
    "experts": ("llama", {"model_type": "mixtral"}, "mixture of experts"),
    "experts of an unknown type": ("llama", {"model_type": "nonesuch", "num_experts": 8}, "mixture of experts"),
    "own code": ("llama", {"auto_map": {"AutoConfig": "configuration.Own"}}, "auto_map"),
    "not a language model": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
    "quantised": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    "missing size": ("llama", {"hidden_size": ...}, "hidden_size is missing"),
    "bad size": ("llama", {"num_hidden_layers": 0}, "the setting is called num_hidden_layers"),
    "word for a size": ("llama", {"hidden_size": "wide"}, "the setting is called hidden_size"),
    "other activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "only silu, swish, gelu"),
    "plain relu": ("gpt2", {"activation_function": "relu"}, "activation_function 'relu' is not supported"),
    "dynamic positions": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "type 'dynamic'"),
    "scaling without factor": ("llama", {"rope_scaling": {"type": "linear"}}, "need a factor"),
    "scaling that is a word": ("llama", {"rope_scaling": "linear"}, "must be an object"),
    "partial rotation": ("llama", {"partial_rotary_factor": 0.5}, "no meaning in llama"),
    "some biases": ("llama", {"attention_bias": True}, "both must be true, or both false"),
    "bias of qwen3": ("qwen3", {"attention_bias": True}, "attention_bias True is not supported in qwen3"),
    "no scale": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
    "scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "only false"),
    "some layers without positions": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}, "in only some of its layers"),
    "every fourth by default": ("smollm3", {"no_rope_layers": ...}, "in only some of its layers"),
    "linear attention": ("qwen3", {"layer_types": ["linear_attention"] * 4}, "'linear_attention' are not supported"),
    "bad window": ("mistral", {"sliding_window": "wide"}, "sliding_window must be a whole number"),
    "bad token": ("llama", {"eos_token_id": "</s>"}, "eos_token_id must be a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_named(case: str, tmp_path: Path) -> None:
    family, changes, said = REFUSED[case]
    assert said in refusal(tmp_path, small(family, **changes))


def test_paths_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is downloaded"):
        read_config(Path("Qwen/Qwen3-0.6B"))
    with pytest.raises(InputError, match="no Hugging Face model"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge both first"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_config(tmp_path)


# --- shapes that no family has -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**MODERN, "logit_softcap": 30.0}, "the nearest is llama, which needs logit_softcap none"),
        ({**MODERN, "qk_norm": True, "bias": "qkv"}, "the nearest is qwen3, which needs bias false"),
        ({**MODERN, "activation": "relu2"}, "the nearest is llama, which needs activation swiglu or geglu"),
        ({"n_kv_head": 1}, "the nearest is gpt2, which needs n_kv_head 3"),
        ({"position": "rope", "n_head": 6, "n_kv_head": 2}, "the nearest is gpt_neox, which needs n_kv_head 6"),
    ],
)
def test_the_nearest_family_is_named(changes: dict[str, Any], said: str) -> None:
    model = ModelConfig(**changes)
    assert families_of(model) == ()
    with pytest.raises(InputError, match="no Hugging Face family") as caught:
        as_config(model)
    assert said in str(caught.value)


def test_a_family_that_is_asked_for(tmp_path: Path) -> None:
    model = ModelConfig(**SHAPES["llama"])
    assert read_config(folder(tmp_path, as_config(model, "mistral"))).model == model
    with pytest.raises(InputError, match="qwen3 models do not have this shape; they need qk_norm true"):
        as_config(model, "qwen3")
    with pytest.raises(InputError, match="did you mean llama"):
        as_config(model, "lama")


def test_gpt2_without_biases_is_written_with_them(tmp_path: Path) -> None:
    read = read_config(folder(tmp_path, as_config(ModelConfig())))
    assert (read.family, read.model.bias) == ("gpt2", True)


# --- broken files ------------------------------------------------------------------------------------------------------

JUNK = (
    None,
    "",
    "x",
    True,
    -1,
    0,
    0.5,
    1e30,
    10**39,
    [],
    [1],
    ["x"],
    {},
    {"a": {}},
    {"full_attention": 1},
    [None],
    [[1]],
)
KEYS = (
    "architectures", "model_type", "rope_scaling", "rope_parameters", "layer_types", "dtype", "torch_dtype", "eos_token_id",
    "use_sliding_window", "sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval", "pruned_heads",
    "quantization_config", "auto_map", "attention_dropout", "partial_rotary_factor",
)  # fmt: skip


def is_refused(path: Path, config: dict[str, Any]) -> bool:
    """Whether a configuration is refused; any other error fails the test."""
    try:
        read_config(folder(path, config))
    except InputError as error:
        return "\n" not in str(error) or pytest.fail(str(error))
    return False


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_key_is_read_or_refused_in_one_line(family: str, tmp_path: Path) -> None:
    whole = small(family)
    assert sum(is_refused(tmp_path, whole | {key: junk}) for key in {*whole, *KEYS} for junk in JUNK) > 100


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_any_value_in_rotary_parameters_is_read_or_refused(kind: str, form: str, tmp_path: Path) -> None:
    whole = {"rope_type": kind, "factor": 2, "mscale": 1, "mscale_all_dim": 1}
    keys = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    others = ("type", "attention_factor", "truncate", "rope_theta")
    config = small("llama", rope_scaling=...)
    assert any(
        is_refused(tmp_path, config | {form: whole | {key: junk}}) for key in (*whole, *keys, *others) for junk in JUNK
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """The count of transformers' model, from its modules made without memory, is the count of ours."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from scalegpt.architecture.counting import count_parameters

    model = ModelConfig(**SHAPES[family])
    loaded = transformers.AutoConfig.from_pretrained(folder(tmp_path, as_config(model)))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(loaded)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count_parameters(model).total
