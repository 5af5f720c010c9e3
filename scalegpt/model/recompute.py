"""Recompute (activation checkpointing): what a block keeps for its backward pass, and what it computes again.

===========  ==============================================================  =====================================
kind         kept per block                                                  computed again in the backward
===========  ==============================================================  =====================================
none         everything autograd saves                                       nothing
selective    the block's input, QKV, attention's output and statistics,      norms, GELU, dropout, residual sums
             its projection, the feed-forward's wide layer
full         the block's input                                               the whole block
===========  ==============================================================  =====================================

The selective policy keeps the results that are dear to compute and drops those that are cheap. The last matmul of a
block is not kept: nothing in the block's backward needs its result.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from scalegpt.model.gpt import GPT

_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_MATMULS_PER_BLOCK = 4


def _attention_ops() -> frozenset[Any]:
    """SDPA's kernels, as far as this torch has them."""
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
    )
    return frozenset(getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name))


_ATTENTION = _attention_ops()


class _KeepDearResults:
    """The selective policy for one pass over a block: it counts the matmuls to leave out the last."""

    def __init__(self) -> None:
        self.matmuls = {False: 0, True: 0}  # by whether it is the recomputation

    def __call__(self, context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if op in _ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in _MATMULS:
            self.matmuls[context.is_recompute] += 1
            if self.matmuls[context.is_recompute] < _MATMULS_PER_BLOCK:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_KeepDearResults())  # type: ignore[no-untyped-call]


def apply_recompute(model: GPT, kind: str) -> None:
    """Make every block of the model recompute as ``kind`` says; apply before compile and before sharding.

    The random state is replayed where the model has dropout.

    Args:
        model: the model, changed in place.
        kind: ``none``, ``selective`` or ``full``.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": model.config.dropout > 0}
    if kind == "selective":
        options["context_fn"] = _selective_contexts
    for block in model.blocks:
        block.recompute = None if kind == "none" else partial(checkpoint, **options)
