"""The ranks of a run, and the backends, which train a model on them behind one interface.

Start with ``base.py``, the interface. ``plain.py``, ``fsdp.py`` and ``deepspeed/engine.py`` implement it, and what each
backend can do is in :mod:`scalegpt.config.backends`. ``world.py`` connects the ranks through a store from
``meeting.py``. May import ``model``, ``planner``, ``data`` and everything below them, but neither ``training`` nor
``checkpoint``.
"""

from pkgutil import resolve_name
from typing import Any

import torch

from scalegpt.backends.base import DTYPES, Backend, OptimizerFactory
from scalegpt.backends.capabilities import attention_by_matmuls, expands_keys
from scalegpt.backends.world import World
from scalegpt.config import RunConfig
from scalegpt.config.backends import DEEPSPEED, FSDP, PLAIN
from scalegpt.model.gpt import GPT
from scalegpt.model.loss import make_loss
from scalegpt.model.recompute import apply_recompute
from scalegpt.planner.attention import attention_kernel

__all__ = ["Backend", "World", "build_model", "make_backend"]

MAKERS = {
    PLAIN.name: "scalegpt.backends.plain:PlainBackend",
    FSDP.name: "scalegpt.backends.fsdp:FSDPBackend",
    DEEPSPEED.name: "scalegpt.backends.deepspeed.engine:DeepSpeedBackend",
}
"""Name of a backend → its class, as ``module:class``; imported only when the backend is used."""


def build_model(run: RunConfig, *, compiled: bool, device: torch.device | None = None) -> GPT:
    """Build the model of a run on the ``meta`` device.

    Recompute is applied before blocks are compiled, and both before a backend shards the model.

    Args:
        run: a run whose precision is resolved.
        compiled: compile each block, and in the chunked loss the work between the matmuls.
        device: the device on which the model will run; it decides which attention is used. None: torch's attention.
    """
    train = run.train
    with torch.device("meta"):
        model = GPT(run.model, make_loss(train.loss, train.loss_chunk, compiled=compiled))
    compute = DTYPES[train.precision]
    model.set_precision(compute, torch.float32 if train.residual_dtype == "fp32" else compute)
    attend, expands, attention = None, False, train.attention
    if device is not None:
        if train.packs_documents and device.type == "cuda":
            attention = attention_kernel(run)  # as planned: with a mask torch might choose another
        attend = attention_by_matmuls(attention, train.precision, device, dropout=run.model.dropout > 0).attend
        expands = expands_keys(attention, train.precision, device, run.model)
    model.set_attention(attention, attend=attend, expands=expands)
    apply_recompute(model, train.recompute)
    if compiled:
        for block in model.blocks:
            block.compile()
    return model


def make_backend(
    run: RunConfig,
    world: World,
    grad_accum: int,
    model: GPT,
    make_optimizer: OptimizerFactory,
    deepspeed_settings: dict[str, Any] | None = None,
) -> Backend:
    """Make the backend of a run around a model on ``meta``; the weights must be loaded afterwards.

    Args:
        run: a resolved run, which names the backend.
        world: the ranks.
        grad_accum: number of micro batches per optimizer step.
        model: from :func:`build_model`.
        make_optimizer: makes the optimizer from the backend's parameters.
        deepspeed_settings: DeepSpeed's complete configuration; used by the DeepSpeed backend only.

    Raises:
        InputError: the backend cannot run on these ranks.
    """
    backend: Backend = resolve_name(MAKERS[run.parallel.backend])(
        run, world, grad_accum, model, make_optimizer, deepspeed_settings
    )
    return backend
