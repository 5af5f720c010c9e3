"""GGUF files: read back tensor by tensor, and by llama.cpp where it is installed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokenizer_samples as samples
from export.test_export import MODERN, greedy, make_run
from scalegpt.config import ModelConfig
from scalegpt.data.tokenizers import load_tokenizer, make_tokenizer
from scalegpt.export.gguf import rope_factors
from scalegpt.export.gguf_tokenizer import CONTROL, NORMAL, UNUSED, vocabulary
from scalegpt.inference.load import load_model

__all__ = ["make_run"]  # fixtures

gguf = pytest.importorskip("gguf")

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"activation": "gelu_tanh"}),
    "gpt2, biases, untied": ("gpt2", {"activation": "gelu_tanh", "bias": True, "tie_head": False}),
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **PLAIN,
    "gptneox": (
        "gptneox",
        {"bias": True, "position": "rope", "rotary_share": 0.5, "parallel_block": True, "activation": "gelu_tanh"},
    ),
    "llama": ("llama", {**MODERN, "tie_head": False}),
    "llama, head size, linear": ("llama", {**MODERN, "head_size": 16, "rope_scaling": {"type": "linear", "factor": 2}}),
    "llama, llama3": (
        "llama", {**MODERN, "rope_scaling": {"type": "llama3", "factor": 4, "original_block_size": 16}},
    ),
    "llama, yarn": ("llama", {**MODERN, "rope_scaling": {"type": "yarn", "factor": 4, "original_block_size": 16}}),
    "qwen2": ("qwen2", {**MODERN, "bias": "qkv"}),
    "qwen3": ("qwen3", {**MODERN, "qk_norm": True, "head_size": 16}),
}  # fmt: skip
"""A shape of ours → its architecture in llama.cpp."""


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file as fp32."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        data = torch.from_numpy(np.array(tensor.data))
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        found[tensor.name] = data.reshape(shape).float()
    return found


def unpaired(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of neighbours that llama.cpp rotates together → the two halves of each head, as the other formats have them."""
    width = value.shape[0] // heads
    order = [head * width + 2 * i + half for head in range(heads) for half in (0, 1) for i in range(width // 2)]
    return value[order]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_is_read_back(
    name: str, dtype: str, make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    architecture, shape = SHAPES[name]
    run, out = make_run(**shape), tmp_path / "out.gguf"
    assert f"as {architecture}" in call("export", run, "--to", "gguf", "--out", out, "--dtype", dtype)
    model = load_model(run, "cpu").model
    config, found, expected = model.config, tensors(out), {}
    names = {"ln1": "attn_norm", "ln2": "ffn_norm", "attn.proj": "attn_output", "attn.q_norm": "attn_q_norm",
             "attn.k_norm": "attn_k_norm", "mlp.proj": "ffn_down", "attn.qkv": "attn_qkv", "mlp.fc": "ffn_up"}  # fmt: skip
    outside = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "head": "output"}
    for ours, value in model.named_parameters():
        module, _, kind = ours.rpartition(".")
        value = value.detach()[:257] if module in {"wte", "head"} else value.detach()
        if module in outside:
            expected[f"{outside[module]}.{kind}"] = value
            continue
        _, number, inside = module.split(".", 2)
        place = f"blk.{number}."
        if inside == "attn.qkv" and architecture not in {"gpt2", "gptneox"}:
            widths = [heads * config.head_width for heads in (config.n_head, config.kv_heads, config.kv_heads)]
            for part, rows in zip("qkv", value.split(widths), strict=True):
                expected[f"{place}attn_{part}.{kind}"] = rows
        elif inside == "mlp.fc" and config.is_gated:
            expected[f"{place}ffn_gate.{kind}"], expected[f"{place}ffn_up.{kind}"] = value.chunk(2)
        else:
            expected[f"{place}{names[inside]}.{kind}"] = value
    if architecture == "gptneox":
        expected["output.weight"] = expected["token_embd.weight"]
    for key in [key for key in found if key not in expected]:
        assert key == "rope_freqs.weight" or (key.endswith(".bias") and not found[key].any())
    for key, value in expected.items():
        heads = {"attn_q": config.n_head, "attn_k": config.kv_heads}.get(key.split(".")[-2], 0)
        seen = unpaired(found[key], heads) if architecture == "llama" and heads else found[key]
        assert torch.equal(seen, value.bfloat16().float() if dtype == "bf16" and value.dim() > 1 else value), key


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_the_file_says_the_shape_and_the_tokenizer(
    make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    call("export", make_run(activation="gelu_tanh"), "--to", "gguf", "--out", tmp_path / "out.gguf")
    found = fields(tmp_path / "out.gguf")
    assert found["general.architecture"] == "gpt2"
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    assert [found[f"gpt2.{key}"] for key in sizes] == [80, 32, 2, 128, 2]
    assert found["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert len(found["tokenizer.ggml.tokens"]) == 257
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.eos_token_id"] == 256


def test_the_token_before_every_text_is_said(tiny_run: Any, call: Callable[..., str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(samples.write_with_begin(tmp_path / "tok")))
    run = tiny_run(tokenizer=tokenizer, activation="gelu_tanh")
    call("export", run, "--to", "gguf", "--out", tmp_path / "out.gguf")
    found = fields(tmp_path / "out.gguf")
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.bos_token_id"]) == (True, 600)
    assert not vocabulary(make_tokenizer("gpt2"), 50304).adds_bos


def test_the_tokens_of_gpt2_are_those_of_openai() -> None:
    found = vocabulary(make_tokenizer("gpt2"), 50304)
    assert (found.tokens[0], found.tokens[198], found.tokens[50256], found.tokens[50303]) == (
        "!", "Ċ", "<|endoftext|>", "[PAD50303]",
    )  # fmt: skip
    assert (found.types[0], found.types[50256], found.types[50303]) == (NORMAL, CONTROL, UNUSED)
    assert len(found.merges) == 50_000


def test_exact_gelu_is_written_with_a_remark(
    make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    facts = json.loads(call("export", make_run(), "--to", "gguf", "--out", tmp_path / "out.gguf", "--json"))
    assert facts["notes"] == ["the model was trained with exact GELU, but llama.cpp computes its tanh form"]


@pytest.mark.parametrize(
    ("tokenizer", "shape", "expected"),
    [
        ("char", {}, "llama.cpp does not read this tokenizer (char)"),
        ("byte", {"activation": "relu2"}, "activation relu2; use --to hf"),
    ],
)
def test_what_llama_cpp_does_not_read_is_refused(
    make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path, tokenizer: str, shape: Any, expected: str
) -> None:
    assert expected in call(
        "export", make_run(tokenizer, **shape), "--to", "gguf", "--out", tmp_path / "x.gguf", status=2
    )
    assert not list(tmp_path.glob("*.gguf"))


def test_llama3s_scaling_divides_long_wavelengths() -> None:
    scaling = {"type": "llama3", "factor": 8.0, "original_block_size": 8192}
    model = ModelConfig(
        n_embd=64, n_head=1, position="rope", rope_theta=500_000.0,
        rope_scaling=ModelConfig.from_mapping({"position": "rope", "rope_scaling": scaling}, "").rope_scaling,
    )  # fmt: skip
    factors = rope_factors(model)
    assert factors is not None
    wavelengths = [2 * math.pi * 500_000 ** (2 * i / 64) for i in range(32)]
    for length, factor in zip(wavelengths, factors.tolist(), strict=True):
        expected = 8.0 if length > 8192 else 1.0 if length < 2048 else None
        assert expected is None or factor == pytest.approx(expected)
        assert 1 <= factor <= 8


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_continues_a_prompt_as_we_do(
    name: str, make_run: Callable[..., Path], call: Callable[..., str], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    run, out = make_run(**SHAPES[name][1]), tmp_path / "out.gguf"
    call("export", run, "--to", "gguf", "--out", out)
    theirs, ours = llama_cpp.Llama(str(out), n_ctx=80, verbose=False, n_threads=1), load_model(run, "cpu")
    ids = theirs.tokenize(b"once upon", add_bos=False)
    assert ids == ours.prompt_ids("once upon")
    drawn: list[int] = []
    for token in theirs.generate(ids, temp=0.0, repeat_penalty=1.0):
        drawn.append(token)
        if len(drawn) == 50:
            break
    assert drawn == greedy(ours, torch.tensor([ids]), 50)
