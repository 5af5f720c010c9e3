"""Attention by batched matmuls: SDPA's results and gradients, what it keeps, recompute, and where it is taken."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from live_bytes import LiveBytes
from scalegpt.backends import build_model, capabilities
from scalegpt.backends.capabilities import attention_by_matmuls
from scalegpt.config.presets import resolve
from scalegpt.model.cpu import matmul_attention as module
from scalegpt.model.cpu.matmul_attention import LONGEST_BACKWARD, ByMatmuls, matmul_attention
from scalegpt.model.recompute import apply_recompute

CPU = torch.device("cpu")
SHAPES = [
    (2, 3, 3, 1, 8), (3, 4, 4, 64, 32), (2, 1, 1, 255, 16), (1, 3, 3, 257, 24), (1, 2, 2, 600, 8),
    (2, 6, 2, 1, 8), (2, 6, 2, 129, 16), (1, 9, 1, 300, 8), (1, 300, 1, 3, 2),
]  # fmt: skip
"""B, a, k, T, D: one token, one block of queries, one head, a block and one more token, several blocks; then fewer heads of
keys, one head of them, and a group larger than a block."""

Shape = tuple[int, int, int, int, int]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values as views of one tensor, and the gradient of the result [B, T, a·D].

    They are spread so that some probabilities are large.
    """
    B, a, k, T, D = shape
    generator = torch.Generator().manual_seed(5)
    qkv = 1.5 * torch.randn(B, T, a + 2 * k, D, generator=generator, dtype=torch.float64)
    grad = torch.randn(B, T, a * D, generator=generator, dtype=torch.float64)
    return [part.detach().requires_grad_() for part in qkv.to(dtype).split((a, k, k), dim=2)], grad.to(dtype)


def sdpa(*parts: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in parts)
    grouped = q.shape[1] > k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2).flatten(2)


def results(attend: Attend, parts: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    y = attend(*parts)
    return y.detach(), *torch.autograd.grad(y, parts, grad)


def exactly(parts: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return results(sdpa, [part.detach().double().requires_grad_() for part in parts], grad.double())


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-9)).item()  # of one token, dQ and dK are 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scores", [module.SCORES_BYTES, 1])
def test_fp32_is_sdpa_in_fp64(monkeypatch: pytest.MonkeyPatch, shape: Shape, scores: int) -> None:
    monkeypatch.setattr(module, "SCORES_BYTES", scores)  # 1: a few heads at a time
    parts, grad = inputs(shape, torch.float32)
    for found, wanted in zip(results(matmul_attention, parts, grad), exactly(parts, grad), strict=True):
        assert found.dtype == torch.float32
        assert error(found, wanted) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("torchs_forward", [False, True])
def test_bf16_is_near_fp64_as_sdpa_is(shape: Shape, torchs_forward: bool) -> None:
    parts, grad = inputs(shape, torch.bfloat16)
    attend = partial(matmul_attention, torchs_forward=torchs_forward)
    ours, torchs = (results(each, parts, grad) for each in (attend, sdpa))
    assert torch.equal(ours[0], torchs[0]) or not torchs_forward
    for found, other, wanted in zip(ours, torchs, exactly(parts, grad), strict=True):
        assert error(found, wanted) < max(0.01, 2 * error(other, wanted))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_future_is_not_seen(kv_heads: int) -> None:
    parts, _ = inputs((1, 2, kv_heads, 300, 8), torch.bfloat16)
    changed = [part.detach().clone() for part in parts]
    for part in changed:
        part[:, 280:] += 3
    before, after = matmul_attention(*parts), matmul_attention(*changed)
    assert torch.equal(before[:, :280], after[:, :280])
    assert not torch.equal(before[:, 280:], after[:, 280:])


