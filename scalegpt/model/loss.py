"""Cross entropy of the LM head: over full logits, or over chunks of tokens so that the logits never exist as a whole.

Both take the hidden states and the head's matrix, and compute the same thing: logits in the compute dtype (as the
matmul gives them), log-sum-exp and loss in fp32, the mean over the positions whose target is not -1.

Memory beyond the inputs, for n tokens, vocabulary V, compute dtype of c bytes, chunk of k tokens, r rows at once:

- full: in the forward c·n·V logits, their fp32 copy 4·n·V (none in fp32) and the log-softmax 4·n·V; at the backward's
  peak 12·n·V: the log-softmax, its gradient and the fp32 logits' gradient.
- chunked: the hidden states' gradient c·n·H and the head's 4·V·H in fp32, which stay for the backward; the head cast to
  the compute dtype c·V·H, where it is not in it already; and for each chunk its logits c·k·V, which become their own
  gradient in place, and beside them the larger of an fp32 copy of r rows, 4·r·V (none in fp32), and the chunk's part of the
  head's gradient, c·V·H (none in fp32, which adds without a temporary).

A chunk's logits take part in three matmuls, and in between become their gradients, some rows at a time (:func:`turn`): few
enough for a CPU's caches (:data:`CACHED`), so that only the first of some passes over them waits for memory; on other devices
as many as keep them busy. A larger chunk adds less often to the head's gradient, 4·V·H in memory each time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scalegpt.config.train import LOSS_ROWS
from scalegpt.errors import InputError

IGNORED = -1
"""Target of a position that does not count."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [..., H], head [V, H], targets [...] int64) → mean loss, an fp32 scalar."""


def full_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over full logits [n, V]; the mean over counted positions, 0 where none counts."""
    logits = F.linear(hidden, head.to(hidden.dtype)).view(-1, head.shape[0])
    targets = targets.reshape(-1)
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / _counted(targets)


CACHED = {"cpu": 800_000}
"""Logits that a kind of device turns into gradients at once: 3 MB in fp32, which a CPU's caches hold."""


def chunked_cross_entropy(chunk: int, *, rows: int | None = None, compiled: bool = False) -> Loss:
    """Make a loss that forms the logits of ``chunk`` tokens at a time.

    The gradients are computed in the forward pass, while a chunk's logits exist, so nothing is recomputed and the
    backward pass only scales them. It follows that the loss cannot be differentiated twice.

    Args:
        chunk: tokens whose logits exist at once.
        rows: of these, tokens whose logits become gradients at once; None: as suits the device.
        compiled: let ``torch.compile`` fuse what happens between the matmuls. On a GPU that makes two passes over the logits
            in the compute dtype of six in fp32. It is left alone on a CPU, where the passes do not reach memory anyway.

    Raises:
        InputError: a chunk below one token.
    """
    if chunk < 1:
        raise InputError(f"loss_chunk must be at least 1 token, not {chunk}")
    fused = torch.compile(turn, dynamic=False) if compiled else None

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        kind = flat.device.type
        work = _Work(chunk, rows or _rows(kind, head.shape[0]), fused if fused is not None and kind != "cpu" else turn)
        result: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            flat, head, targets.reshape(-1), work, torch.is_grad_enabled()
        )
        return result

    return loss


def make_loss(kind: str, chunk: int, *, rows: int | None = None, compiled: bool = False) -> Loss:
    """Return the loss that the settings ``loss`` and ``loss_chunk`` name; the rest as for :func:`chunked_cross_entropy`."""
    return full_cross_entropy if kind == "full" else chunked_cross_entropy(chunk, rows=rows, compiled=compiled)


def _counted(targets: Tensor) -> Tensor:
    """How many positions count, at least one so that an empty batch gives 0 and not NaN."""
    return (targets != IGNORED).sum().clamp(min=1)


def _rows(kind: str, vocabulary: int) -> int:
    """Rows of so many logits that a kind of device turns at once."""
    return max(1, CACHED[kind] // vocabulary) if kind in CACHED else LOSS_ROWS


@dataclass(frozen=True)
class _Work:
    """How the chunked loss goes about it: tokens of a chunk, rows of them at once, and what turns these rows."""

    chunk: int
    rows: int
    turn: Callable[[Tensor, Tensor], Tensor]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Saves the gradients of hidden states and head for the *sum* of the losses; the backward divides by the count.

    Dividing late keeps the fp16 gradients of single logits away from underflow: p / n is beyond fp16's range for n in
    the thousands, p is not, and a loss scale arrives with the incoming gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, work: _Work, with_gradients: bool) -> Tensor:
        weight = head.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if with_gradients and ctx.needs_input_grad[0] else None
        head_grad = torch.empty_like(head, dtype=torch.float32) if with_gradients and ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], work.chunk):
            rows = slice(start, start + work.chunk)
            logits = F.linear(hidden[rows], weight)
            for first in range(0, logits.shape[0], work.rows):
                some = slice(first, first + work.rows)
                total += work.turn(logits[some], targets[rows][some])
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[rows])
            if head_grad is not None:
                _add_head_gradient(head_grad, logits, hidden[rows], is_first=start == 0)
            del logits  # before the next chunk's are made
        count = _counted(targets)
        ctx.save_for_backward(hidden_grad, head_grad, count)
        ctx.head_dtype = head.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_grad, head_grad, count = ctx.saved_tensors
        scale = grad / count
        if hidden_grad is not None:
            hidden_grad.mul_(scale)
        if head_grad is not None:
            head_grad = head_grad.mul_(scale).to(ctx.head_dtype)
        return hidden_grad, head_grad, None, None, None


def _add_head_gradient(head_grad: Tensor, logits_grad: Tensor, hidden: Tensor, *, is_first: bool) -> None:
    """Add some rows' part of the head's gradient [V, H] in fp32; the first overwrites what is there.

    Args:
        head_grad: [V, H] fp32.
        logits_grad: [k, V] in the compute dtype.
        hidden: [k, H] in the compute dtype.
        is_first: nothing has been added yet.
    """
    if head_grad.dtype == hidden.dtype:  # without a temporary as large as the head
        torch.addmm(head_grad, logits_grad.t(), hidden, beta=0 if is_first else 1, out=head_grad)
    elif is_first:
        head_grad.copy_(logits_grad.t() @ hidden)
    else:
        head_grad += logits_grad.t() @ hidden


def turn(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn the logits of some rows into the gradient of the sum of their losses, in place.

    The log-sum-exp is found from the softmax's largest entry: with m the largest logit, that is exp(m - lse). It is at least
    1/V, so that its logarithm is safe where that of the target's probability need not be.

    Args:
        logits: [r, V] in the compute dtype; becomes softmax minus one-hot, rounded to it, and 0 in rows that do not count.
        targets: [r] int64; rows with target -1 give neither loss nor gradient.

    Returns:
        The sum of the losses, fp32.
    """
    counts = (targets != IGNORED).unsqueeze(1)
    columns = torch.where(counts, targets.unsqueeze(1), 0)
    own = logits.gather(1, columns).float()
    softmax = logits if logits.dtype == torch.float32 else logits.float()
    peak = softmax.amax(dim=-1, keepdim=True)  # a CPU finds it in fp32 three times as fast as in bf16
    torch.softmax(softmax, dim=-1, out=softmax)
    losses = (peak - softmax.amax(dim=-1, keepdim=True).log() - own) * counts
    softmax.scatter_add_(1, columns, torch.full_like(own, -1.0))
    softmax.mul_(counts)
    if softmax is not logits:
        logits.copy_(softmax)  # two passes in the caches are faster than a product of one dtype into another
    return losses.sum()
