"""The layouts of the families of Hugging Face models, and of the models that ``llama.cpp`` reads (GGUF).

The key of a family is its ``model_type``, as in :data:`scalegpt.interop.families.FAMILIES`; that of a GGUF layout is the
architecture's name in ``llama.cpp``.
"""

from scalegpt.weights.layouts import BY_HEAD, CONV1D, IN_PAIRS, SAME, Layout, Place

_BLOCK = "blocks.{n}."

_EVERY_BIAS = frozenset(
    {f"{_BLOCK}{name}" for name in ("ln1", "ln2", "attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")} | {"ln_f"}
)


def _gpt2() -> Layout:
    block = "transformer.h.{n}."
    return Layout(
        {
            "wte": Place(("transformer.wte",)),
            "wpe": Place(("transformer.wpe",)),
            f"{_BLOCK}ln1": Place((f"{block}ln_1",)),
            f"{_BLOCK}attn.qkv": Place((f"{block}attn.c_attn",), CONV1D),
            f"{_BLOCK}attn.proj": Place((f"{block}attn.c_proj",), CONV1D),
            f"{_BLOCK}ln2": Place((f"{block}ln_2",)),
            f"{_BLOCK}mlp.fc": Place((f"{block}mlp.c_fc",), CONV1D),
            f"{_BLOCK}mlp.proj": Place((f"{block}mlp.c_proj",), CONV1D),
            "ln_f": Place(("transformer.ln_f",)),
            "head": Place(("lm_head",)),
        },
        biased=_EVERY_BIAS,
        base="transformer.",
        ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    )


def _gpt_neox() -> Layout:
    block = "gpt_neox.layers.{n}."
    return Layout(
        {
            "wte": Place(("gpt_neox.embed_in",)),
            f"{_BLOCK}ln1": Place((f"{block}input_layernorm",)),
            f"{_BLOCK}attn.qkv": Place((f"{block}attention.query_key_value",), BY_HEAD),
            f"{_BLOCK}attn.proj": Place((f"{block}attention.dense",)),
            f"{_BLOCK}ln2": Place((f"{block}post_attention_layernorm",)),
            f"{_BLOCK}mlp.fc": Place((f"{block}mlp.dense_h_to_4h",)),
            f"{_BLOCK}mlp.proj": Place((f"{block}mlp.dense_4h_to_h",)),
            "ln_f": Place(("gpt_neox.final_layer_norm",)),
            "head": Place(("embed_out",)),
        },
        biased=_EVERY_BIAS,
        base="gpt_neox.",
        aliases={"embed_out.weight": "lm_head.weight"},
        ignored=r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    )


def _llama() -> Layout:
    """The layout of Llama, and of the families that use Llama's names of tensors: Mistral, SmolLM3, Qwen2, Qwen3."""
    block = "model.layers.{n}."
    return Layout(
        {
            "wte": Place(("model.embed_tokens",)),
            f"{_BLOCK}ln1": Place((f"{block}input_layernorm",)),
            f"{_BLOCK}attn.qkv": Place(tuple(f"{block}self_attn.{kind}_proj" for kind in "qkv")),
            f"{_BLOCK}attn.q_norm": Place((f"{block}self_attn.q_norm",)),
            f"{_BLOCK}attn.k_norm": Place((f"{block}self_attn.k_norm",)),
            f"{_BLOCK}attn.proj": Place((f"{block}self_attn.o_proj",)),
            f"{_BLOCK}ln2": Place((f"{block}post_attention_layernorm",)),
            f"{_BLOCK}mlp.fc": Place((f"{block}mlp.gate_proj", f"{block}mlp.up_proj")),
            f"{_BLOCK}mlp.proj": Place((f"{block}mlp.down_proj",)),
            "ln_f": Place(("model.norm",)),
            "head": Place(("lm_head",)),
        },
        base="model.",
        ignored=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    )


HUGGING_FACE = {
    "gpt2": _gpt2(),
    "gpt_neox": _gpt_neox(),
    **dict.fromkeys(("llama", "mistral", "smollm3", "qwen2", "qwen3"), _llama()),
}
"""``model_type`` → the layout of its tensors."""


def _gguf(
    *, biased: frozenset[str] = frozenset(), split: bool = False, gated: bool = False, paired: bool = False
) -> Layout:
    block = "blk.{n}."
    turned = IN_PAIRS if paired else SAME
    whole = Place((f"{block}attn_qkv",))
    kinds = Place((f"{block}attn_q", f"{block}attn_k", f"{block}attn_v"), (turned, turned, SAME))
    return Layout(
        {
            "wte": Place(("token_embd",)),
            "wpe": Place(("position_embd",)),
            f"{_BLOCK}ln1": Place((f"{block}attn_norm",)),
            f"{_BLOCK}attn.qkv": kinds if split else whole,
            f"{_BLOCK}attn.q_norm": Place((f"{block}attn_q_norm",)),
            f"{_BLOCK}attn.k_norm": Place((f"{block}attn_k_norm",)),
            f"{_BLOCK}attn.proj": Place((f"{block}attn_output",)),
            f"{_BLOCK}ln2": Place((f"{block}ffn_norm",)),
            f"{_BLOCK}mlp.fc": Place((f"{block}ffn_gate", f"{block}ffn_up") if gated else (f"{block}ffn_up",)),
            f"{_BLOCK}mlp.proj": Place((f"{block}ffn_down",)),
            "ln_f": Place(("output_norm",)),
            "head": Place(("output",)),
        },
        biased=biased,
    )


GGUF = {
    "gpt2": _gguf(biased=_EVERY_BIAS),
    "gptneox": _gguf(biased=_EVERY_BIAS),
    "llama": _gguf(split=True, gated=True, paired=True),
    "qwen2": _gguf(split=True, gated=True),
    "qwen3": _gguf(split=True, gated=True),
}
"""Architecture in ``llama.cpp`` → the layout of its tensors."""
