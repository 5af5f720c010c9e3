"""The module and its description agree on drawn configurations: names, shapes, operations, and the bytes of every phase.

``python tests/oracle/draws.py 160`` holds many more to the trace, over backends, optimizers and accumulation.
"""

import random
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.architecture.recompute import kept_matmuls
from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.config.presets import resolve
from scalegpt.model.gpt import GPT
from scalegpt.model.loss import make_loss
from scalegpt.model.recompute import apply_recompute
from scalegpt.planner.attention import unfit
from scalegpt.planner.memory.predict import predict
from scalegpt.planner.time.work import count_work
from scalegpt.tracing.trace import trace_step

WITHIN = 0.005
"""Of the trace."""

SLACK = 8192
"""Bytes of scalars and single vectors that the planner does not follow; they weigh in models as small as these."""


def drawn(seed: int) -> RunConfig:
    """A model of every kind that there is, small."""
    pick = random.Random(seed).choice
    heads = pick((1, 2, 4))
    flags: dict[str, Any] = {
        "n_layer": pick((1, 3)), "n_head": heads, "n_embd": heads * pick((16, 24, 36)), "block_size": pick((64, 96)),
        "vocab_size": pick((300, 2000)), "bias": pick((False, True, "qkv")), "tie_head": pick((False, True)),
        "dropout": pick((0.0, 0.0, 0.125)), "activation": pick(("gelu", "gelu_tanh", "relu2", "swiglu", "geglu")),
        "n_inner": pick((None, 40, 160)), "norm": pick(("layernorm", "rmsnorm")),
        "parallel_block": pick((False, True)), "logit_softcap": pick((None, None, 30.0)),
        "micro_batch": pick((1, 2, 4)), "precision": pick(("bf16", "fp32")), "residual_dtype": pick(("compute", "fp32")),
        "recompute": pick(("none", "selective", "full")), "loss": pick(("full", "chunked")), "loss_chunk": 64,
        "attention": pick(("auto", "mem_efficient", "math")), "packing": pick(("contiguous", "contiguous", "documents")),
        "position": pick(("learned", "rope", "rope", "none")), "rotary_share": pick((1.0, 0.5)),
        "qk_norm": pick((False, True)),
        "n_kv_head": pick([n for n in (1, 2, 4) if heads % n == 0]), "head_size": pick((None, None, 24, 20)),
    }  # fmt: skip
    if unfit(flags["attention"], resolve(flags=flags)):
        flags["attention"] = "auto"
    return resolve(flags=flags)


SEEDS = range(24)


@pytest.mark.parametrize("seed", SEEDS)
def test_names_and_shapes(seed: int) -> None:
    model = drawn(seed).model
    with torch.device("meta"):
        module = GPT(model)
    own = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert list(own.items()) == list(parameter_shapes(model).items())


@pytest.mark.parametrize("seed", SEEDS)
def test_operations(seed: int, one_thread: None) -> None:
    """Torch's own count of a forward and a backward pass, with attention out of single operators."""
    run = drawn(seed)
    loss = make_loss(run.train.loss, run.train.loss_chunk)
    model = GPT(run.model, loss)
    model.set_attention("math")
    model.set_packing(0 if run.train.packs_documents else None)
    apply_recompute(model, run.train.recompute)
    tokens = torch.zeros(run.train.micro_batch, run.model.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    work = count_work(run, Mesh(), kernel="math", compiled=False)
    described = sum(load.flops for load in (*work.forward.values(), *work.backward.values()))
    assert counter.get_total_flops() == described


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes(seed: int) -> None:
    run = drawn(seed)
    planned, traced = predict(run), trace_step(run)
    assert planned.peak_bytes == pytest.approx(traced.peak_bytes, rel=WITHIN, abs=SLACK)
    for phase, size in planned.phases.items():
        assert size == pytest.approx(traced.phases[phase], rel=WITHIN, abs=4 * SLACK), phase


def test_selective_recompute_keeps_all_matmuls_but_the_last() -> None:
    assert kept_matmuls(drawn(0).model.changed(dropout=0.0)) == (True, True, True, False)
    assert kept_matmuls(drawn(0).model.changed(dropout=0.1)) == (True, True, True, True)
