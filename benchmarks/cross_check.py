"""Compares predicted tokens per second with figures that other trainers publish for GPT-2's shapes. None was used in the fit.

``python benchmarks/cross_check.py`` prints the table. The prediction is for our trainer with the same shape, card, micro
batch and accumulation, without sharding (``--backend fsdp --zero_stage 0``), and with full logits. A second prediction
assumes a loss that is fused and in place, as in llm.c, and as torch's inductor makes it if the whole model is compiled. It
shows how much of the difference is due to the loss.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published import fused_time
from benchmarks.tables.markdown import table
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import resolve
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Plan, make_plan

GPUS = 8
"""The number of cards in each run."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A published figure of another trainer, on eight cards. The block size is 1,024 and the vocabulary 50,304.

    Attributes:
        trainer: the trainer's name.
        card: the kind of card.
        layers: number of layers.
        width: width of the model.
        heads: number of attention heads.
        biases: whether the model has biases.
        micro_batch: sequences of a micro batch on each card.
        grad_accum: micro batches of each step.
        tokens_per_second: published tokens per second of each card.
        source: where it is published.
    """

    trainer: str
    card: str
    layers: int
    width: int
    heads: int
    biases: bool = True
    micro_batch: int
    grad_accum: int
    tokens_per_second: float
    source: str

    def plan(self) -> Plan:
        """The plan of this run in our trainer."""
        run = resolve(
            name=self.trainer,
            flags={
                "n_layer": self.layers, "n_embd": self.width, "n_head": self.heads, "block_size": 1024,
                "vocab_size": 50304, "bias": self.biases, "precision": "bf16", "loss": "full",
                "micro_batch": self.micro_batch, "backend": "fsdp", "zero_stage": 0,
            },
        )  # fmt: skip
        machine = Machine.of(MachineConfig(gpu=self.card, gpus=GPUS))
        return make_plan(run, machine, BatchPlan(self.micro_batch, self.grad_accum, GPUS, 1024))

    def predicted(self, *, fused: bool = False) -> float:
        """Predicted tokens per second of each card in our trainer, with the full loss or with a fused one."""
        plan = self.plan()
        fused_step = fused_time(plan.run, plan.machine, plan.batch, compiled=True)
        return plan.batch.tokens / GPUS / (fused_step if fused else plan.time).seconds


_LLM_C = "github.com/karpathy/llm.c, scripts/run_gpt2_{}.sh, {} a step"

REPORTED = (
    Reported(
        trainer="nanoGPT", card="A100 40GB", layers=12, width=768, heads=12, micro_batch=12, grad_accum=5,
        tokens_per_second=600_000 * 491_520 / (4 * 86_400) / 8,
        source="github.com/karpathy/nanoGPT, README: about 4 days for the 600,000 steps of config/train_gpt2.py",
    ),
    Reported(
        trainer="llm.c", card="A100 80GB", layers=12, width=768, heads=12, micro_batch=64, grad_accum=1,
        tokens_per_second=524_288 / 8 / 0.300, source=_LLM_C.format("124M", "~300 ms"),
    ),
    Reported(
        trainer="llm.c", card="A100 80GB", layers=24, width=1024, heads=16, micro_batch=64, grad_accum=1,
        tokens_per_second=524_288 / 8 / 0.820, source=_LLM_C.format("350M", "~820 ms"),
    ),
    Reported(
        trainer="llm.c", card="H100 SXM", layers=48, width=1600, heads=25, micro_batch=16, grad_accum=8,
        tokens_per_second=1_048_576 / 8 / 2.80, source=_LLM_C.format("1558M", "2.80 s"),
    ),
    Reported(
        trainer="modded-nanogpt", card="H100 SXM", layers=12, width=768, heads=6, biases=False, micro_batch=64, grad_accum=1,
        tokens_per_second=524_288 / 8 / 0.14182,
        source="github.com/KellerJordan/modded-nanogpt, records/track_1_short/2024-10-18_PyTorch25: 141.82 ms a step",
    ),
)  # fmt: skip
"""The published runs. modded-nanogpt's model has rotary positions, no biases and no weights in its norms, and its optimizer
is Muon. The prediction for it has learned positions and AdamW instead."""


def cross_check() -> str:
    """The table of published and predicted tokens per second of each card, in Markdown."""
    rows = []
    for each in REPORTED:
        plain, fused = each.predicted(), each.predicted(fused=True)
        shape = f"{each.layers} × {each.width}, 8 × {each.card}, micro batch {each.micro_batch}"
        rows.append((
            each.trainer, shape, f"{each.tokens_per_second:,.0f}", f"{plain:,.0f}", _off(plain, each),
            f"{fused:,.0f}", _off(fused, each), each.source,
        ))  # fmt: skip
    head = ("trainer", "run", "published", "predicted", "off", "with a fused loss", "off", "source")
    return table(head, rows, right={2, 3, 4, 5, 6})


def _off(predicted: float, each: Reported) -> str:
    return f"{predicted / each.tokens_per_second - 1:+.1%}"


if __name__ == "__main__":
    print(cross_check())
