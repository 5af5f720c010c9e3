"""The description that a run prints at its start, the content of ``plan.json``, and notes on settings that have no effect."""

from collections.abc import Iterator, Set
from typing import Any

import torch

from scalegpt.architecture.counting import count_parameters
from scalegpt.backends import World
from scalegpt.backends.capabilities import device_name
from scalegpt.config import RunConfig, TrainConfig
from scalegpt.config.optimizers import OWN_SETTINGS
from scalegpt.config.tokenizer import NAMES
from scalegpt.data.windows.mixture import Mixture, MixtureSource
from scalegpt.data.windows.sampler import held_out_starts
from scalegpt.inputs import share_of
from scalegpt.planner import length
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.memory.states import training_bytes
from scalegpt.planner.plan import Plan
from scalegpt.text import one_line
from scalegpt.units import format_bytes, human_count, human_time

MOST_EPOCHS = 4
"""Repeating a source up to this many times costs little (Muennighoff et al. 2023, arXiv 2305.16264)."""


def total_steps(train: TrainConfig, batch: BatchPlan) -> int:
    """Number of optimizer steps until ``max_iters`` or ``max_tokens`` is reached, whichever comes first."""
    return length.total_steps(train, batch.tokens)


def describe(run: RunConfig, batch: BatchPlan, world: World, data: Mixture, *, compiled: bool) -> str:
    """The lines that a run prints first: on its model, data, step, machine and model states."""
    model, train, parallel = run.model, run.train, run.parallel
    parameters = count_parameters(model).total
    steps = total_steps(train, batch)
    offload = "" if parallel.offload == "none" else f", {parallel.offload} offloaded"
    train_tokens, held_out = sum(data.train.sizes), sum(data.val.sizes)
    return "\n".join((
        f"model    {parameters:,} parameters: {model.n_layer} layers, {model.n_embd} wide, {model.heads_in_words()}, "
        f"block {model.block_size}, vocabulary {model.vocab_size:,}",
        f"data     {train_tokens:,} training and {held_out:,} held-out tokens, "
        f"{_tokenizer(run, data)}{_read_as(data)}; {_epochs(data, steps * batch.tokens)}{_packed(train)}",
        f"step     {batch.tokens:,} tokens = {world.size} rank{'s' if world.size > 1 else ''} × micro batch "
        f"{batch.micro_batch} × accumulation {batch.grad_accum} × block {batch.block_size}; {steps:,} steps",
        f"machine  {world.size} × {device_name(world.device)}{_threads(world)}, {parallel.label()}{offload}, "
        f"{train.precision}, "
        f"recompute {train.recompute}, {train.loss} loss{', compiled' if compiled else ''}",
        f"states   {format_bytes(sum(training_bytes(model, train).values()))} for weights, gradients and moments in all",
    ))  # fmt: skip


def predicted_speed(plan: Plan) -> str:
    """The line on the predicted throughput, the time of a step, and that of the run; empty if the card is not known."""
    if plan.machine.card is None:
        return ""
    whole = total_steps(plan.run.train, plan.batch) * plan.seconds
    guessed = "" if plan.machine.is_gpu or plan.is_measured else ", a rough estimate"
    low, high = map(human_count, plan.tokens_per_second_range)
    return (
        f"speed    {human_count(plan.tokens_per_second)} tokens/s predicted, likely {low} to {high}: {plan.seconds:.3g} s a "
        f"step, {human_time(whole)} for the run{guessed}"
    )


def _tokenizer(run: RunConfig, data: Mixture) -> str:
    """The tokenizer in words: its kind, or the path of its file."""
    kind = data.tokenizer.kind
    return f"{kind} tokenizer" if kind in NAMES else f"tokenizer {one_line(run.data.tokenizer)}"


def epochs_of(source: MixtureSource, tokens: int) -> float:
    """How many times a run of ``tokens`` tokens reads a source."""
    return tokens * source.weight / max(1, len(source.tokens.train))


def _epochs(data: Mixture, tokens: int) -> str:
    """The epochs of a run of ``tokens`` tokens; of several sources each one's, with its part of the windows."""
    if len(data.sources) == 1:
        return f"{epochs_of(data.sources[0], tokens):.2f} epochs"
    return ", ".join(
        f"{source.weight:.4g} {label} ({epochs_of(source, tokens):.2f} epochs of {len(source.tokens.train):,})"
        for label, source in zip(data.labels, data.sources, strict=True)
    )


