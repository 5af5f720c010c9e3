"""Models of other programs with nanoGPT's interface: called with token ids and targets, they return logits and loss."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from benchmarks.steps.baseline import PlainGPT, Shape


@dataclass(frozen=True, kw_only=True)
class LlamaShape(Shape):
    """The shape of a Llama model with RMSNorm, rotary positions, grouped keys, SwiGLU, a tied head and no biases."""

    n_kv_head: int
    n_inner: int
    rope_theta: float = 1e5
    norm_eps: float = 1e-5
    bias: bool = False


class TransformersModel(nn.Module):
    """``LlamaForCausalLM`` of transformers, with torch's SDPA and transformers' own loss."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head, num_key_value_heads=shape.n_kv_head,
            hidden_size=shape.n_embd, intermediate_size=shape.n_inner, max_position_embeddings=shape.block_size,
            vocab_size=shape.vocab_size, rms_norm_eps=shape.norm_eps, tie_word_embeddings=True, use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] ids and targets → logits [B, T, V] and their mean cross entropy."""
        found = self.model(input_ids=tokens, labels=targets, shift_labels=targets)
        return found.logits, found.loss


class LitGPTModel(nn.Module):
    """``GPT`` of litgpt, with its tied embeddings and its loss, as ``litgpt pretrain`` calls them."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        from litgpt.config import Config
        from litgpt.model import GPT

        config = Config(
            block_size=shape.block_size, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size,
            n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, n_query_groups=shape.n_kv_head,
            rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
            norm_eps=shape.norm_eps, mlp_class_name="LLaMAMLP", intermediate_size=shape.n_inner,
            rope_base=int(shape.rope_theta),
        )  # fmt: skip
        self.model = GPT(config)
        self.model.lm_head.weight = self.model.transformer.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] ids and targets → logits [B, T, V] and their mean cross entropy."""
        from litgpt.utils import chunked_cross_entropy

        logits = self.model(tokens)
        return logits, chunked_cross_entropy(logits, targets)


PEERS: dict[str, tuple[str, Callable[[LlamaShape], nn.Module]]] = {
    "transformers": ("transformers.models.llama.modeling_llama", TransformersModel),
    "litgpt": ("litgpt.model", LitGPTModel),
}
"""Package → the module that has its model, and the function that makes the model."""


def why_missing(peer: str) -> str | None:
    """Why a package of :data:`PEERS` cannot be used; None if it can be used."""
    try:
        importlib.import_module(PEERS[peer][0])
    except ImportError as error:
        return f"{peer} is left out, since it cannot be imported ({error}): pip install {peer}"
    return None


def make_model(name: str, shape: Shape, checkout: Path | None) -> nn.Module:
    """The model of a package of :data:`PEERS`, of a nanoGPT ``checkout``, or else :class:`PlainGPT`."""
    if isinstance(shape, LlamaShape):
        return PEERS[name][1](shape)
    return PlainGPT(shape) if checkout is None else _nanogpt(checkout, shape)


def _nanogpt(checkout: Path, shape: Shape) -> nn.Module:
    """The model of a nanoGPT checkout: ``model.py`` with ``GPT`` and ``GPTConfig``."""
    spec = importlib.util.spec_from_file_location("peers_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, block_size=shape.block_size,
        vocab_size=shape.vocab_size, bias=shape.bias, dropout=0.0,
    )  # fmt: skip
    model: nn.Module = module.GPT(config)
    return model
