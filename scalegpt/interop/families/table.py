"""The families of models in Hugging Face's transformers that :class:`~scalegpt.config.shape.ModelConfig` can express.

The keys and defaults are those of the ``configuration_*.py`` in transformers 5.24. A default is the value of a key that
a file does not have. Some defaults are surprising: Qwen3's heads have 128 numbers, whatever the width of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAIN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""Activation of transformers → ours, in feed-forward layers without a gate."""

GATED_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
"""Activation of transformers → ours, in gated feed-forward layers."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The common properties of all models of one ``model_type``, and the keys in which they differ.

    Attributes:
        name: the ``model_type``.
        architecture: the class of the causal language model, as in ``architectures``.
        keys: our setting → key of the file.
        defaults: key → its value if the file lacks it; a key of ``keys`` without a default is required.
        always: our setting → the value that every model of the family has.
        fills_biases: whether every linear layer and norm has a bias; our models without biases are then written with
            zeros.
        must: key → the only value with which the model computes what ours does.
        activation_key: the key of the activation.
        activations: value of that key → our activation. The first value for an activation is the one that is written.
        bias_keys: keys that switch biases on; they must agree, and together they are our ``bias``.
        dropouts: keys of dropout that together are our ``dropout``.
        theta: the key of the rotary base and its default; None: there is no rotation.
        share: the key of the rotated share of a head and its default; None: always the whole head.
        window: the key of the attention window; None: there is none.
        window_switch: the key that switches the window on; None: it needs no switch.
        rope_layers: the key of the list that says which layers rotate; None: all do.
        splits_width: whether the number of heads must divide the width even if the file gives the size of a head.
        repeats: our setting → a second key with its value, which is written because other programs read it.
    """

    name: str
    architecture: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    always: Mapping[str, Any]
    fills_biases: bool = False
    must: Mapping[str, Any] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=lambda: GATED_ACTIVATIONS)
    bias_keys: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    theta: tuple[str, float] | None = ("rope_theta", 10_000.0)
    share: tuple[str, float] | None = None
    window: str | None = None
    window_switch: str | None = None
    rope_layers: str | None = None
    splits_width: bool = True
    repeats: Mapping[str, str] = field(default_factory=dict)


_SIZES = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "tie_head": "tie_word_embeddings",
}
_LLAMA = {**_SIZES, "n_kv_head": "num_key_value_heads", "norm_eps": "rms_norm_eps"}
_HEAD = {"head_size": "head_dim"}
_RMS = {"norm": "rmsnorm", "position": "rope", "qk_norm": False, "parallel_block": False, "bias": False}
_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
_BIASED = {"attention_bias": False, "mlp_bias": False}

_TABLE = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        keys={**_LLAMA, **_HEAD},
        defaults={**_LLAMA_DEFAULTS, **_BIASED, "head_dim": None},
        always={key: value for key, value in _RMS.items() if key != "bias"},
        bias_keys=("attention_bias", "mlp_bias"),
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        keys={**_LLAMA, **_HEAD},
        defaults={**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
        always={**_RMS, "qk_norm": True},
        must={"attention_bias": False},
        window="sliding_window",
        window_switch="use_sliding_window",
        splits_width=False,
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        keys=_LLAMA,
        defaults=_QWEN_DEFAULTS,
        always={**_RMS, "bias": "qkv"},
        window="sliding_window",
        window_switch="use_sliding_window",
    ),
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        keys={
            "n_layer": "n_layer",
            "n_embd": "n_embd",
            "n_head": "n_head",
            "n_inner": "n_inner",
            "vocab_size": "vocab_size",
            "block_size": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tie_head": "tie_word_embeddings",
        },
        defaults={
            "n_inner": None,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "attn_pdrop": 0.1,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        always={
            "norm": "layernorm",
            "position": "learned",
            "qk_norm": False,
            "parallel_block": False,
            "bias": True,
        },
        fills_biases=True,
        must={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        activation_key="activation_function",
        activations=PLAIN_ACTIVATIONS,
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        theta=None,
        repeats={"block_size": "n_ctx"},  # llama.cpp reads it
    ),
    Family(
        name="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        keys={**_SIZES, "norm_eps": "layer_norm_eps", "parallel_block": "use_parallel_residual"},
        defaults={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "attention_bias": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        always={"norm": "layernorm", "position": "rope", "qk_norm": False, "bias": True},
        fills_biases=True,
        must={"attention_bias": True},
        activations=PLAIN_ACTIVATIONS,
        dropouts=("attention_dropout", "hidden_dropout"),
        theta=("rotary_emb_base", 10_000.0),
        share=("rotary_pct", 0.25),
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        keys={**_LLAMA, **_HEAD},
        defaults={
            **_LLAMA_DEFAULTS,
            "head_dim": None,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
        always=_RMS,
        window="sliding_window",
        splits_width=False,
    ),
    Family(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        keys=_LLAMA,
        defaults={
            **_LLAMA_DEFAULTS,
            **_BIASED,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 0,
            "no_rope_layer_interval": 4,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
        },
        always={key: value for key, value in _RMS.items() if key not in {"bias", "position"}},
        bias_keys=("attention_bias", "mlp_bias"),
        theta=("rope_theta", 2_000_000.0),
        window="sliding_window",
        window_switch="use_sliding_window",
        rope_layers="no_rope_layers",
    ),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in _TABLE}
"""``model_type`` → its family. A model is written as the first family that has its shape. More programs read the first
families."""

_POST_NORM = "its norms come after attention and feed-forward"
_EXPERTS = "it is a mixture of experts"
_GEMMA = "it scales embeddings and has further norms"

UNSUPPORTED = {
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmo": "its norms have no weights",
    "gemma": "it scales embeddings, and its norms multiply by 1 + weight",
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "deepseek_v2": _EXPERTS,
    "deepseek_v3": _EXPERTS,
    "llama4": _EXPERTS,
    "llama4_text": _EXPERTS,
    "gpt_neo": "half of its layers attend to a window, and logits of attention are not scaled",
    "gptj": "attention and feed-forward share one norm",
    "phi": "attention and feed-forward share one norm",
    "falcon": "attention and feed-forward share one norm",
    "cohere": "attention and feed-forward share one norm",
    "bloom": "its positions are ALiBi",
    "mpt": "its positions are ALiBi",
    "opt": "its positions begin at 2, and its activation is ReLU",
    "granite": "it multiplies embeddings, residuals and logits by constants",
    "qwen3_next": "it has layers of linear attention",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
}
"""``model_type`` → why a model of that type cannot be expressed."""