def sources_summary(train: TrainConfig, batch: BatchPlan, data: Mixture) -> dict[str, dict[str, Any]]:
    """Label of each source → its size, its part of the windows, and how often the run reads it, for ``plan.json``."""
    tokens = total_steps(train, batch) * batch.tokens
    return {
        label: {
            "path": source.name,
            "weight": source.weight,
            "train_tokens": len(source.tokens.train),
            "val_tokens": len(source.tokens.val),
            "epochs": epochs_of(source, tokens),
        }
        for label, source in zip(data.labels, data.sources, strict=True)
    }


def mixture_warnings(train: TrainConfig, batch: BatchPlan, data: Mixture) -> Iterator[str]:
    """Yield a line for each source of a mixture that is repeated often, or has less held-out text than its share."""
    tokens = total_steps(train, batch) * batch.tokens
    for source in data.sources if len(data.sources) > 1 else ():
        name, epochs = one_line(source.name), epochs_of(source, tokens)
        if epochs > MOST_EPOCHS:
            yield (
                f"{name} is read {epochs:.1f} times: after about {MOST_EPOCHS} epochs repeated tokens teach much less than "
                "new ones (docs/DATA.md, Mixtures); lower its weight, or train for fewer steps"
            )
        size, wanted = len(source.tokens.val), share_of(train.eval_tokens, source.share)
        there = len(held_out_starts(size, batch.block_size, wanted)) * batch.block_size
        if there < wanted:
            yield (
                f"{name} has {there:,} held-out tokens in whole windows, fewer than its {wanted:,} of eval_tokens; its loss "
                f"counts {source.weight:.4g} in the held-out loss all the same"
            )


def _packed(train: TrainConfig) -> str:
    """Words on the packing of documents; empty where attention crosses them."""
    return "; attention stays inside documents" if train.packs_documents else ""


def _read_as(data: Mixture) -> str:
    """How the data were read, in words: the encodings of text, or whose token files they are; empty where it is not known."""
    if origins := [source.tokens.origin for source in data.sources if source.tokens.origin]:
        return f", {'; '.join(origins)}"
    return f", read as {', '.join(data.encodings)}" if data.encodings else ""


def _threads(world: World) -> str:
    """The number of threads of a rank on a CPU, in words; empty on a card."""
    count = torch.get_num_threads()
    return f" of {count} thread{'s' if count > 1 else ''}" if world.device.type == "cpu" else ""


def plan_summary(run: RunConfig, plan: Plan, world: World, settings: dict[str, Any] | None) -> dict[str, Any]:
    """The content of ``plan.json``; ``settings`` is DeepSpeed's configuration, or None for other backends."""
    batch = plan.batch
    return {
        "parameters": count_parameters(run.model).total,
        "ranks": world.size,
        "device": device_name(world.device),
        "backend": run.parallel.backend,
        "zero_stage": run.parallel.stage,
        "offload": run.parallel.offload,
        "micro_batch": batch.micro_batch,
        "grad_accum": batch.grad_accum,
        "tokens_per_step": batch.tokens,
        "steps": total_steps(run.train, batch),
        "precision": run.train.precision,
        "recompute": run.train.recompute,
        "loss": run.train.loss,
        "model_state_bytes": training_bytes(run.model, run.train),
        "deepspeed": settings,
        "torch": torch.__version__,
        "memory": plan.memory(),
        "speed": plan.speed(),
    }


def unused(run: RunConfig, batch: BatchPlan, given: Set[str]) -> Iterator[str]:
    """Yield a line for each setting that has no effect in this run although the user gave it a value other than the default.

    ``loss_chunk`` also gets a line where it exceeds the tokens of a micro batch.
    """
    train, default = run.train, TrainConfig()
    others = frozenset().union(*OWN_SETTINGS.values()) - OWN_SETTINGS[train.optimizer]
    given = {key for key in given & (others | {"loss_chunk"}) if getattr(train, key) != getattr(default, key)}
    yield from (f"{key} is not used: the optimizer is {train.optimizer}" for key in sorted(given & others))
    tokens = batch.micro_batch * batch.block_size
    if "loss_chunk" in given and train.loss == "full":
        yield "loss_chunk is not used: the loss is full"
    elif "loss_chunk" in given and train.loss_chunk > tokens:
        yield (
            f"loss_chunk {train.loss_chunk:,} is more than the {tokens:,} tokens of a micro batch: it is one chunk, and all "
            "its logits exist at once"
        )
