"""Cross entropy of the LM head: over full logits, or over chunks of tokens so that the logits never exist as a whole.

Both take the hidden states and the head's matrix, and compute the same thing: logits in the compute dtype (as the
matmul gives them), log-sum-exp and loss in fp32, the mean over the positions whose target is not -1.

Memory beyond the inputs, for n tokens, vocabulary V, compute dtype of c bytes, chunk of k tokens:

- full: in the forward c·n·V logits, their fp32 copy 4·n·V (none in fp32) and the log-softmax 4·n·V; at the backward's
  peak 12·n·V: the log-softmax, its gradient and the fp32 logits' gradient.
- chunked: the hidden states' gradient c·n·H and the head's 4·V·H in fp32, which stay for the backward; the head cast to
  the compute dtype c·V·H, where it is not in it already; and for each chunk the larger of (2c + 4)·k·V (8·k·V in fp32),
  its logits, their exponentials and their gradient, and c·k·V + c·V·H, its part of the head's gradient, which fp32 adds
  without a temporary: c·k·V.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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


def chunked_cross_entropy(chunk: int) -> Loss:
    """Make a loss that forms the logits of ``chunk`` tokens at a time.

    The gradients are computed in the forward pass, while a chunk's logits exist, so nothing is recomputed and the
    backward pass only scales them. It follows that the loss cannot be differentiated twice.

    Raises:
        InputError: a chunk below one token.
    """
    if chunk < 1:
        raise InputError(f"loss_chunk must be at least 1 token, not {chunk}")

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        result: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            flat, head, targets.reshape(-1), chunk, torch.is_grad_enabled()
        )
        return result

    return loss


def make_loss(kind: str, chunk: int) -> Loss:
    """Return the loss that the settings ``loss`` and ``loss_chunk`` name."""
    return full_cross_entropy if kind == "full" else chunked_cross_entropy(chunk)


def _counted(targets: Tensor) -> Tensor:
    """How many positions count, at least one so that an empty batch gives 0 and not NaN."""
    return (targets != IGNORED).sum().clamp(min=1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Saves the gradients of hidden states and head for the *sum* of the losses; the backward divides by the count.

    Dividing late keeps the fp16 gradients of single logits away from underflow: p / n is beyond fp16's range for n in
    the thousands, p is not, and a loss scale arrives with the incoming gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int, with_gradients: bool) -> Tensor:
        weight = head.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if with_gradients and ctx.needs_input_grad[0] else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if with_gradients and ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            total += _add_chunk(
                hidden[rows], weight, targets[rows], hidden_grad[rows] if hidden_grad is not None else None, head_grad
            )
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


def _add_chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, hidden_grad: Tensor | None, head_grad: Tensor | None
) -> Tensor:
    """Return the sum of the losses of some rows, and add to the gradients. What it allocates dies with the call.

    Args:
        hidden: [k, H] in the compute dtype.
        weight: [V, H] in the compute dtype.
        targets: [k] int64.
        hidden_grad: [k, H] to write the gradient of these rows to, or None.
        head_grad: [V, H] fp32 to add these rows' gradient to, or None.
    """
    losses, logits_grad = _losses_and_gradients(F.linear(hidden, weight), targets)
    if hidden_grad is not None:
        torch.mm(logits_grad, weight, out=hidden_grad)
    if head_grad is not None:
        if head_grad.dtype == hidden.dtype:
            head_grad.addmm_(logits_grad.t(), hidden)  # without a temporary as large as the head
        else:
            head_grad += logits_grad.t() @ hidden
    return losses


def _losses_and_gradients(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of some rows (fp32) and its gradient by the logits, in the logits' dtype.

    One fp32 tensor of the logits' size becomes the exponentials, then the gradient, in place.

    Args:
        logits: [k, V] in the compute dtype.
        targets: [k] int64; rows with target -1 give neither loss nor gradient.
    """
    counts = (targets != IGNORED).unsqueeze(1)
    columns = torch.where(counts, targets.unsqueeze(1), 0)
    peak = logits.amax(dim=-1, keepdim=True).float()
    grad = (logits - peak).exp_()  # promotes to fp32
    total = grad.sum(dim=-1, keepdim=True)
    losses = (total.log() + peak - logits.gather(1, columns)) * counts
    grad.mul_(counts / total).scatter_add_(1, columns, -counts.float())
    return losses.sum(), grad.to(logits.dtype)
