"""A step's work holds to the formulas of the literature, to torch's own count of a real model, and to what must scale."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scalegpt.architecture.counting import count_parameters
from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.architecture.loss import LossPart
from scalegpt.config import ModelConfig, RunConfig, TrainConfig
from scalegpt.config.backends import Mesh
from scalegpt.config.presets import resolve
from scalegpt.model.gpt import GPT
from scalegpt.model.loss import make_loss
from scalegpt.model.recompute import apply_recompute
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.memory.programs import block_program, numerics_of
from scalegpt.planner.time.work import (
    LOSS,
    OPTIMIZER,
    RECOMPUTE,
    WEIGHTS,
    HostTraffic,
    Work,
    count_work,
    flops_per_token,
    host_traffic,
)
from scalegpt.tracing.cuda import cuda_functions
from traffic import Traffic

L, H, A, T, V, B = 3, 64, 2, 32, 100, 2
N = B * T
SHAPE = {"n_layer": L, "n_embd": H, "n_head": A, "block_size": T, "vocab_size": V, "micro_batch": B}


def made(**flags: Any) -> RunConfig:
    return resolve(flags={**SHAPE, "precision": "bf16", "loss": "full", **flags})


def work(kernel: str = "flash", *, shards: int = 1, compiled: bool = True, **flags: Any) -> Work:
    return count_work(made(**flags), Mesh(1, shards), kernel=kernel, compiled=compiled)


def operations(counted: Work) -> float:
    """All operations of a micro step: of matmuls and of attention."""
    loads = (*counted.forward.values(), *counted.backward.values())
    return sum(load.flops + load.attention for load in loads)


def moved(counted: Work) -> float:
    return sum(load.bytes for load in (*counted.forward.values(), *counted.backward.values()))


# --- operations ------------------------------------------------------------------------------------------------------


def test_a_token_takes_six_operations_a_weight_and_twelve_a_position() -> None:
    """6P + 12·L·H·T, where P are the weights that are multiplied by: no norm, no bias, no embedding but the head."""
    multiplied = 12 * L * H**2 + V * H
    assert operations(work("math")) == N * (6 * multiplied + 12 * L * H * T)


def test_mfu_counts_gpt2_as_palm_does() -> None:
    gpt2 = ModelConfig(n_layer=12, n_embd=768, n_head=12, block_size=1024, vocab_size=50257, bias=True, tie_head=True)
    assert flops_per_token(gpt2) == 6 * 124_439_808 + 12 * 12 * 768 * 1024


def test_what_is_masked_is_not_computed() -> None:
    """A causal kernel computes half of two products, and of five in the backward pass, which computes one of them again."""
    whole = 4 * N * T * H * L  # two products of all pairs
    causal = operations(work()) - (operations(work("math")) - 3 * whole)
    assert causal == whole / 2 + 5 / 2 * whole / 2
    assert operations(work("mem_efficient")) == operations(work("flash"))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_torch_counts_as_many_operations_in_a_real_step(recompute: str, bias: bool) -> None:
    model = GPT(ModelConfig(n_layer=L, n_embd=H, n_head=A, block_size=T, vocab_size=V, bias=bias))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.set_attention("math")
    apply_recompute(model, recompute)
    tokens = torch.zeros(B, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == operations(work("math", recompute=recompute, bias=bias))


def test_full_recompute_runs_each_block_again_but_for_its_last_matmul() -> None:
    again = operations(work(recompute="full")) - operations(work())
    assert again == 2 * N * (12 - 4) * H**2 * L + 2 * N * T * H * L


def test_selective_recompute_multiplies_nothing_again_without_dropout() -> None:
    assert operations(work(recompute="selective")) == operations(work())
    assert moved(work(recompute="selective")) > moved(work())
    dropped = operations(work(recompute="selective", dropout=0.1)) - operations(work(dropout=0.1))
    assert dropped == 2 * N * T * H * L


def test_both_losses_multiply_alike() -> None:
    for loss in ("full", "chunked"):
        assert work(loss=loss).forward[LOSS].flops == 6 * N * V * H


# --- what must scale -------------------------------------------------------------------------------------------------


def test_operations_grow_with_the_tokens_and_not_with_how_they_are_held() -> None:
    once = operations(work())
    assert operations(work(micro_batch=4 * B)) == 4 * once
    for flags in (
        {"backend": "fsdp", "zero_stage": 3},
        {"backend": "deepspeed", "zero_stage": 2},
        {"precision": "fp32"},
    ):
        assert operations(work(shards=8, **flags)) == once


def test_what_weights_cost_does_not_grow_with_the_tokens() -> None:
    first, second, third = (work(micro_batch=times * B) for times in (1, 2, 3))
    assert first.backward[WEIGHTS] == third.backward[WEIGHTS]
    assert first.update == third.update
    assert moved(third) - moved(second) == moved(second) - moved(first) > 0


def test_half_the_bytes_are_moved_in_half_precision() -> None:
    """But for what is fp32 in any case: gradients that add up, and the loss inside."""
    full, half = (moved(work(precision=precision, micro_batch=64)) for precision in ("fp32", "bf16"))
    assert full / 2 < half < full


def test_each_rank_updates_its_part() -> None:
    parameters = count_parameters(made().model).total
    whole = work().update[OPTIMIZER]
    # AdamW reads weight, gradient and two moments and writes all but the gradient; before it, the norm and the clipping.
    assert whole.bytes == parameters * (4 * 4 + 3 * 4 + 3 * 4)
    assert work(shards=8).update[OPTIMIZER].bytes == whole.bytes / 8
    assert work(fused=False).update[OPTIMIZER].bytes > whole.bytes


def test_compiled_blocks_move_less_with_fewer_kernels() -> None:
    eager, compiled = work(compiled=False, residual_dtype="fp32"), work(residual_dtype="fp32")
    assert moved(compiled) < moved(eager)
    kernels = [
        sum(load.kernels for load in (*each.forward.values(), *each.backward.values())) for each in (compiled, eager)
    ]
    assert kernels[0] < kernels[1]


def test_a_smaller_chunk_adds_up_the_heads_gradient_more_often() -> None:
    loads = [work(loss="chunked", loss_chunk=chunk).forward[LOSS] for chunk in (N, N // 2, N // 2 - 1)]
    added = 3 * 4 * V * H - 2 * 2 * V * H  # what one more chunk moves at least: the fp32 sum, less what bf16 could save
    for fewer, more in pairwise(loads):
        assert more.loss - fewer.loss >= added
        assert more.kernels > fewer.kernels


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_loss_moves_what_its_operators_read_and_write(precision: str, loss: str, softcap: float | None) -> None:
    rows, width, vocabulary = 256, 4, 5_000
    flags = {"n_embd": width, "n_head": 1, "block_size": rows, "vocab_size": vocabulary, "micro_batch": 1}
    run = made(**flags, precision=precision, loss=loss, loss_chunk=rows, logit_softcap=softcap)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    hidden, head = (torch.randn(size, width, dtype=dtype, requires_grad=True) for size in (rows, vocabulary))
    module = GPT(run.model, make_loss(loss, rows, rows=rows))
    with Traffic() as traffic:
        module.loss(hidden, head, torch.zeros(rows, dtype=torch.long)).backward()
    cost = LossPart.of(run.model, run.train).cost(rows, numerics_of(run, "flash"), compiled=False)
    assert cost.moved == pytest.approx(traffic.moved, rel=0.03)  # and the head's own bytes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_math_attention_moves_what_its_operators_read_and_write(precision: str, dropout: float) -> None:
    heads, tokens, width = 16, 256, 8
    flags = {"n_embd": heads * width, "n_head": heads, "block_size": tokens, "micro_batch": 1, "dropout": dropout}
    run = made(**flags, precision=precision)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    q, k, v = (torch.randn(1, heads, tokens, width, dtype=dtype, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH), cuda_functions("math"), Traffic() as traffic:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout).sum().backward()
    inner = 14 * heads * tokens**2  # of the softmax, which looks for masked rows, clears them, and is one operator here
    program = block_program(run.model, numerics_of(run, "math"), "none")
    (op,) = (op for op in program.operations if op.name == "weighted sum")
    assert op.forward.moved + op.backward.moved == pytest.approx(traffic.moved + inner, rel=0.1)


def test_nothing_is_computed_again_unless_asked_for() -> None:
    assert work().backward[RECOMPUTE].flops == work().backward[RECOMPUTE].bytes == 0


# --- offload ---------------------------------------------------------------------------------------------------------


def offloaded(offload: str, backend: str = "deepspeed", ranks: int = 4, grad_accum: int = 3) -> HostTraffic:
    run = made(backend=backend, zero_stage=3, offload=offload)
    return host_traffic(run, run.parallel.mesh(ranks), grad_accum)


def test_gradients_leave_the_card_and_weights_come_back() -> None:
    mine = count_parameters(made().model).total / 4
    assert offloaded("none") == HostTraffic()
    assert offloaded("optimizer").copied == mine * (4 + 2)  # an fp32 gradient, a bf16 weight
    assert offloaded("all").copied == mine * (4 + 2 + 2 * 2 * 3)  # and weights for both passes of three micro steps
    assert offloaded("all", "fsdp").copied == mine * 3 * (4 + 4 + 4)  # fp32, both passes and the gradient
    assert offloaded("optimizer").updated == mine * 28


def test_the_card_updates_nothing_that_the_host_does() -> None:
    assert work(backend="deepspeed", zero_stage=2, offload="optimizer", shards=4).update[OPTIMIZER].bytes == 0


# --- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_torch_counts_as_many_operations_in_muons_update(precision: str) -> None:
    """In bf16 280·H³ a block, by hand; in fp32 the wide matrices take the Gram form, with 176·H³."""
    train = TrainConfig(optimizer="muon", precision=precision)
    named = {
        name: torch.nn.Parameter(torch.ones(shape))
        for name, shape in parameter_shapes(made(precision=precision).model).items()
    }
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = optimizer_factory(train)(named.items())
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == work(precision=precision, optimizer="muon").update[OPTIMIZER].flops
    assert counter.get_total_flops() == {"bf16": 280, "fp32": 176}[precision] * H**3 * L


def test_ranks_share_muons_work_as_evenly_as_matrices_allow() -> None:
    def flops(ranks: int, **flags: Any) -> float:
        run = made(optimizer="muon", **flags)
        counted = count_work(run, run.parallel.mesh(ranks), kernel="flash", compiled=True)
        return counted.update[OPTIMIZER].flops

    alone = flops(1)
    for flags in ({"backend": "fsdp", "zero_stage": 0}, {"backend": "fsdp", "zero_stage": 3}):
        assert flops(L, **flags) == alone / L
        assert flops(2, **flags) == alone * 2 / L  # of three matrices one rank has two
        assert flops(64, **flags) == alone / L


def test_muon_reads_and_writes_one_moment() -> None:
    adamw, muon = (work(optimizer=name).update[OPTIMIZER].bytes for name in ("adamw", "muon"))
    # 28 + 12 bytes an element against 66 + 12, in bf16: gathered, divided by its norm, added.
    assert muon - adamw == pytest.approx((54 + 12 - 40) * 12 * L * H**2)
