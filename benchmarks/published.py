"""Published runs of GPT-shaped models, as a table of MosaicML llm-foundry's benchmarks has them.

Source: github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md.

Columns: model, n_layer, n_embd, n_head, vocab_size, block_size, gpu, gpus, micro_batch, grad_accum, precision, mp_mode,
sharding, activation_checkpointing, num_params, tokens_per_s_per_gpu. The models have biases, learned positions and a
tied head.

Their trainer is not ours: FSDP1, an attention kernel in Triton, a fused cross entropy on logits in bf16, no compiling;
``mp_mode`` PURE keeps weights, gradients and moments in bf16. :meth:`PublishedRun.time` counts that; what our trainer
would do in their place :meth:`PublishedRun.plan` says.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from scalegpt.config import RunConfig
from scalegpt.config.backends import Mesh
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import resolve
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan
from scalegpt.planner.time.communication import collectives
from scalegpt.planner.time.rates import Rates, Shares
from scalegpt.planner.time.step_time import Sends, StepTime, StepWork, dispatch_seconds
from scalegpt.planner.time.work import LOSS, OPTIMIZER, HostTraffic, Load, Work, count_work

CARDS = {"a100_40gb": "A100 40GB", "a100_80gb": "A100 80GB", "h100_80gb": "H100 SXM"}

NETWORK_GBPS = {"a100_40gb": 1600, "a100_80gb": 1600, "h100_80gb": 3200}
"""Gbit/s of a machine: told for the A100 tables; for the H100's it is assumed, one 400 Gbit/s adapter for each card."""

GPUS_IN_A_MACHINE = 8

FUSED_LOSS_BYTES = 12
"""Bytes a logit where softmax, loss and gradient are fused and in place, in bf16: written, read, read and written, and read
by two matmuls."""


@dataclass(frozen=True)
class PublishedRun:
    """A row of the table.

    Attributes:
        run: its model and settings, as ours would be; the loss is chunked.
        machine: what it ran on.
        batch: how its step was divided.
        pure: whether all states were bf16.
        fp8: whether its matmuls were in fp8, which we have not.
        tokens_per_second: measured, of each card.
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
        """Read a row."""
        gpus, gpu = int(row["gpus"]), row["gpu"]
        shape = {
            key: int(row[key]) for key in ("n_layer", "n_embd", "n_head", "vocab_size", "block_size", "micro_batch")
        }
        run = resolve(
            name=row["model"],
            flags={
                **shape,
                "bias": True,
                "precision": "bf16",
                "loss": "chunked",
                "recompute": "full" if row["activation_checkpointing"] == "True" else "none",
                "backend": "fsdp",
                "zero_stage": 3 if row["sharding"] == "FULL_SHARD" else 2,
                "compile": "off",
            },
        )
        settings = MachineConfig(
            gpu=CARDS[gpu],
            gpus=min(gpus, GPUS_IN_A_MACHINE),
            nodes=-(-gpus // GPUS_IN_A_MACHINE),
            network_gbps=NETWORK_GBPS[gpu],
        )
        batch = BatchPlan(run.train.micro_batch, int(row["grad_accum"]), gpus, run.model.block_size)
        return cls(
            model=row["model"],
            gpu=gpu,
            run=run,
            machine=Machine.of(settings),
            batch=batch,
            pure=row["mp_mode"] == "PURE",
            fp8="fp8" in row["precision"],
            tokens_per_second=float(row["tokens_per_s_per_gpu"]),
        )

    def plan(self) -> Plan:
        """What our trainer would do in its place."""
        return make_plan(self.run, self.machine, self.batch)

    def time(self, shares: Shares | None = None) -> StepTime:
        """The time of its step, its own trainer's differences counted."""
        assert self.machine.card is not None
        sends = collectives(self.run, self._mesh)
        if self.pure:  # gradients travel in bf16
            sends = tuple(
                each._replace(size=each.size // 2) if each.kind == "reduce_scatter" else each for each in sends
            )
        grad_accum = self.batch.grad_accum
        work = StepWork(
            self._work(),
            Sends.of(sends, grad_accum),
            HostTraffic(),
            grad_accum,
            dispatch_seconds(compiled=False),
        )
        return work.time(Rates.of(self.machine.card, self.machine, "bf16", shares))

    def predicted(self, shares: Shares | None = None) -> float:
        """Tokens a second of each card, predicted."""
        return self.batch.tokens / self.batch.ranks / self.time(shares).seconds

    @property
    def _mesh(self) -> Mesh:
        return self.run.parallel.mesh(self.batch.ranks)

    def _work(self) -> Work:
        work = count_work(self.run, self._mesh, kernel="flash", compiled=False)
        work.forward[LOSS] = fused_loss(self.run, self.batch.micro_batch)
        if self.pure:
            work.update[OPTIMIZER] = work.update[OPTIMIZER].times(0.5)
        return work


def fused_loss(run: RunConfig, micro_batch: int) -> Load:
    """Head and cross entropy of a micro batch where they are fused and in place, which our trainer's are not."""
    model = run.model
    logits = float(micro_batch) * model.block_size * model.vocab_size
    return Load(
        flops=6.0 * logits * model.n_embd, bytes=FUSED_LOSS_BYTES * logits + 4.0 * model.vocab_size * model.n_embd
    )


def read_published(path: Path) -> list[PublishedRun]:
    """The rows of the table."""
    with path.open(encoding="utf-8", newline="") as file:
        return [PublishedRun.parse(row) for row in csv.DictReader(file)]
