"""Cross entropy of the LM head: over full logits, or chunk by chunk, so that all logits never exist at once.

Both losses take the hidden states and the head's matrix, and compute the same value: logits in the compute dtype (as the
matmul gives them), log-sum-exp and loss in fp32, the mean over the positions whose target is not -1. docs/MEMORY.md says how
much each loss allocates.

One matmul makes a chunk's logits. Their gradients then replace the logits (:mod:`scalegpt.model.chunk`), as many at a
time as fit a CPU's caches or keep another device busy. Two more matmuls use these gradients. Larger chunks need fewer
additions to the head's fp32 gradient, each of which reads and writes 4·V·H bytes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scalegpt.config.train import LOSS_ROWS
from scalegpt.errors import InputError
from scalegpt.model.chunk import CACHED_ROWS, IGNORED, Chunk, Way, by_rows, turn
from scalegpt.model.cpu.columns import by_columns

TurnRows = Callable[[Tensor, Tensor], Tensor]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function from hidden states [..., H], the head [V, H] and targets [...] int64 to the mean loss, an fp32 scalar. The
losses here also take ``softcap``."""


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap·tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118, section 2), or the logits themselves without a cap."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def full_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
    """Cross entropy over full logits [n, V]: the mean over positions whose target is not -1, or 0 if there are none."""
    logits = F.linear(hidden, head.to(hidden.dtype)).view(-1, head.shape[0])
    targets = targets.reshape(-1)
    capped = soft_capped(logits.float(), softcap)
    total = F.cross_entropy(capped, targets, ignore_index=IGNORED, reduction="sum")
    return total / _counted(targets)


def chunked_cross_entropy(chunk: int, *, rows: int | None = None, compiled: bool = False) -> Loss:
    """Make a loss that forms the logits of ``chunk`` tokens at a time.

    The gradients are computed in the forward pass, while a chunk's logits exist. The backward pass only scales the gradients,
    so the loss cannot be differentiated twice.

    Args:
        chunk: tokens whose logits exist at once.
        rows: compute by rows (:mod:`scalegpt.model.chunk`), and turn the logits of this many tokens into gradients at
            once; None: the device decides on rows or columns, and on the number of tokens.
        compiled: whether ``torch.compile`` fuses the work between the matmuls. On a GPU this gives two passes over the
            logits in the compute dtype instead of six in fp32. It has no effect on a CPU, where the passes stay in the
            caches.

    Raises:
        InputError: a chunk below one token.
    """
    if chunk < 1:
        raise InputError(f"loss_chunk must be at least 1 token, not {chunk}")
    fused = torch.compile(turn, dynamic=False) if compiled else turn
    fused_capped = torch.compile(_turn_capped, dynamic=False) if compiled else _turn_capped

    def loss(hidden: Tensor, head: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        on_cpu = flat.device.type == "cpu"
        plain, capped = (turn, _turn_capped) if on_cpu else (fused, fused_capped)
        way = _way(flat, head.shape[0], rows, plain if softcap is None else partial(capped, softcap), softcap)
        result: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            flat, head, targets.reshape(-1), chunk, way, torch.is_grad_enabled()
        )
        return result

    return loss


def make_loss(kind: str, chunk: int, *, rows: int | None = None, compiled: bool = False) -> Loss:
    """Make the loss of the settings ``loss`` and ``loss_chunk``.

    Other arguments are those of :func:`chunked_cross_entropy`.
    """
    return full_cross_entropy if kind == "full" else chunked_cross_entropy(chunk, rows=rows, compiled=compiled)


def _counted(targets: Tensor) -> Tensor:
    """The number of positions whose target is not -1, at least 1: a batch without such positions has loss 0, not NaN."""
    return (targets != IGNORED).sum().clamp(min=1)


def _way(hidden: Tensor, vocabulary: int, rows: int | None, turn_rows: TurnRows, softcap: float | None) -> Way:
    """Choose by device and dtype whether a chunk's loss is computed by rows or columns (:mod:`scalegpt.model.chunk`).

    :func:`by_columns` runs on a CPU without a soft cap. It needs more range than fp16 has, and branches on the values of
    its sums, which a compiled graph cannot do.
    """
    is_cpu = hidden.device.type == "cpu"
    has_range = hidden.dtype in (torch.float32, torch.bfloat16)
    if rows is None and softcap is None and is_cpu and has_range and not torch.compiler.is_compiling():
        return by_columns
    suited = max(1, CACHED_ROWS // vocabulary) if is_cpu else LOSS_ROWS
    return by_rows(rows or suited, turn_rows)


def _turn_capped(softcap: float, logits: Tensor, targets: Tensor) -> Tensor:
    """Like :func:`~scalegpt.model.chunk.turn`, but for the loss of soft-capped logits.

    The cap's derivative is 1 - tanh².
    """
    share = (logits.float() / softcap).tanh_()
    capped = share * softcap
    total = turn(capped, targets)
    logits.copy_(capped.addcmul_(capped, share.square_(), value=-1))
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Saves the gradients of hidden states and head for the *sum* of the losses.

    The backward pass divides by the count.

    The count n is the number of positions whose target is not -1. Dividing late keeps fp16 from underflow: with n in the
    thousands a probability p is within fp16's range, but p / n is not. In the backward pass the incoming gradient contains
    the loss scale, which makes up for the division.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, way: Way, with_gradients: bool
    ) -> Tensor:
        weight = head.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if with_gradients and ctx.needs_input_grad[0] else None
        head_grad = torch.empty_like(head, dtype=torch.float32) if with_gradients and ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            some = slice(start, start + chunk)
            part = None if hidden_grad is None else hidden_grad[some]
            total += way(Chunk(hidden[some], weight, targets[some], part, head_grad, is_first=start == 0))
        count = _counted(targets)
        ctx.save_for_backward(hidden_grad, head_grad, count)
        ctx.head_dtype = head.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_grad, head_grad, count = ctx.saved_tensors
        scale = grad / count
        if hidden_grad is not None:
            hidden_grad.mul_(scale)
        if head_grad is not None:
            head_grad = head_grad.mul_(scale).to(ctx.head_dtype)
        return hidden_grad, head_grad, None, None, None, None
