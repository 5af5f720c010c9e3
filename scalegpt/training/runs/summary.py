"""How a run is laid out, in the words that it opens with and as ``plan.json``."""

from typing import Any

import torch

from scalegpt.architecture.counting import count_parameters
from scalegpt.backends import World
from scalegpt.backends.capabilities import device_name
from scalegpt.config import RunConfig, TrainConfig
from scalegpt.data.shards import TokenSet
from scalegpt.planner import length
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.memory.states import training_bytes
from scalegpt.units import format_bytes


def total_steps(train: TrainConfig, plan: BatchPlan) -> int:
    """Optimizer steps until ``max_iters`` or ``max_tokens``, whichever comes first."""
    return length.total_steps(train, plan.tokens)


def describe(run: RunConfig, plan: BatchPlan, world: World, data: TokenSet, *, compiled: bool) -> str:
    """The lines that a run opens with."""
    model, train, parallel = run.model, run.train, run.parallel
    parameters = count_parameters(model).total
    steps = total_steps(train, plan)
    offload = "" if parallel.offload == "none" else f", {parallel.offload} offloaded"
    epochs = steps * plan.tokens / max(1, len(data.train))
    return "\n".join((
        f"model    {parameters:,} parameters: {model.n_layer} layers, {model.n_embd} wide, {model.n_head} heads, "
        f"block {model.block_size}, vocabulary {model.vocab_size:,}",
        f"data     {len(data.train):,} training and {len(data.val):,} held-out tokens, "
        f"{data.tokenizer.kind} tokenizer{_read_as(data)}; {epochs:.2f} epochs",
        f"step     {plan.tokens:,} tokens = {world.size} rank{'s' if world.size > 1 else ''} × micro batch "
        f"{plan.micro_batch} × accumulation {plan.grad_accum} × block {plan.block_size}; {steps:,} steps",
        f"machine  {world.size} × {device_name(world.device)}{_threads(world)}, {parallel.label()}{offload}, "
        f"{train.precision}, "
        f"recompute {train.recompute}, {train.loss} loss{', compiled' if compiled else ''}",
        f"states   {format_bytes(sum(training_bytes(model, train).values()))} for weights, gradients and moments in all",
    ))  # fmt: skip


def _read_as(data: TokenSet) -> str:
    """In which encodings the text was read, where that is known."""
    encodings = data.encodings
    return f", read as {', '.join(encodings)}" if encodings else ""


def _threads(world: World) -> str:
    """What of the cores a rank takes, where the cores are what it computes on."""
    count = torch.get_num_threads()
    return f" of {count} thread{'s' if count > 1 else ''}" if world.device.type == "cpu" else ""


def plan_summary(run: RunConfig, plan: BatchPlan, world: World, settings: dict[str, Any] | None) -> dict[str, Any]:
    """What ``plan.json`` holds: how the run is laid out."""
    count = count_parameters(run.model)
    return {
        "parameters": count.total,
        "ranks": world.size,
        "device": device_name(world.device),
        "backend": run.parallel.backend,
        "zero_stage": run.parallel.stage,
        "offload": run.parallel.offload,
        "micro_batch": plan.micro_batch,
        "grad_accum": plan.grad_accum,
        "tokens_per_step": plan.tokens,
        "steps": total_steps(run.train, plan),
        "precision": run.train.precision,
        "recompute": run.train.recompute,
        "loss": run.train.loss,
        "model_state_bytes": training_bytes(run.model, run.train),
        "deepspeed": settings,
        "torch": torch.__version__,
    }
