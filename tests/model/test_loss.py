"""The losses against an fp64 reference, and the chunked one's promise that the logits never exist as a whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from live_bytes import LiveBytes
from scalegpt.config import TrainConfig
from scalegpt.errors import InputError
from scalegpt.model.chunk import IGNORED, turn
from scalegpt.model.gpt import GPT
from scalegpt.model.loss import chunked_cross_entropy, full_cross_entropy, make_loss

pytestmark = pytest.mark.usefixtures("one_thread")

N, H, V = 37, 24, 101
CHUNKS = [1, 8, N - 1, N, N + 7]

LOSSES = {
    "full": full_cross_entropy,
    **{f"chunks of {chunk}": chunked_cross_entropy(chunk) for chunk in CHUNKS},
    **{f"chunks of {chunk}, by rows": chunked_cross_entropy(chunk, rows=3) for chunk in CHUNKS},
}
"""On a CPU chunks are turned by columns, unless rows are asked for as on a GPU."""

# Relative errors, in norm: what a few roundings of the compute dtype amount to.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def problem(dtype: torch.dtype, ignored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, H] in the compute dtype, an fp32 head whose values that dtype holds, and targets [N]."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(N, H, generator=generator).to(dtype)
    head = (0.3 * torch.randn(V, H, generator=generator)).to(dtype).float()
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = IGNORED
    return hidden, head, targets


def solve(loss: Any, hidden: Tensor, head: Tensor, targets: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Loss and gradients by hidden states and head, in fp64, the gradients without ``scale``."""
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    value = loss(hidden, head, targets)
    (value * scale).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return [value.detach().double(), hidden.grad.double() / scale, head.grad.double() / scale]


def reference(hidden: Tensor, head: Tensor, targets: Tensor) -> list[Tensor]:
    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORED)

    return solve(loss, hidden.double(), head.double(), targets)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_loss_and_gradients_are_exact_within_rounding(dtype: torch.dtype, loss: str, ignored: float) -> None:
    inputs = problem(dtype, ignored)
    # fp16 trains with a loss scale: without one, p/n of a single logit is below its smallest number.
    found = solve(LOSSES[loss], *inputs, scale=1024.0 if dtype == torch.float16 else 1.0)
    for value, exact in zip(found, reference(*inputs), strict=True):
        assert error(value, exact) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_chunking_does_not_matter(dtype: torch.dtype) -> None:
    inputs = problem(dtype)
    whole = solve(full_cross_entropy, *inputs)
    for chunk in CHUNKS:
        for value, exact in zip(solve(chunked_cross_entropy(chunk), *inputs), whole, strict=True):
            assert error(value, exact) < TOLERANCES[dtype]


