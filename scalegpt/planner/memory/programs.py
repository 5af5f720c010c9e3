"""The programs (allocations and frees) of a model's parts, compiled for the dtypes and the recompute policy of a run."""

from functools import lru_cache

from scalegpt.architecture.decoder import Decoder
from scalegpt.architecture.layers import FP32, Numerics
from scalegpt.architecture.loss import LossPart
from scalegpt.architecture.operations import Recorder, Size, Value
from scalegpt.config import ModelConfig, RunConfig
from scalegpt.planner.memory.states import casts_weights
from scalegpt.planner.memory.tape import Compiler, Kinds, Program, Sized
from scalegpt.planner.memory.timeline import ACTIVATIONS, GRADIENTS, LOSS, Timeline
from scalegpt.units import BYTES


def numerics_of(run: RunConfig, kernel: str) -> Numerics:
    """The dtypes and the attention kernel of a run whose precision and micro batch are fixed."""
    compute = BYTES[run.train.precision]
    residual = FP32 if run.train.residual_dtype == "fp32" else compute
    weights = FP32 if casts_weights(run) else compute
    return Numerics(compute, residual, weights, kernel, run.train.micro_batch == 1, run.train.packs_documents)


def kept_by_blocks(run: RunConfig, kernel: str) -> int:
    """Bytes of activations that all blocks keep for the backward pass of a micro batch."""
    timeline = Timeline()
    block_at(run.model, numerics_of(run, kernel), run.train.recompute, run.train.micro_batch).forward(timeline)
    return run.model.n_layer * timeline.live[ACTIVATIONS]


@lru_cache(maxsize=1024)
def block_program(model: ModelConfig, numerics: Numerics, recompute: str) -> Program:
    """The program (allocations and frees) of one block, from the residual stream to the residual stream."""
    r, x = Recorder(), Value(_stream(model, numerics))
    y = Decoder(model).block.record(r, x, model.block_size, numerics)
    return Compiler(r, x, y, numerics.compute, recompute=recompute).compile()


@lru_cache(maxsize=8192)
def block_at(model: ModelConfig, numerics: Numerics, recompute: str, batch: int) -> Sized:
    """The program (allocations and frees) of one block, at a micro batch of ``batch`` sequences."""
    return block_program(model, numerics, recompute).at(batch)


@lru_cache(maxsize=8192)
def embedding_at(model: ModelConfig, numerics: Numerics, batch: int) -> Sized:
    """The program (allocations and frees) of the embeddings, from ids on, at a micro batch of ``batch`` sequences."""
    r = Recorder()
    x = Decoder(model).embedding.record(r, model.block_size, numerics)
    kinds = Kinds(gradient=GRADIENTS)
    return Compiler(r, None, x, numerics.weights, kinds=kinds).compile().at(batch)


@lru_cache(maxsize=8192)
def final_norm_at(model: ModelConfig, numerics: Numerics, batch: int) -> Sized:
    """The program (allocations and frees) of the final norm, at a micro batch of ``batch`` sequences."""
    r, x = Recorder(), Value(_stream(model, numerics))
    y = Decoder(model).head.norm.record(r, x, model.block_size, numerics)
    kinds = Kinds(result=LOSS, incoming=LOSS)
    return Compiler(r, x, y, numerics.compute, kinds=kinds).compile().at(batch)


@lru_cache(maxsize=8192)
def loss_at(loss: LossPart, numerics: Numerics, batch: int) -> Sized:
    """The program (allocations and frees) of head and loss, at a micro batch of ``batch`` sequences."""
    model = loss.model
    r, hidden = Recorder(), Value(Size(numerics.compute * model.block_size * model.n_embd))
    result = loss.record(r, hidden, model.block_size, numerics)
    kinds = Kinds(lasting=LOSS, passing=LOSS, start=LOSS, result=LOSS)
    return Compiler(r, hidden, result, numerics.compute, kinds=kinds).compile().at(batch)


def _stream(model: ModelConfig, numerics: Numerics) -> Size:
    return Size(numerics.residual * model.block_size * model.n_embd)