@pytest.mark.parametrize("torchs_forward", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_operator_is_what_torch_asks_of_one(torchs_forward: bool, kv_heads: int) -> None:
    parts, _ = inputs((2, 4, kv_heads, 5, 8), torch.float32)
    torch.library.opcheck(torch.ops.scalegpt.matmul_attention.default, (*parts, torchs_forward))


def test_it_keeps_no_more_than_its_result() -> None:
    """Queries, keys and values are kept too, and are there already; T·T probabilities of all heads are not kept."""
    parts, _ = inputs((2, 2, 2, 128, 8), torch.bfloat16)
    with LiveBytes() as made:
        y = matmul_attention(*parts)
        assert made.now == y.nbytes


class Calls(TorchDispatchMode):
    """How often the forward ran."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.scalegpt.matmul_attention.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("by_matmuls", [ByMatmuls.ALL, ByMatmuls.BACKWARD])
@pytest.mark.parametrize("shape", [{}, {"position": "rope", "n_head": 4, "n_kv_head": 2}])
def test_recompute_gives_the_same_gradients_and_selective_keeps_the_result(
    tiny_model: Any, by_matmuls: ByMatmuls, shape: dict[str, Any]
) -> None:
    model = tiny_model(**shape)
    model.set_precision(torch.bfloat16)
    model.set_attention("auto", attend=by_matmuls.attend)
    x = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(9))
    calls, gradients = {}, {}
    for kind in ("none", "selective", "full"):
        apply_recompute(model, kind)
        model.zero_grad()
        with Calls() as seen:
            model(x[:, :-1], x[:, 1:]).backward()
        calls[kind] = seen.count
        gradients[kind] = {name: value.grad.clone() for name, value in model.named_parameters()}
    assert calls == {"none": 2, "selective": 2, "full": 4}
    for kind in ("selective", "full"):
        assert all(torch.equal(value, gradients["none"][name]) for name, value in gradients[kind].items())


@pytest.mark.parametrize("by_matmuls", [ByMatmuls.ALL, ByMatmuls.BACKWARD])
def test_a_block_compiles_with_it_in_one_piece(tiny_model: Any, by_matmuls: ByMatmuls) -> None:
    model = tiny_model(n_layer=1)
    model.set_precision(torch.bfloat16)
    model.set_attention("auto", attend=by_matmuls.attend)
    block = model.layers[0]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 16, model.config.n_embd, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    grads = []
    for each in (block, compiled):
        model.zero_grad()
        each(x).sum().backward()
        grads.append(block.attn.qkv.weight.grad.clone())
    assert torch.allclose(grads[0], grads[1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("bf16", "amx", "name", "precision", "device", "dropout", "taken"),
    [
        (True, False, "auto", "bf16", "cpu", False, ByMatmuls.ALL),
        (False, False, "auto", "bf16", "cpu", False, ByMatmuls.NOTHING),
        (True, True, "auto", "bf16", "cpu", False, ByMatmuls.BACKWARD),
        (True, False, "flash", "bf16", "cpu", False, ByMatmuls.NOTHING),
        (True, False, "auto", "fp32", "cpu", False, ByMatmuls.NOTHING),
        (True, False, "auto", "bf16", "cuda", False, ByMatmuls.NOTHING),
        (True, True, "auto", "bf16", "cpu", True, ByMatmuls.NOTHING),
    ],
)
def test_it_is_taken_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
    bf16: bool,
    amx: bool,
    name: str,
    precision: str,
    device: str,
    dropout: bool,
    taken: ByMatmuls,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert attention_by_matmuls(name, precision, torch.device(device), dropout=dropout) is taken


def test_a_run_takes_it_and_a_trace_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities.torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(capabilities.torch.cpu, "_is_amx_tile_supported", lambda: False)
    run = resolve(preset="tiny", flags={"precision": "bf16", "vocab_size": 61, "dropout": 0.0})
    assert all(
        block.attn.attend == ByMatmuls.ALL.attend for block in build_model(run, compiled=False, device=CPU).layers
    )
    assert all(block.attn.attend is None for block in build_model(run, compiled=False).layers)


@pytest.mark.parametrize(
    ("by_matmuls", "tokens", "calls"),
    [
        (ByMatmuls.ALL, LONGEST_BACKWARD + 1, 1),
        (ByMatmuls.BACKWARD, LONGEST_BACKWARD, 1),
        (ByMatmuls.BACKWARD, LONGEST_BACKWARD + 1, 0),
        (ByMatmuls.NOTHING, 1, 0),
    ],
)
def test_long_sequences_are_left_to_torch_where_it_is_faster(
    tiny_model: Any, by_matmuls: ByMatmuls, tokens: int, calls: int
) -> None:
    model = tiny_model(n_layer=1, block_size=LONGEST_BACKWARD + 1)
    model.set_attention("auto", attend=by_matmuls.attend)
    with Calls() as seen, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.int64))
    assert seen.count == calls