@pytest.mark.parametrize("loss", [full_cross_entropy, chunked_cross_entropy(8), chunked_cross_entropy(8, rows=3)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes_are_those_of_the_inputs(loss: Any, dtype: torch.dtype) -> None:
    hidden, head, targets = problem(dtype)
    for head_dtype in (torch.float32, dtype):
        x, w = hidden.clone().requires_grad_(), head.detach().clone().to(head_dtype).requires_grad_()
        value = loss(x, w, targets)
        value.backward()
        assert (value.dtype, value.shape) == (torch.float32, ())
        assert x.grad is not None
        assert w.grad is not None
        assert (x.grad.dtype, w.grad.dtype) == (dtype, head_dtype)


@pytest.mark.parametrize("loss", [full_cross_entropy, chunked_cross_entropy(8), chunked_cross_entropy(8, rows=3)])
def test_nothing_to_count_gives_zero_and_no_gradient(loss: Any) -> None:
    hidden, head, targets = problem(torch.float32)
    found = solve(loss, hidden, head, torch.full_like(targets, IGNORED))
    assert [value.abs().max().item() for value in found] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("loss", [full_cross_entropy, chunked_cross_entropy(8), chunked_cross_entropy(8, rows=3)])
def test_ignored_rows_have_no_gradient(loss: Any) -> None:
    hidden, head, targets = problem(torch.float32)
    gradient = solve(loss, hidden, head, targets)[1]
    assert gradient[targets == IGNORED].abs().max() == 0
    assert gradient[targets != IGNORED].abs().amin(dim=0).min() > 0


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [full_cross_entropy, chunked_cross_entropy(8), chunked_cross_entropy(8, rows=3)])
def test_huge_logits_overflow_nothing(loss: Any, dtype: torch.dtype, size: float) -> None:
    """By columns the exponentials of some tokens overflow here, and are computed again beside the largest."""
    hidden, head, targets = problem(dtype)
    found = solve(loss, hidden * size, head, targets)
    exact = reference((hidden * size).float(), head, targets)
    for value, expected in zip(found, exact, strict=True):
        # Of logits in the thousands bf16's rounding alone moves whole units.
        assert error(value, expected) < (1e-3 if dtype == torch.float32 else 0.1)
        assert value.isfinite().all()


@pytest.mark.parametrize("loss", [full_cross_entropy, chunked_cross_entropy(8), chunked_cross_entropy(8, rows=3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_hidden_state_is_not_hidden(loss: Any, bad: float) -> None:
    """The guards look at the loss."""
    hidden, head, targets = problem(torch.float32, ignored=0.0)
    hidden[5, 0] = bad
    assert not loss(hidden, head, targets).isfinite()


def test_the_loss_scale_keeps_fp16_gradients_of_many_tokens() -> None:
    """A single logit's p/n is below fp16's smallest number; the scale must act before the rounding."""
    n = 4096
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 8, generator=generator).half()
    head = (0.1 * torch.randn(V, 8, generator=generator)).half().float()
    targets = torch.randint(V, (n,), generator=generator)
    found = solve(chunked_cross_entropy(512), hidden, head, targets, scale=2.0**16)
    for value, exact in zip(found, reference(hidden, head, targets), strict=True):
        assert error(value, exact) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_tied_head_collects_the_same_gradients(tiny_model: Any, chunk: int) -> None:
    x = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(3))
    gradients = []
    for loss in (full_cross_entropy, chunked_cross_entropy(chunk)):
        model = tiny_model(loss=loss)
        model(x[:, :-1], x[:, 1:]).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-7, rtol=1e-5), name


def test_gradients_accumulate_over_micro_batches(tiny_model: Any) -> None:
    model = tiny_model(loss=chunked_cross_entropy(5))
    x = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(3))
    model(x[:, :-1], x[:, 1:]).backward()
    once = model.wte.weight.grad.clone()
    model(x[:, :-1], x[:, 1:]).backward()
    assert torch.allclose(model.wte.weight.grad, 2 * once, atol=1e-7)


def test_a_frozen_head_costs_no_gradient() -> None:
    hidden, head, targets = problem(torch.float32)
    x = hidden.clone().requires_grad_()
    chunked_cross_entropy(8)(x, head, targets).backward()
    exact = reference(hidden, head, targets)[1]
    assert x.grad is not None
    assert error(x.grad.double(), exact) < 1e-5
    w = head.clone().requires_grad_()
    chunked_cross_entropy(8)(hidden, w, targets).backward()
    assert w.grad is not None


def test_without_gradients_the_loss_is_the_same_and_keeps_nothing() -> None:
    hidden, head, targets = problem(torch.float32)
    hidden.requires_grad_()
    loss = chunked_cross_entropy(8)
    with torch.no_grad():
        value = loss(hidden, head, targets)
    assert not value.requires_grad
    assert torch.equal(value, loss(hidden, head, targets).detach())


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden, head, targets = problem(torch.float32)
    value = chunked_cross_entropy(8)(hidden.requires_grad_(), head, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        value.backward()


@pytest.mark.parametrize("rows", [2, 8])  # fewer than the head is wide, and as many
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_holds_what_its_docstring_says(dtype: torch.dtype, rows: int) -> None:
    n, width, vocabulary, chunk = 256, 8, 997, 32
    hidden = torch.randn(n, width).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, width).requires_grad_()
    targets = torch.randint(vocabulary, (n,))
    with LiveBytes() as made:
        value = chunked_cross_entropy(chunk, rows=rows)(hidden, head, targets)
        forward_peak = made.peak
        value.backward()
    assert made.largest < n * vocabulary / 7, "a tensor as large as all the logits"
    c = dtype.itemsize
    cast = c * vocabulary * width if dtype != torch.float32 else 0
    beside = max(4 * rows * vocabulary, c * vocabulary * width) if dtype != torch.float32 else 0
    formula = c * n * width + 4 * vocabulary * width + cast + c * chunk * vocabulary + beside
    assert formula <= forward_peak <= formula + 64 * chunk + 1024
    assert made.peak <= forward_peak, "the backward makes nothing of size"


