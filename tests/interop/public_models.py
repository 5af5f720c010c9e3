"""What public models' own configuration files say, and their published numbers of parameters.

The values are those of ``config.json`` at https://huggingface.co/REPOSITORY, without the keys that do not matter to a model's
shape; litgpt's ``config.py`` (0.5.13) has the same. The numbers of parameters are the Hub's, from the headers of the
``safetensors`` files, each tensor once.
"""

from typing import Any, NamedTuple


class Public(NamedTuple):
    """A public model: its repository, number of parameters, and the shape in its ``config.json``."""

    repository: str
    parameters: int
    config: dict[str, Any]


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    """Llama's keys; ``others`` over them."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    } | others


def smollm2(*sizes: int, rope_theta: int) -> dict[str, Any]:
    common = {"max_position_embeddings": 8192, "tie_word_embeddings": True, "vocab_size": 49152}
    return llama(*sizes, **common, rope_theta=rope_theta, mlp_bias=False)


def llama_3_2(*sizes: int, head_dim: int) -> dict[str, Any]:
    scaling = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    common = {"max_position_embeddings": 131072, "tie_word_embeddings": True, "vocab_size": 128256}
    return llama(*sizes, **common, head_dim=head_dim, rope_scaling=scaling, rope_theta=500000.0, mlp_bias=False)


def qwen3(*sizes: int, tied: bool = True) -> dict[str, Any]:
    return llama(*sizes) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": sizes[2],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


def pythia(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_parallel_residual": True,
        "vocab_size": 50304,
    }


def gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": width,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": 1024,
        "vocab_size": 50257,
    }


PUBLIC: dict[str, Public] = {
    "gpt2": Public("openai-community/gpt2", 124_439_808, gpt2(768, 12, 12)),
    "gpt2-medium": Public("openai-community/gpt2-medium", 354_823_168, gpt2(1024, 24, 16)),
    "gpt2-large": Public("openai-community/gpt2-large", 774_030_080, gpt2(1280, 36, 20)),
    "gpt2-xl": Public("openai-community/gpt2-xl", 1_557_611_200, gpt2(1600, 48, 25)),
    "pythia-160m": Public("EleutherAI/pythia-160m", 162_322_944, pythia(768, 12, 12)),
    "pythia-410m": Public("EleutherAI/pythia-410m", 405_334_016, pythia(1024, 24, 16)),
    "pythia-1.4b": Public("EleutherAI/pythia-1.4b", 1_414_647_808, pythia(2048, 24, 16)),
    "SmolLM2-135M": Public(
        "HuggingFaceTB/SmolLM2-135M", 134_515_008, smollm2(576, 1536, 30, 9, 3, rope_theta=100000)
    ),
    "SmolLM2-360M": Public(
        "HuggingFaceTB/SmolLM2-360M", 361_821_120, smollm2(960, 2560, 32, 15, 5, rope_theta=100000)
    ),
    "SmolLM2-1.7B": Public(
        "HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384, smollm2(2048, 8192, 24, 32, 32, rope_theta=130000)
    ),
    "Qwen3-0.6B": Public("Qwen/Qwen3-0.6B", 596_049_920, qwen3(1024, 3072, 28, 16, 8)),
    "Qwen3-1.7B": Public("Qwen/Qwen3-1.7B", 1_720_574_976, qwen3(2048, 6144, 28, 16, 8)),
    "Qwen3-4B": Public("Qwen/Qwen3-4B", 4_022_468_096, qwen3(2560, 9728, 36, 32, 8)),
    "Qwen3-8B": Public("Qwen/Qwen3-8B", 8_190_735_360, qwen3(4096, 12288, 36, 32, 8, tied=False)),
    "TinyLlama-1.1B": Public(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        1_100_048_384,
        llama(
            2048, 5632, 22, 32, 4, max_position_embeddings=2048, tie_word_embeddings=False, vocab_size=32000,
            rope_theta=10000.0, torch_dtype="float32",
        ),
    ),
    "Llama-3.2-1B": Public("meta-llama/Llama-3.2-1B", 1_235_814_400, llama_3_2(2048, 8192, 16, 32, 8, head_dim=64)),
    "Llama-3.2-3B": Public("meta-llama/Llama-3.2-3B", 3_212_749_824, llama_3_2(3072, 8192, 28, 24, 8, head_dim=128)),
    "Llama-3-8B": Public(
        "meta-llama/Meta-Llama-3-8B",
        8_030_261_248,
        llama(
            4096, 14336, 32, 32, 8, max_position_embeddings=8192, tie_word_embeddings=False, vocab_size=128256,
            rope_theta=500000.0,
        ),
    ),
}  # fmt: skip
"""Name of the preset → the model."""
