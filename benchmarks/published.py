"""Published runs of GPT-shaped models, from the table of MosaicML llm-foundry's benchmarks.

Source: github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md.

Columns: model, n_layer, n_embd, n_head, vocab_size, block_size, gpu, gpus, micro_batch, grad_accum, precision, mp_mode,
sharding, activation_checkpointing, num_params, tokens_per_s_per_gpu. The models have biases, learned positions and a
tied head.

Their trainer differs from ours: FSDP1, an attention kernel in Triton, a fused cross entropy on logits in bf16, no
compilation; with ``mp_mode`` PURE weights, gradients and moments are in bf16. :meth:`PublishedRun.time` predicts a step of
their trainer, :meth:`PublishedRun.plan` the same run in ours.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from scalegpt.config import RunConfig
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import resolve
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.time.communication import collectives
from scalegpt.planner.time.rates import Rates, Shares
from scalegpt.planner.time.step_time import Sends, StepTime, StepWork
from scalegpt.planner.time.work import LOSS, OPTIMIZER, Load

CARDS = {"a100_40gb": "A100 40GB", "a100_80gb": "A100 80GB", "h100_80gb": "H100 SXM"}

NETWORK_GBPS = {"a100_40gb": 1600, "a100_80gb": 1600, "h100_80gb": 3200}
"""GPU → network of a machine in Gbit/s: published for the A100; for the H100 an adapter of 400 Gbit/s per card is assumed."""

GPUS_IN_A_MACHINE = 8

FUSED_LOSS_BYTES = 12
"""Bytes moved per logit if softmax, loss and gradient are fused and in place, in bf16: six accesses of 2 bytes. A logit is
written by the head, read once, read and overwritten by its gradient, and the gradient is read by two matmuls."""


@dataclass(frozen=True)
class PublishedRun:
    """A row of the table.

    Attributes:
        model: the model's name in the table.
        gpu: the GPU's name in the table.
        run: the model and its settings, as our trainer would run them, with the chunked loss.
        machine: the machine that it ran on.
        batch: how its step was divided.
        pure: whether weights, gradients and moments were in bf16.
        fp8: whether its matmuls were in fp8, which our trainer does not have.
        tokens_per_second: measured tokens per second of each card.
    """

    model: str
    gpu: str
    run: RunConfig
    machine: Machine
    batch: BatchPlan
    pure: bool
    fp8: bool
    tokens_per_second: float

    @classmethod
    def parse(cls, row: dict[str, str]) -> "PublishedRun":
        """The run that a row of the file describes."""
        gpus, gpu = int(row["gpus"]), row["gpu"]
        shape = ("n_layer", "n_embd", "n_head", "vocab_size", "block_size", "micro_batch")
        flags = {
            **{key: int(row[key]) for key in shape}, "bias": True, "precision": "bf16", "loss": "chunked",
            "recompute": "full" if row["activation_checkpointing"] == "True" else "none", "compile": "off",
            "backend": "fsdp", "zero_stage": 3 if row["sharding"] == "FULL_SHARD" else 2,
        }  # fmt: skip
        run = resolve(name=row["model"], flags=flags)
        nodes, per_node = -(-gpus // GPUS_IN_A_MACHINE), min(gpus, GPUS_IN_A_MACHINE)
        machine = MachineConfig(gpu=CARDS[gpu], gpus=per_node, nodes=nodes, network_gbps=NETWORK_GBPS[gpu])
        return cls(
            model=row["model"],
            gpu=gpu,
            run=run,
            machine=Machine.of(machine),
            batch=BatchPlan(run.train.micro_batch, int(row["grad_accum"]), gpus, run.model.block_size),
            pure=row["mp_mode"] == "PURE",
            fp8="fp8" in row["precision"],
            tokens_per_second=float(row["tokens_per_s_per_gpu"]),
        )

    def plan(self) -> Plan:
        """The plan of this run in our trainer."""
        return make_plan(self.run, self.machine, self.batch)

    def time(self, shares: Shares | None = None) -> StepTime:
        """The predicted time of its step in the trainer that was measured."""
        return fused_time(self.run, self.machine, self.batch, compiled=False, pure=self.pure, shares=shares)

    def predicted(self, shares: Shares | None = None) -> float:
        """Predicted tokens per second of each card, in the trainer that was measured."""
        return self.batch.tokens / self.batch.ranks / self.time(shares).seconds


def fused_time(
    run: RunConfig,
    machine: Machine,
    batch: BatchPlan,
    *,
    compiled: bool,
    pure: bool = False,
    shares: Shares | None = None,
) -> StepTime:
    """The predicted time of a step in which head and cross entropy are fused and in place, unlike in our trainer.

    Args:
        run: model and settings.
        machine: the machine that it runs on; its card must be in the catalogue.
        batch: how its step is divided.
        compiled: whether the blocks are compiled.
        pure: whether weights, gradients and moments are in bf16, and gradients are sent in bf16.
        shares: the shares of the card's figures; None: those of :data:`scalegpt.planner.time.rates.SHARES`.
    """
    assert machine.card is not None
    step = StepWork.of(run, ranks=batch.ranks, grad_accum=batch.grad_accum, kernel="flash", compiled=compiled)
    step.work.forward[LOSS] = fused_loss(run, batch.micro_batch)
    if pure:
        step.work.update[OPTIMIZER] = step.work.update[OPTIMIZER].times(0.5)
        sends = collectives(run, run.parallel.mesh(batch.ranks))
        halved = (each._replace(size=each.size // 2) if each.kind == "reduce_scatter" else each for each in sends)
        step = step._replace(sends=Sends.of(halved, batch.grad_accum))
    return step.time(Rates.of(machine.card, machine, "bf16", shares))


def fused_loss(run: RunConfig, micro_batch: int) -> Load:
    """The load of head and cross entropy for a micro batch, forward and backward, if they are fused and in place."""
    model = run.model
    logits = float(micro_batch) * model.block_size * model.vocab_size
    moved = FUSED_LOSS_BYTES * logits + 4.0 * model.vocab_size * model.n_embd
    return Load(flops=6.0 * logits * model.n_embd, bytes=moved)


def read_published(path: Path) -> list[PublishedRun]:
    """The runs in the table of published runs, a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [PublishedRun.parse(row) for row in csv.DictReader(file)]
