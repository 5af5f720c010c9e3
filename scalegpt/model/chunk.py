"""The loss of a chunk (some tokens of a micro batch), and its gradients for the hidden states and the head's matrix.

There are two ways of computing loss and gradients, which agree within rounding: by rows, in this module, and by
columns, on a CPU in fp32 and bf16 (:mod:`scalegpt.model.cpu.columns`). By rows the logits are [k, V]. Softmax minus
one-hot target replaces the logits, some rows at a time (:func:`turn`). Two matmuls then make both gradients.

Sizes: k tokens of the chunk, V vocabulary, H width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -1
"""Target of a position that does not count in the loss."""

CACHED_ROWS = 800_000
"""The number of logits that fit a CPU's caches. On a CPU :func:`turn` gets about this many at once."""


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a micro batch, and the tensors that receive their gradients.

    Attributes:
        hidden: [k, H] in the compute dtype.
        weight: [V, H], the head in the compute dtype.
        targets: [k] int64; -1 gives neither loss nor gradient.
        hidden_grad: [k, H] in the compute dtype, filled with the gradient of ``hidden``; None: not wanted.
        head_grad: [V, H] fp32, to which the chunk's part of the head's gradient is added; None: not wanted.
        is_first: whether this is the first chunk, so that ``head_grad`` is uninitialised and is overwritten.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    hidden_grad: Tensor | None
    head_grad: Tensor | None
    is_first: bool

    @property
    def counts(self) -> Tensor:
        """[k] bool, whether each position counts in the loss."""
        return self.targets != IGNORED

    @property
    def entries(self) -> Tensor:
        """[k] int64, the targets as indices of the vocabulary; 0 for a position that does not count."""
        return torch.where(self.counts, self.targets, 0)

    def add_head_gradient(self, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add ``logits_grad`` @ ``hidden``, the chunk's part of the head's gradient, to ``head_grad`` unless it is None.

        Args:
            logits_grad: [V, k] in the compute dtype.
            hidden: [k, H] in the compute dtype.
        """
        if self.head_grad is None:
            return
        if self.head_grad.dtype == hidden.dtype:  # without a temporary as large as the head
            torch.addmm(self.head_grad, logits_grad, hidden, beta=0 if self.is_first else 1, out=self.head_grad)
        elif self.is_first:
            self.head_grad.copy_(logits_grad @ hidden)
        else:
            self.head_grad.add_(logits_grad @ hidden)


Way = Callable[[Chunk], Tensor]
"""Fills a chunk's gradients, and returns the sum of its losses, fp32."""


def by_rows(rows: int, turn_rows: Callable[[Tensor, Tensor], Tensor]) -> Way:
    """Make a :data:`Way` with logits [k, V]: a function that returns the loss of a chunk and fills its gradients.

    ``turn_rows``, a function like :func:`turn`, turns the logits of ``rows`` tokens at a time into gradients.
    """

    def way(chunk: Chunk) -> Tensor:
        logits = chunk.hidden @ chunk.weight.t()
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for first in range(0, logits.shape[0], rows):
            some = slice(first, first + rows)
            total += turn_rows(logits[some], chunk.targets[some])
        if chunk.hidden_grad is not None:
            torch.mm(logits, chunk.weight, out=chunk.hidden_grad)
        chunk.add_head_gradient(logits.t(), chunk.hidden)
        return total

    return way


def turn(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn the logits of some rows into the gradient of the sum of their losses, in place.

    The log-sum-exp follows from the softmax's largest entry, exp(m - lse), with m the largest logit. This entry is at least
    1/V, so its logarithm is finite. The target's probability may underflow to 0, so its logarithm is not used.

    Args:
        logits: [r, V] in the compute dtype; becomes softmax minus one-hot target, and 0 in rows with target -1.
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
