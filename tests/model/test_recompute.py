"""Recompute: the same gradients, the promised extra arithmetic, the promised memory."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from live_bytes import LiveBytes
from scalegpt.model.gpt import GPT
from scalegpt.model.recompute import apply_recompute

MODERN = {"norm": "rmsnorm", "activation": "swiglu", "n_inner": 80, "bias": "qkv"}
KINDS = ["none", "selective", "full"]
BATCH, LENGTH = 2, 16
TOKENS = BATCH * LENGTH


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(61, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(9))
    return x[:, :-1], x[:, 1:]


def gradients(model: GPT, kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with the same dropout every time."""
    apply_recompute(model, kind)
    model.zero_grad()
    torch.manual_seed(4)
    loss = model(*batch())
    loss.backward()
    return loss.item(), {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("attention", ["auto", "math"])
@pytest.mark.parametrize(
    "shape", [{}, {"dropout": 0.3}, {"bias": True, "tie_head": False, "activation": "gelu_tanh"}, MODERN]
)
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_bitwise_those_without(tiny_model: Any, kind: str, shape: dict[str, Any], attention: str) -> None:
    model = tiny_model(**shape)
    model.set_attention(attention)
    loss, exact = gradients(model, "none")
    again, found = gradients(model, kind)
    assert again == loss
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_gradients_are_bitwise_those_without_in_bf16(tiny_model: Any, kind: str, residual: torch.dtype) -> None:
    model = tiny_model(dropout=0.1)
    model.set_precision(torch.bfloat16, residual)
    _, exact = gradients(model, "none")
    _, found = gradients(model, kind)
    assert all(torch.equal(found[name], value) for name, value in exact.items())


def test_dropout_differs_from_seed_to_seed(tiny_model: Any) -> None:
    """Otherwise the tests above would hold for a dropout that does nothing."""
    model = tiny_model(dropout=0.3)
    apply_recompute(model, "full")
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(model(*batch()).item())
    assert losses[0] != losses[1]


def flops(model: GPT, kind: str) -> dict[str, int]:
    apply_recompute(model, kind)
    with FlopCounterMode(display=False) as counter:
        model(*batch()).backward()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def test_full_adds_the_blocks_forward_but_its_last_product(tiny_model: Any) -> None:
    model = tiny_model(n_layer=3)
    H = model.config.n_embd
    none, full = flops(model, "none"), flops(model, "full")
    # qkv 3H², proj H², fc 4H², and not mlp.proj's 4H²: recomputing stops as soon as the backward has what it needs.
    per_token = 2 * (3 + 1 + 4) * H * H
    assert full["aten.mm"] - none["aten.mm"] == 3 * TOKENS * per_token


@pytest.mark.parametrize("shape", [{}, {"bias": True}, {"dropout": 0.1}, MODERN])
def test_selective_adds_no_product_of_weights(tiny_model: Any, shape: dict[str, Any]) -> None:
    model = tiny_model(n_layer=3, **shape)
    none, selective = flops(model, "none"), flops(model, "selective")
    for op in ("aten.mm", "aten.addmm"):
        assert selective.get(op) == none.get(op)


class AttentionCalls(TorchDispatchMode):
    """How often attention's forward kernel really ran."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


def test_selective_keeps_the_attention_kernels_result(tiny_model: Any) -> None:
    model = tiny_model()
    calls = {}
    for kind in KINDS:
        apply_recompute(model, kind)
        with AttentionCalls() as seen:
            model(*batch()).backward()
        calls[kind] = seen.count
    assert calls == {"none": 2, "selective": 2, "full": 4}


def kept(tiny_model: Any, kind: str, n_layer: int, **shape: Any) -> int:
    """Bytes alive between forward and backward."""
    model = tiny_model(n_layer=n_layer, **shape)
    apply_recompute(model, kind)
    x, targets = batch()
    with LiveBytes() as made:
        loss = model(x, targets)
        held = made.now
    del loss
    return held


def test_a_block_keeps_what_the_table_says(tiny_model: Any) -> None:
    """In fp32 without dropout, with c = 4: see the table in the module, and 4·a·n for attention's statistics."""
    c, H, a = 4, 32, 2
    per_block = {kind: kept(tiny_model, kind, 3) - kept(tiny_model, kind, 2) for kind in KINDS}
    assert per_block["full"] == c * TOKENS * H
    # input 1, QKV 3, attention 1, projection 1, wide layer 4
    assert per_block["selective"] == 10 * c * TOKENS * H + 4 * a * TOKENS
    # two norms in 2, their results 2, QKV 3, attention 1, wide layer 4, GELU 4; and fp32 mean and 1/std of two norms
    assert per_block["none"] == 16 * c * TOKENS * H + 4 * a * TOKENS + 16 * TOKENS


@pytest.mark.parametrize("shape", [{"bias": True}, {"dropout": 0.1}])
def test_full_keeps_less_than_selective_less_than_none(tiny_model: Any, shape: dict[str, Any]) -> None:
    none, selective, full = (kept(tiny_model, kind, 4, **shape) for kind in KINDS)
    assert full < selective < none


def test_recompute_lowers_the_peak_of_a_whole_step(tiny_model: Any) -> None:
    x = torch.zeros(32, LENGTH, dtype=torch.long)  # enough tokens for activations to outweigh gradients
    peaks = {}
    for kind in KINDS:
        model = tiny_model(n_layer=6)
        apply_recompute(model, kind)
        with LiveBytes() as made:
            model(x, x).backward()
        peaks[kind] = made.peak
    assert peaks["full"] < peaks["selective"] < peaks["none"]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_and_evaluation_keep_nothing(tiny_model: Any, kind: str) -> None:
    model = tiny_model()
    apply_recompute(model, kind)
    with torch.no_grad(), LiveBytes() as made:
        loss = model(*batch())
        assert made.now == loss.nbytes


def test_none_undoes_the_others(tiny_model: Any) -> None:
    model = tiny_model()
    before = kept(tiny_model, "none", 2)
    apply_recompute(model, "full")
    apply_recompute(model, "none")
    x, targets = batch()
    with LiveBytes() as made:
        loss = model(x, targets)
        assert made.now == before
    del loss


def test_it_can_be_imported_alone() -> None:
    """It names an operator that another module defines."""
    subprocess.run([sys.executable, "-c", "import scalegpt.model.recompute"], check=True)
