"""Writes a model as a GGUF file for ``llama.cpp``, with the ``gguf`` package. Tensors are written one at a time.

Matrices have the dtype that was asked for; norms and biases are fp32, as ``llama.cpp`` requires. ``llama.cpp`` computes GELU
only in its tanh form.
"""

import glob
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalegpt.checkpoint.inspection import publish
from scalegpt.config import ModelConfig
from scalegpt.config.rope import LINEAR, LLAMA3, YARN
from scalegpt.errors import InputError
from scalegpt.export.gguf_tokenizer import Vocabulary, vocabulary
from scalegpt.export.source import Source
from scalegpt.interop.families import as_config
from scalegpt.storage import check_space, disk_errors, remove_temporaries, sync_folder, temporary_name
from scalegpt.weights.layouts import Target, targets, to_theirs
from scalegpt.weights.table import GGUF

INSTALL = "pip install 'scalegpt[gguf]'"

ARCHITECTURES = {
    "gpt2": "gpt2", "gpt_neox": "gptneox", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
"""Family of Hugging Face → the equivalent architecture in ``llama.cpp``."""

GATED = "swiglu"
PLAIN = {"gelu": "the model was trained with exact GELU, but llama.cpp computes its tanh form", "gelu_tanh": None}
"""Activation without a gate → the remark on it."""

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Written:
    """A GGUF file that was written: the architecture in ``llama.cpp``, the size of its tensors, and remarks, a line each."""

    family: str
    bytes: int
    notes: tuple[str, ...]


def write_gguf(source: Source, out: Path) -> Written:
    """Write a model and its tokenizer as one GGUF file.

    Raises:
        InputError: the gguf package is not installed; ``llama.cpp`` has no such model or tokenizer; the file exists, or
            cannot be written.
    """
    architecture, notes = _architecture(source.model)
    layout = GGUF[architecture]
    if architecture == "gptneox" and source.model.tie_head:  # llama.cpp reads a head for this architecture always
        source = source.with_head()
    tokens = vocabulary(source.tokenizer, source.model.vocab_size)
    wanted = targets(source.model, layout)
    if out.exists():
        raise InputError(f"{out} exists already; choose another --out")
    size = sum(_bytes(target, source) for target in wanted)
    check_space(out, size)
    temporary = temporary_name(out)
    with disk_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(out.parent, glob.escape(out.name))
        try:
            _write(_writer(architecture, source, tokens), source, wanted, temporary)
            publish(temporary, out)
            sync_folder(out.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)
    return Written(architecture, size, notes)


def _architecture(model: ModelConfig) -> tuple[str, tuple[str, ...]]:
    """The architecture in ``llama.cpp`` for a shape, and remarks on what it computes differently.

    Raises:
        InputError: no architecture computes this shape.
    """
    family = as_config(model)["model_type"]
    name = ARCHITECTURES.get(family)
    if name is None or (model.is_gated and model.activation != GATED):
        what = f"activation {model.activation}" if name else f"models of the family {family}"
        raise InputError(f"llama.cpp does not read {what}; use --to hf")
    if not model.is_gated and model.activation not in PLAIN:
        raise InputError(f"llama.cpp does not compute activation {model.activation}; use --to hf")
    scaling = model.rope_scaling
    if scaling is not None and scaling.type == LLAMA3 and name != "llama":
        raise InputError(f"llama.cpp reads rope_scaling llama3 for Llama only, not for {name}; use --to hf")
    note = None if model.is_gated else PLAIN[model.activation]
    return name, () if note is None else (note,)


def _writer(architecture: str, source: Source, tokens: Vocabulary) -> Any:
    """The package's writer, with everything but the tensors.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise InputError(f"--to gguf needs the package gguf, which is not installed; run {INSTALL}") from None
    model = source.model
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(str(source.header.config.get("name") or "model"))
    types = {"fp32": gguf.LlamaFileType.ALL_F32, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
    writer.add_file_type(types[source.dtype])
    writer.add_context_length(source.positions)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.inner_width)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_width)
    writer.add_value_length(model.head_width)
    writer.add_vocab_size(model.vocab_size)
    (writer.add_layer_norm_rms_eps if model.norm == "rmsnorm" else writer.add_layer_norm_eps)(model.norm_eps)
    if architecture == "gptneox":
        writer.add_parallel_residual(model.parallel_block)
    if model.position == "rope":
        _add_rope(writer, gguf.RopeScalingType, model)
    tokens.add_to(writer)
    return writer


def _add_rope(writer: Any, kinds: Any, model: ModelConfig) -> None:
    writer.add_rope_dimension_count(model.rotary_width)
    writer.add_rope_freq_base(model.rope_theta)
    scaling = model.rope_scaling
    if scaling is None or scaling.type == LLAMA3:
        return
    writer.add_rope_scaling_type({LINEAR: kinds.LINEAR, YARN: kinds.YARN}[scaling.type])
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.type == YARN:
        assert scaling.original_block_size is not None
        writer.add_rope_scaling_orig_ctx_len(scaling.original_block_size)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        if scaling.attention_factor is not None:  # a factor over the one that llama.cpp computes itself
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1))


def rope_factors(model: ModelConfig) -> Tensor | None:
    """The divisors of the rotary frequencies for Llama 3's scaling, fp32 [D/2]; None without that scaling.

    Source: Llama 3.1's reference code, ``apply_scaling``. A wavelength above (original context) / ``low_freq_factor``
    has the divisor ``factor``, a wavelength below (original context) / ``high_freq_factor`` has 1, and wavelengths
    between have a mean of both.
    """
    scaling = model.rope_scaling
    if scaling is None or scaling.type != LLAMA3:
        return None
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_block_size
    assert low is not None
    assert high is not None
    assert original is not None
    exponents = torch.arange(0, model.rotary_width, 2, dtype=torch.float64) / model.rotary_width
    wavelengths = 2 * math.pi * model.rope_theta**exponents
    kept = ((original / wavelengths - low) / (high - low)).clamp(0, 1)  # the share of a frequency that is not scaled
    return (1 / (kept + (1 - kept) / scaling.factor)).float()


def _write(writer: Any, source: Source, wanted: list[Target], path: Path) -> None:
    import gguf
    import numpy as np

    types = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    factors = rope_factors(source.model)
    extra = [] if factors is None else [(ROPE_FACTORS, factors)]
    for name, value in extra:
        writer.add_tensor_info(name, tuple(value.shape), np.dtype(np.float32), value.nbytes, types[value.dtype])
    for target in wanted:
        kind = types[_dtype(target, source)]
        # The type says the dtype; numpy's dtype is only looked at to unpack shapes of bytes.
        writer.add_tensor_info(target.name, target.shape, np.dtype(np.float32), _bytes(target, source), kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for _, value in extra:
            writer.write_tensor_data(value.numpy())
        for value in _values(source, wanted):
            flat: Any = value.contiguous().view(-1).view(torch.uint8).numpy()
            writer.write_tensor_data(flat)
    finally:
        writer.close()


def _values(source: Source, wanted: list[Target]) -> Iterator[Tensor]:
    for target, value in zip(wanted, to_theirs(source.read, wanted, source.model), strict=True):
        yield value.to(_dtype(target, source))


def _dtype(target: Target, source: Source) -> torch.dtype:
    return torch.bfloat16 if source.dtype == "bf16" and len(target.shape) > 1 else torch.float32


def _bytes(target: Target, source: Source) -> int:
    return math.prod(target.shape) * _dtype(target, source).itemsize
