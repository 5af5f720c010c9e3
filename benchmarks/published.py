"""Published runs of other trainers: their measurements, and the planner's predictions for them.

Two files hold them. ``published_runs.csv`` is the table of MosaicML llm-foundry's benchmarks
(github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md). ``published_runs_other_trainers.csv`` has runs of
other trainers; its column ``source`` says where each is published. :mod:`benchmarks.trainers` says how each trainer differs
from ours.

:meth:`PublishedRun.predicted` predicts the speed in the trainer that was measured, and :attr:`PublishedRun.total_bytes`
its memory. :attr:`PublishedRun.plan` plans the same run in our trainer.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.trainers import CARDS, FUSED, LLM_FOUNDRY, NETWORK_GBPS, UNFIT, Row, Trainer, trainer_of
from scalegpt.architecture.counting import count_parameters
from scalegpt.architecture.operations import ELEMENTWISE
from scalegpt.config import RunConfig
from scalegpt.config.presets import resolve
from scalegpt.hardware.gpus import Card, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Estimator, Plan, make_plan
from scalegpt.planner.time.communication import collectives
from scalegpt.planner.time.rates import Rates
from scalegpt.planner.time.step_time import Sends, StepTotals, StepWork
from scalegpt.planner.time.work import LOSS, OPTIMIZER, RECOMPUTE, Load

FOUNDRY_CARDS = {"a100_40gb": "A100 40GB", "a100_80gb": "A100 80GB", "h100_80gb": "H100 SXM"}
"""The column ``gpu`` of llm-foundry's table → the card."""

FUSED_LOSS_BYTES = 12
"""Bytes moved per logit if softmax, loss and gradient are fused and in place, in half precision: six accesses of 2 bytes. A
logit is written by the head, read once, read and overwritten by its gradient, and the gradient is read by two matmuls."""

FUSED_LOSS_MEMORY = 4
"""Bytes per logit that are live at the same time if the loss is fused: the logits and their gradient, in half precision."""

SCORES_MOVED = 13, 19
"""Bytes moved per attention score in half precision, forward and backward, if one kernel scales, masks and takes the softmax.
Forward: the matmul writes it (2), softmax (4) and dropout (5: with a mask of one byte) read and write it, the next matmul
reads it (2). Backward: two matmuls read or write its gradient (4), dropout (5), softmax (6), two matmuls read it (4)."""

SCORES_KEPT = 5
"""Bytes per attention score that the backward pass needs: the softmax, its result after dropout, and the mask."""


