"""Rotary positions against transformers' tables, and what attention computes and keeps with fewer heads of keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from live_bytes import LiveBytes
from scalegpt.config import ModelConfig
from scalegpt.config.rope import RopeScaling
from scalegpt.model import grouped
from scalegpt.model.grouped import attend_expanded
from scalegpt.model.recompute import apply_recompute
from scalegpt.model.rotary import RotaryTable, frequencies, rotate

SCALINGS: list[tuple[RopeScaling | None, dict[str, Any]]] = [
    (None, {"rope_type": "default"}),
    (RopeScaling(type="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    (
        RopeScaling(type="llama3", factor=8.0, original_block_size=8192),
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ),
    (
        RopeScaling(type="llama3", factor=32.0, original_block_size=64, low_freq_factor=2.0, high_freq_factor=3.0),
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 64, "low_freq_factor": 2.0,
         "high_freq_factor": 3.0},
    ),
    (
        RopeScaling(type="yarn", factor=4.0, original_block_size=4096),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    (
        RopeScaling(type="yarn", factor=16.0, original_block_size=128, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3),
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128, "beta_fast": 8.0, "beta_slow": 2.0,
         "attention_factor": 1.3},
    ),
]  # fmt: skip
"""Our setting, and the same in transformers' words."""


@pytest.mark.parametrize(("ours", "theirs"), SCALINGS)
@pytest.mark.parametrize(
    ("head_size", "share", "theta"), [(128, 1.0, 500_000.0), (64, 0.25, 10_000.0), (8, 1.0, 100.0)]
)
def test_frequencies_are_those_of_transformers(
    ours: RopeScaling | None, theirs: dict[str, Any], head_size: int, share: float, theta: float
) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**theirs, "rope_theta": theta, "partial_rotary_factor": share}
    shape = {"hidden_size": 4 * head_size, "num_attention_heads": 4, "head_dim": head_size}
    embedding = LlamaRotaryEmbedding(LlamaConfig(**shape, max_position_embeddings=512, rope_parameters=parameters))
    config = ModelConfig(
        n_embd=4 * head_size, n_head=4, block_size=512, position="rope", rope_theta=theta, rotary_share=share,
        rope_scaling=ours,
    )  # fmt: skip
    if theirs["rope_type"] != "default" or share == 1.0:  # their default ignores the share; the families apply it
        turns, factor = frequencies(config)
        assert torch.equal(turns, embedding.inv_freq) or torch.allclose(turns, embedding.inv_freq, rtol=3e-7, atol=0)
        assert factor == pytest.approx(embedding.attention_scaling, rel=1e-12)
        cos, sin = embedding(torch.zeros(1), torch.arange(512)[None])
        pairs = turns.numel()
        table = RotaryTable(config).on(torch.device("cpu"))
        assert torch.allclose(table, torch.cat((cos[0, :, :pairs], sin[0, :, :pairs]), -1), atol=2e-4)


