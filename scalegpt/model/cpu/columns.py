"""A chunk's losses and gradients on a CPU, in fp32 and bf16, from logits [V, k]: a column for each token.

Exponentials replace the logits in place, some rows at a time (a row is an entry of the vocabulary, for all tokens). Two
changes of the usual softmax save passes over the logits. It subtracts the target's logit instead of the largest logit,
which would have to be found first. And it divides [k, H] matrices by the sums of exponentials, not the larger logits.
In addition, two of the three matmuls read both factors in memory order; with AMX this halves the time of oneDNN's bf16
kernels (``benchmarks/loss_bench.py``).
"""

import torch
from torch import Tensor

from scalegpt.model.chunk import Chunk

CACHED = 500_000
"""Logits whose exponentials are computed at once: 2 MB in fp32, which the caches of two cores hold."""

SAFE = 1e30
"""The limit for a sum of exponentials. Below it, the sum and all results computed from it are far from the overflow at
3e38."""


def by_columns(chunk: Chunk) -> Tensor:
    """Fill a chunk's gradients, and return the sum of its losses, fp32, from logits [V, k].

    Let x be a token's logits, t its target, c any number and s = Σ exp(x - c). The token's loss is log s + c - x[t],
    and the gradient of its logits (exp(x - c) - s·onehot(t)) / s. With c = x[t], s is at least 1; s exceeds
    :data:`SAFE` only if the largest logit is about 70 above the target's. Then the computation is repeated with the
    largest logit as c.
    """
    entries, tokens = chunk.entries, torch.arange(chunk.targets.shape[0])
    logits = chunk.weight @ chunk.hidden.t()
    own = logits[entries, tokens].float()
    shift, sums = own, _exponentials(logits, own)
    if not bool((sums < SAFE).all()):
        torch.mm(chunk.weight, chunk.hidden.t(), out=logits)
        shift = logits.amax(dim=0).float()
        sums = _exponentials(logits, shift)
    losses = (sums.log() + shift - own) * chunk.counts
    logits[entries, tokens] = (logits[entries, tokens].float() - sums).to(logits.dtype)
    shares = (chunk.counts / sums).unsqueeze(1)
    if chunk.hidden_grad is not None:
        torch.mul(logits.t() @ chunk.weight, shares, out=chunk.hidden_grad)
    if chunk.head_grad is not None:
        chunk.add_head_gradient(logits, (chunk.hidden * shares).to(logits.dtype))
    return losses.sum()


def _exponentials(logits: Tensor, shift: Tensor) -> Tensor:
    """Replace the logits in place by exp(logits - shift), computed in fp32.

    Args:
        logits: [V, k] fp32 or bf16.
        shift: [k] fp32.

    Returns:
        [k] fp32, each token's sum of exponentials, added up before the exponentials are rounded to the logits' dtype.
    """
    V, k = logits.shape
    rows = min(V, max(1, CACHED // k))
    exact = None if logits.dtype == torch.float32 else torch.empty(rows, k)
    sums = torch.zeros(k)
    for first in range(0, V, rows):
        some = logits[first : first + rows]
        values = some if exact is None else exact[: some.shape[0]].copy_(some)
        values.sub_(shift).exp_()
        sums += values.sum(dim=0)
        if values is not some:
            some.copy_(values)
    return sums