@dataclass(frozen=True)
class PublishedRun:
    """A row of the tables.

    Attributes:
        trainer: the trainer of the run.
        model: the model's name in the table.
        run: the model and its settings, in the form of our trainer.
        machine: the machine of the run.
        batch: how its step was divided.
        recomputed: the share of full recompute, if our settings have no such kind of recompute.
        tokens_per_second: measured tokens per second of each card.
        peak_gib: measured peak of the memory, GiB; None: not given.
        peak_kind: how ``peak_gib`` was measured.
    """

    trainer: Trainer
    model: str
    run: RunConfig
    machine: Machine
    batch: BatchPlan
    recomputed: float
    tokens_per_second: float
    peak_gib: float | None = None
    peak_kind: str = ""

    @cached_property
    def step(self) -> StepWork:
        """The work of a step in the trainer that was measured."""
        run, trainer, ranks = self.run, self.trainer, self.batch.ranks
        mesh = run.parallel.mesh(ranks)
        kernel = "flash" if trainer.scores else Estimator(self.machine).kernel(run)
        step = StepWork.of(run, ranks=ranks, grad_accum=self.batch.grad_accum, kernel=kernel, compiled=trainer.compiled)
        forward, backward, update = (dict(loads) for loads in step.work)
        if trainer.loss == FUSED:
            forward[LOSS] = fused_loss(run)
        if trainer.scores:
            forward["scores"], backward["scores"] = attention_with_scores(run)
            for loads in (forward, backward):
                loads.update({part: load._replace(attention=0.0) for part, load in loads.items()})
        if trainer.block_kernels is not None and not trainer.compiled:
            first, second = (float(count * run.model.n_layer) for count in trainer.block_kernels)
            forward[ELEMENTWISE] = forward[ELEMENTWISE]._replace(kernels=first)
            backward[ELEMENTWISE] = backward[ELEMENTWISE]._replace(kernels=second)
            again = first if run.train.recompute == "full" else 0.0
            backward[RECOMPUTE] = backward[RECOMPUTE]._replace(kernels=again)
        backward[RECOMPUTE] = backward[RECOMPUTE].times(self.recomputed)
        update[OPTIMIZER] = _scaled_bytes(update[OPTIMIZER], trainer.state_bytes / 16)
        sends = (
            each._replace(size=each.size * trainer.sent_bytes // 4)
            if each.kind in {"reduce_scatter", "all_reduce"}
            else each
            for each in collectives(run, mesh)
        )
        return step._replace(
            work=step.work._replace(forward=forward, backward=backward, update=update),
            sends=Sends.of(sends, self.batch.grad_accum, mesh),
        )

    @cached_property
    def _totals(self) -> StepTotals:
        return self.step.totals()

    def predicted(self, rates: Rates) -> float:
        """Predicted tokens per second of each card in the trainer that was measured, at these rates."""
        return self.batch.tokens / self.batch.ranks / self._totals.seconds(rates)

    @cached_property
    def plan(self) -> Plan:
        """The plan of this run in our trainer, with the chunked loss."""
        return self._plan(loss="chunked")

    def _plan(self, **changes: Any) -> Plan:
        return make_plan(replace(self.run, train=self.run.train.changed(**changes)), self.machine, self.batch)

    @cached_property
    def peak_bytes(self) -> int:
        """Predicted peak of the allocated bytes, with the states and the loss of the run's own trainer."""
        if self.recomputed == 1:
            return self._peak(self.run.train.recompute)
        kept, again = self._peak("none"), self._peak("full")
        return int(kept + self.recomputed * (again - kept))

    def _peak(self, recompute: str) -> int:
        """The peak with this recompute: that of our plan, with the memory of the trainer's own loss, scores and states.

        Our chunked loss is planned with a chunk of few tokens, which takes almost no memory. A fused loss is then added
        to the phases of the loss.
        """
        model, trainer, fused = self.run.model, self.trainer, self.trainer.loss == FUSED
        plan = self._plan(recompute=recompute, **({"loss": "chunked", "loss_chunk": 64} if fused else {"loss": "full"}))
        tokens = self.batch.micro_batch * model.block_size
        loss = FUSED_LOSS_MEMORY * tokens * model.vocab_size if fused else 0
        peak = max(size + (loss if "loss" in phase else 0) for phase, size in plan.prediction.phases.items())
        layers = model.n_layer if recompute == "none" else 1
        scores = SCORES_KEPT * layers * model.n_head * tokens * model.block_size if trainer.scores else 0
        shards = self.run.parallel.mesh(self.batch.ranks).shards
        return peak + scores - (16 - trainer.state_bytes) * count_parameters(model).total // shards

    @property
    def total_bytes(self) -> int:
        """Predicted bytes that the run takes on each card, with the states and the loss of its own trainer."""
        return self.plan.overheads.total_bytes(self.peak_bytes, self.plan.host_bytes)

    @property
    def fits(self) -> bool:
        """Whether :attr:`total_bytes` fits the card."""
        assert self.machine.usable_bytes is not None
        return self.total_bytes <= self.machine.usable_bytes


def fused_loss(run: RunConfig) -> Load:
    """The load of a fused, in-place head and cross entropy for a micro batch, forward and backward."""
    model = run.model
    tokens = float(run.train.micro_batch * model.block_size)
    logits, head = tokens * model.vocab_size, float(model.vocab_size * model.n_embd)
    outputs = logits + tokens * model.n_embd + head
    return Load(flops=6.0 * logits * model.n_embd, bytes=FUSED_LOSS_BYTES * logits + 4.0 * head, outputs=outputs)


def attention_with_scores(run: RunConfig) -> tuple[Load, Load]:
    """The loads, forward and backward, that attention with scores in memory adds to the traffic of a fused kernel.

    The forward pass has two matmuls, [T, D] · [D, T] and [T, T] · [T, D]. The backward pass has two of each. Masked
    scores are computed too. Full recompute runs the forward pass again.
    """
    model = run.model
    scores = float(run.train.micro_batch * model.n_head * model.block_size**2 * model.n_layer)
    products = scores * model.head_width / model.block_size
    loads = [
        Load(flops=times * 4.0 * scores * model.head_width, bytes=moved * scores, outputs=written)
        for times, moved, written in zip((1, 2), SCORES_MOVED, (scores + products, scores + 3 * products), strict=True)
    ]
    again = loads[0] if run.train.recompute == "full" else Load()
    return loads[0], Load(*map(sum, zip(loads[1], again, strict=True)))


def _scaled_bytes(load: Load, factor: float) -> Load:
    return load._replace(bytes=load.bytes * factor)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_published(path: Path) -> list[PublishedRun]:
    """The runs of llm-foundry's table (a CSV file), without fp8 matmuls, which the planner cannot plan."""
    return [_of_foundry(row) for row in _rows(path) if "fp8" not in row["precision"]]


def read_others(path: Path) -> tuple[list[PublishedRun], dict[str, list[str]]]:
    """The runs of the table of other trainers (a CSV file), and a map from each reason to the rows that it leaves out."""
    runs, left = list[PublishedRun](), dict[str, list[str]]()
    for row in _rows(path):
        reason = next((rule.reason for rule in UNFIT if rule.holds(row)), None)
        if reason is None:
            runs.append(_of_other(row))
        else:
            left.setdefault(reason, []).append(f"{row['source']}, {row['model']}")
    return runs, left


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _of_foundry(row: Row) -> PublishedRun:
    """A row of llm-foundry's table."""
    pure = row["mp_mode"] == "PURE"
    shape = ("n_layer", "n_embd", "n_head", "vocab_size", "block_size", "micro_batch")
    flags = {
        **LLM_FOUNDRY.settings, **{key: int(row[key]) for key in shape}, "precision": "bf16", "compile": "off",
        "recompute": "full" if row["activation_checkpointing"] == "True" else "none",
        "zero_stage": 3 if row["sharding"] == "FULL_SHARD" else 2,
    }  # fmt: skip
    trainer = replace(LLM_FOUNDRY, state_bytes=8, sent_bytes=2) if pure else LLM_FOUNDRY
    ranks, speed = int(row["gpus"]), float(row["tokens_per_s_per_gpu"])
    return _run(
        trainer, row["model"], flags, find_card(FOUNDRY_CARDS[row["gpu"]]), ranks, int(row["grad_accum"]), speed
    )


def _of_other(row: Row) -> PublishedRun:
    """A row of the table of other trainers."""
    trainer, ranks, micro_batch = trainer_of(row["source"]), int(row["gpus"]), int(row["micro_batch"])
    notes, recompute = row["notes"], row["recompute"]
    compiled = ("compile" in notes and "no compile" not in notes) or (trainer.compiled and "eager" not in notes)
    columns = {
        "n_layer": "n_layer", "n_embd": "hidden", "n_head": "heads", "n_kv_head": "kv_heads", "n_inner": "ffn",
        "vocab_size": "vocab", "block_size": "seq", "micro_batch": "micro_batch",
    }  # fmt: skip
    flags = {
        "recompute": next((kind for kind in ("none", "selective") if recompute.startswith(kind + " ")), "full")
        if recompute != "none" else "none",
        "precision": "fp16" if row["precision"].startswith("fp16") else "bf16",
        "compile": "on" if compiled else "off",
        **{key: int(row[column]) for key, column in columns.items()},
        **trainer.settings,
        **next((settings for name, settings in trainer.exceptions.items() if name in row["source"]), {}),
    }  # fmt: skip
    if ranks == 1:
        flags |= {"backend": "plain", "zero_stage": 0}
    if row["parallelism"].startswith("ZeRO-1"):
        flags |= {"backend": "deepspeed", "zero_stage": 1}
    return _run(
        replace(trainer, compiled=compiled), row["model"], flags, CARDS[row["gpu_type"]], ranks,
        int(row["global_batch"]) // (ranks * micro_batch), float(row["tokens_per_s_per_gpu"]),
        recomputed=0.5 if recompute.startswith("selective-") else 1.0,
        peak_gib=float(row["peak_memory_GiB"]) if row["peak_memory_GiB"] else None, peak_kind=row["memory_kind"],
    )  # fmt: skip


def _run(
    trainer: Trainer,
    model: str,
    flags: dict[str, Any],
    card: Card,
    ranks: int,
    grad_accum: int,
    tokens_per_second: float,
    *,
    recomputed: float = 1.0,
    peak_gib: float | None = None,
    peak_kind: str = "",
) -> PublishedRun:
    run = resolve(name=model, flags={"loss": "full", **flags})
    nodes, gpus = -(-ranks // trainer.gpus), min(ranks, trainer.gpus)
    machine = replace(
        Machine.with_card(card, gpus=gpus, nodes=nodes),
        network_gbps=trainer.network_gbps or NETWORK_GBPS[card.capability],
        capability=card.capability,
    )
    batch = BatchPlan(run.train.micro_batch, grad_accum, ranks, run.model.block_size)
    return PublishedRun(
        trainer, model, run, machine, batch, recomputed, tokens_per_second, peak_gib=peak_gib, peak_kind=peak_kind
    )