def test_the_layout_is_that_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    config = ModelConfig(n_embd=64, n_head=4, block_size=32, position="rope")
    table = RotaryTable(config).on(torch.device("cpu"))
    q, k = (torch.randn(2, 32, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    cos, sin = (part.repeat(1, 2)[None] for part in table.chunk(2, dim=-1))
    for found, wanted in zip(
        (rotate(q, table), rotate(k, table)), apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("rows", [[0, 1, 2], [[0, 1, 2], [7, 0, 1]]])
def test_the_gradient_of_the_rotation(share: float, rows: list[Any]) -> None:
    scaling = RopeScaling(type="yarn", factor=2.0, original_block_size=16)  # cosines and sines are not of norm 1
    config = ModelConfig(n_embd=16, n_head=2, block_size=8, position="rope", rotary_share=share, rope_scaling=scaling)
    turns = RotaryTable(config).on(torch.device("cpu"))[torch.tensor(rows)].double()
    heads = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, turns), heads)


def test_half_precision_is_turned_in_fp32() -> None:
    table = RotaryTable(ModelConfig(n_embd=64, n_head=1, block_size=4096, position="rope")).on(torch.device("cpu"))
    heads = torch.randn(1, 4096, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(rotate(heads, table), rotate(heads.float(), table).bfloat16())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rotation_frees_the_result_of_the_matmul(tiny_model: Any, kv_heads: int) -> None:
    attention = tiny_model(position="rope", n_head=4, n_kv_head=kv_heads).layers[0].attn
    table = RotaryTable(tiny_model(position="rope").config).on(torch.device("cpu"))
    x = torch.randn(2, 16, 32)
    with LiveBytes() as made:
        q, k, v = attention.heads(x, table[:, : attention.head_width])
        assert made.now == q.nbytes + k.nbytes + v.nbytes
        assert q.untyped_storage().nbytes() == q.nbytes


def test_the_table_is_no_state_of_the_model(tiny_model: Any) -> None:
    model = tiny_model(position="rope")
    x = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(2))
    before = model(x[:, :-1], x[:, 1:])
    assert not [
        name for name in model.state_dict() if "blocks" not in name and name not in ("wte.weight", "ln_f.weight")
    ]
    model.to(torch.bfloat16).to(torch.float32)
    assert model.tables[0].dtype == torch.float32
    fresh = tiny_model(position="rope").to(torch.bfloat16).float()
    assert torch.equal(model(x[:, :-1], x[:, 1:]), fresh(x[:, :-1], x[:, 1:]))
    assert before.item() == pytest.approx(fresh(x[:, :-1], x[:, 1:]).item(), rel=1e-2)


class OnTheCPU:
    """The memory-efficient kernel's two operators, by the CPU's kernel, which has the same results."""

    def __init__(self) -> None:
        self.heads: list[int] = []

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, dropout: float, is_causal: bool
    ) -> tuple[Tensor, ...]:
        self.heads += [k.shape[1], v.shape[1]]
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, is_causal)
        return y, lse, torch.zeros(()), torch.zeros(())

    def _scaled_dot_product_efficient_attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, y: Tensor, lse: Tensor, seed: Tensor,
        offset: Tensor, dropout: float, wanted: tuple[bool, ...], is_causal: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        self.heads += [k.shape[1], v.shape[1]]
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *backward(grad, q, k, v, y, lse, dropout, is_causal), None


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_expanded_keys_give_the_gradients_of_groups_and_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    kernel = OnTheCPU()
    monkeypatch.setattr(grouped, "aten", kernel)
    random = torch.Generator().manual_seed(3)
    parts = [torch.randn(2, n, 8, 16, generator=random, requires_grad=True) for n in (6, kv_heads, kv_heads)]
    grad = torch.randn(2, 6, 8, 16, generator=random)
    with LiveBytes() as made:
        y = attend_expanded(*parts, None, 0.0)
        assert made.now == y.nbytes + 4 * 2 * 6 * 8 + 8, "the output, the log-sum-exp, and two numbers"
    found = torch.autograd.grad(y, parts, grad)
    wanted_y = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    assert kernel.heads == [6] * 4
    assert torch.allclose(y, wanted_y, atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(wanted_y, parts, grad), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


MODERN = {"position": "rope", "n_head": 4, "n_kv_head": 2, "head_size": 12}
SHAPES = [MODERN, {**MODERN, "qk_norm": True, "bias": "qkv"}]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_a_compiled_block_computes_the_same(
    tiny_model: Any, shape: dict[str, Any], recompute: str, dropout: float
) -> None:
    """Rotation, groups and recompute in one graph; with dropout the graph must only compile."""
    model = tiny_model(**shape, n_layer=1, dropout=dropout)
    apply_recompute(model, recompute)
    block, table = model.layers[0], RotaryTable(model.config).on(torch.device("cpu"))
    torch._dynamo.reset()  # it compiles one function only so many times
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    grads = []
    for each in (block, compiled):
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        each(x, None, table).sum().backward()
        grads.append((x.grad, block.attn.qkv.weight.grad.clone()))
    if not dropout:
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
def test_recompute_gives_the_same_gradients(tiny_model: Any, shape: dict[str, Any], recompute: str) -> None:
    x = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(9))
    grads = []
    for kind in ("none", recompute):
        model = tiny_model(**shape)
        apply_recompute(model, kind)
        model(x[:, :-1], x[:, 1:]).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
