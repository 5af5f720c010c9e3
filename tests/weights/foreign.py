"""Small random models of transformers, for the families that ScaleGPT reads, as folders on the disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY, BLOCK = 97, 64

MODERN = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": BLOCK, "vocab_size": VOCABULARY,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
PYTHIA = {
    **{key: value for key, value in MODERN.items() if key != "num_key_value_heads"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
}

GPT2: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied, exact gelu": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 80}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", PYTHIA),
    "gpt_neox tied, one after the other": (
        "gpt_neox", {**PYTHIA, "tie_word_embeddings": True, "use_parallel_residual": False, "hidden_act": "gelu_new"},
    ),
    "llama": ("llama", MODERN),
    "llama tied, theta 500000, biases": (
        "llama", {**MODERN, "tie_word_embeddings": True, "rope_theta": 500_000.0, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, head size 16, llama3": ("llama", {**MODERN, "head_dim": 16, "rope_parameters": LLAMA3}),
    "llama, one head of keys, yarn": ("llama", {**MODERN, "num_key_value_heads": 1, "rope_parameters": YARN}),
    "mistral, linear": ("mistral", {**MODERN, "sliding_window": None, "rope_parameters": LINEAR}),
    "smollm3": ("smollm3", {**MODERN, "no_rope_layers": [1, 1], "pad_token_id": 0}),
    "qwen2": ("qwen2", MODERN),
    "qwen2 tied": ("qwen2", {**MODERN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**MODERN, "head_dim": 16}),
    "qwen3 tied": ("qwen3", {**MODERN, "head_dim": 8, "tie_word_embeddings": True}),
}  # fmt: skip

MODELS = {**GPT2, **OTHERS}
"""Name of a case → ``model_type`` and keys of the configuration."""


def random_model(name: str, seed: int = 0, **keys: Any) -> Any:
    """A model of :data:`MODELS` with random weights, norms and biases, all far enough from zero and one to matter."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    kind, values = MODELS[name]
    small = (
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": BLOCK, "vocab_size": VOCABULARY}
        if kind == "gpt2"
        else {}
    )
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **{**small, **special, **values, **keys})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """The model's folder, with dropout off."""
    model.save_pretrained(folder, **options)
    config = json.loads((folder / "config.json").read_text())
    config |= {key: 0.0 for key in config if key.endswith(("pdrop", "dropout"))}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