def test_the_full_loss_holds_what_its_docstring_says() -> None:
    n, width, vocabulary = 64, 8, 997
    hidden = torch.randn(n, width).bfloat16().requires_grad_()
    head = torch.randn(vocabulary, width).requires_grad_()
    with LiveBytes() as made:
        value = full_cross_entropy(hidden, head, torch.randint(vocabulary, (n,)))
        forward_peak = made.peak
        value.backward()
    assert forward_peak / (n * vocabulary) == pytest.approx(10, rel=0.05)
    assert made.peak / (n * vocabulary) == pytest.approx(12, rel=0.05)


def test_the_settings_choose_the_loss() -> None:
    assert make_loss("full", 512) is full_cross_entropy
    inputs = problem(torch.float32)
    assert torch.equal(make_loss("chunked", 8)(*inputs), chunked_cross_entropy(8)(*inputs))
    with pytest.raises(InputError, match="loss_chunk must be at least 1"):
        make_loss("chunked", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_chunk_takes_a_seventh_of_full_logits(dtype: torch.dtype) -> None:
    """As on a GPU: four sequences of 1,024 tokens, GPT-2's vocabulary, on tensors without memory."""
    with FakeTensorMode():
        assert share_of_full(dtype, vocabulary=50304, rows=512) <= 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_the_default_chunk_takes_a_seventh_of_full_logits_on_a_cpu(dtype: torch.dtype) -> None:
    """A tenth of the vocabulary, in real memory; the share depends on tokens, chunk and width alone."""
    assert share_of_full(dtype, vocabulary=5030, rows=None) <= 0.15


def share_of_full(dtype: torch.dtype, vocabulary: int, rows: int | None) -> float:
    """Peak bytes of the chunked loss, of the full one's, for 4,096 tokens of width 192."""
    peaks = []
    for loss in (full_cross_entropy, chunked_cross_entropy(TrainConfig().loss_chunk, rows=rows)):
        hidden = torch.zeros(4096, 192, dtype=dtype, requires_grad=True)
        head = torch.zeros(vocabulary, 192, requires_grad=True)
        with LiveBytes() as made:
            loss(hidden, head, torch.zeros(4096, dtype=torch.int64)).backward()
        peaks.append(made.peak)
    return peaks[1] / peaks[0]


def test_what_is_between_the_matmuls_can_be_compiled() -> None:
    """On a GPU it is; here the same code through the same compiler, for the CPU."""
    hidden, head, targets = problem(torch.bfloat16)
    logits = hidden @ head.bfloat16().T
    eager, compiled = logits.clone(), logits.clone()
    total = turn(eager, targets)
    assert torch.compile(turn, dynamic=False)(compiled, targets).item() == pytest.approx(total.item(), rel=1e-5)
    assert error(compiled, eager) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_can_be_compiled_in_one_piece(dtype: torch.dtype) -> None:
    """By whoever compiles a model whole."""
    inputs = problem(dtype)
    compiled = torch.compile(chunked_cross_entropy(8), backend="aot_eager", fullgraph=True)
    for value, exact in zip(solve(compiled, *inputs), reference(*inputs), strict=True):
        assert error(value, exact) < TOLERANCES[dtype]


def test_capped_logits_are_those_of_the_formula_and_both_losses_agree(one_thread: None) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 8) * 3, torch.randn(17, 8)
    targets = torch.randint(-1, 17, (10,))
    expected = gradients_of(
        lambda h, w, t: F.cross_entropy(5 * torch.tanh(h @ w.t() / 5), t, ignore_index=-1), hidden, head, targets
    )
    for kind in ("full", "chunked"):
        loss = partial(make_loss(kind, 4), softcap=5.0)
        for ours, theirs in zip(gradients_of(loss, hidden, head, targets), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def gradients_of(loss: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The loss, and the gradients of hidden states and head."""
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    value = loss(h, w, targets)
    return (value.detach(), *torch.autograd.grad(value, (h, w)))


def test_a_capped_model_gives_capped_logits(tiny_model: Callable[..., GPT]) -> None:
    free, capped = tiny_model(), tiny_model(logit_softcap=0.05)
    tokens = torch.randint(0, 61, (2, 16))
    torch.testing.assert_close(capped(tokens), 0.05 * torch.tanh(free(tokens) / 0.05))
