"""Recompute (activation checkpointing): what a block keeps for its backward pass, and what it computes again.

===========  ==============================================================  =====================================
kind         kept per block                                                  computed again in the backward
===========  ==============================================================  =====================================
none         everything autograd saves                                       nothing
selective    the block's input, QKV, attention's output and statistics,      norms, activations, dropout, sums
             attention's projection, the feed-forward's wide layer
full         the block's input                                               the whole block
===========  ==============================================================  =====================================

The selective policy keeps results that are expensive to compute. The result of a block's last matmul is not kept, since
nothing in the block's backward pass needs it. :func:`scalegpt.architecture.recompute.kept_matmuls`, which the planner reads
too, finds the matmuls whose results are kept from the description of the block in :mod:`scalegpt.architecture`.

With dropout, every operation that draws random numbers must run again in the same order, to draw the same masks.
Attention is therefore recomputed, since it draws a mask, and the result of the last matmul is kept, since the last mask
is drawn after it.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import scalegpt.model.cpu.matmul_attention  # noqa: F401 - registers the operator
from scalegpt.architecture.recompute import kept_matmuls
from scalegpt.model.gpt import GPT

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


_SDPA = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "attention_math")

_ATTENTION = frozenset(
    [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in _SDPA]
    + [torch.ops.scalegpt.matmul_attention.default]
)
"""The operators of attention: SDPA's kernels, and :func:`~scalegpt.model.cpu.matmul_attention.matmul_attention`."""


class _KeepDearResults:
    """The selective policy for one forward pass of a block and its recomputation. It counts the matmuls in both.

    Args:
        matmuls: for each matmul of a block, in order, whether its result is kept.
        with_dropout: whether the block draws random numbers.
    """

    def __init__(self, matmuls: tuple[bool, ...], *, with_dropout: bool) -> None:
        self.attention = frozenset() if with_dropout else _ATTENTION
        self.matmuls = matmuls
        self.seen = {False: 0, True: 0}  # is it the recomputation? → matmuls so far

    def __call__(self, context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if op in self.attention:
            return CheckpointPolicy.MUST_SAVE
        if op in _MATMULS:
            number = self.seen[context.is_recompute]
            self.seen[context.is_recompute] += 1
            if self.matmuls[number]:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts(matmuls: tuple[bool, ...], *, with_dropout: bool) -> Any:
    policy = _KeepDearResults(matmuls, with_dropout=with_dropout)
    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def apply_recompute(model: GPT, kind: str) -> None:
    """Make every block of the model recompute as ``kind`` says. Call this before compiling and before sharding.

    Args:
        model: the model, which is changed in place. With dropout, recomputation restores the state of the random number
            generators.
        kind: ``none``, ``selective`` or ``full``.
    """
    with_dropout = model.config.dropout > 0
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": with_dropout}
    if kind == "selective":
        options["context_fn"] = partial(_selective_contexts, kept_matmuls(model.config), with_dropout=with_dropout)
    for block in model.layers:
        block.recompute = None if kind == "none" else partial(checkpoint, **options)
