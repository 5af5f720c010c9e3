"""Each closed form of docs/MEMORY.md compared with the real step.

``python tests/oracle/formulas.py`` prints the tables of the section "The formulas, one by one", and exits with 1 if a
formula errs by more than is claimed. The rows of ``plain`` and FSDP2 are held to a trace of our own step on
tensors without data, those of DeepSpeed to real tensors in real steps of two ranks on the CPU (``test_deepspeed_memory.py``).
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oracle.test_deepspeed_memory import MODEL, RANKS
from plans import block_parameters
from ranks import run_ranks
from scalegpt.architecture.decoder import EMBEDDING, MATRIX, VECTOR, parameter_shapes
from scalegpt.architecture.parameters import Shape
from scalegpt.config.presets import resolve
from scalegpt.config.run import RunConfig
from scalegpt.config.train import LOSS_ROWS
from scalegpt.planner.memory.states import parameters_by_kind, rank_states
from scalegpt.tracing.trace import Trace, trace_step

MIB = 2**20

BASE = {
    "n_layer": "3", "n_embd": "256", "n_head": "4", "block_size": "256", "vocab_size": "5000", "micro_batch": "4",
    "precision": "bf16", "backend": "plain", "loss_chunk": "512",
}  # fmt: skip
"""What every row of the trace starts from; 3 layers, so that a block is the difference to 2. DeepSpeed's start from the
smaller ``MODEL`` of its own oracle."""

TRACED_WITHIN, TRACKED_WITHIN = 0.005, 0.02
"""How far a formula may err against the trace, and against DeepSpeed's tensors."""


@dataclass(frozen=True)
class Setting:
    """A configuration as its flags say it, without the dashes, with ranks and micro batches per step."""

    flags: str = ""
    ranks: int = 1
    grad_accum: int = 1

    def run(self, **more: Any) -> RunConfig:
        return resolve(flags={**self.complete, **more})

    @property
    def is_traced(self) -> bool:
        """Whether the trace can run it; else DeepSpeed does."""
        return "deepspeed" not in self.flags

    @property
    def complete(self) -> dict[str, Any]:
        """All flags, those that are not this setting's own included."""
        return {**(BASE if self.is_traced else {**MODEL, "precision": "bf16"}), **self.given}

    @property
    def given(self) -> dict[str, str]:
        """Flag → value."""
        words = self.flags.split()
        return dict(zip(words[::2], words[1::2], strict=True))

    def __str__(self) -> str:
        parts = [f"`--{key} {value}`" for key, value in self.given.items()]
        parts += [f"W = {self.ranks}"] if self.ranks > 1 else []
        parts += [f"accumulation {self.grad_accum}"] if self.grad_accum > 1 else []
        return ", ".join(parts) or "as above"


class Symbols:
    """The letters of the formulas, of one configuration."""

    def __init__(self, setting: Setting) -> None:
        run = setting.run()
        model, train = run.model, run.train
        self.run, self.W = run, setting.ranks
        self.B, self.T, self.H, self.F, self.a, self.V = (
            train.micro_batch, model.block_size, model.n_embd, model.inner_width, model.n_head, model.vocab_size,
        )  # fmt: skip
        self.n = self.B * self.T
        self.k = min(train.loss_chunk, self.n)
        self.c = 4 if train.precision == "fp32" else 2
        self.r = 4 if train.residual_dtype == "fp32" else self.c
        kinds = parameters_by_kind(model)
        self.P, self.P2 = sum(kinds.values()), kinds[MATRIX] + kinds[EMBEDDING]
        self.P1 = kinds[VECTOR]
        self.P_block = block_parameters(model)
        self.P_root = self.P - model.n_layer * self.P_block

    def shards(self) -> int:
        """Elements of all tensors' shards, each of ⌈rows / W⌉ rows."""
        shapes: Iterable[Shape] = parameter_shapes(self.run.model).values()
        return sum(-(-shape[0] // self.W) * prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class Formula:
    """A closed form, an example of it, and where what it says shows.

    Attributes:
        what: is computed.
        form: in letters.
        source: the code that it was read from.
        setting: of the example.
        says: the form in numbers, bytes.
        holds: what was measured, bytes.
    """

    what: str
    form: str
    source: str
    setting: Setting
    says: Callable[[Symbols], float]
    holds: Callable[[Setting], int]

    @property
    def bound(self) -> float:
        """The error that is claimed at most."""
        return TRACED_WITHIN if self.setting.is_traced else TRACKED_WITHIN

    def error(self) -> float:
        """The form's error as a share of what was measured."""
        return round(self.says(Symbols(self.setting)) / self.holds(self.setting) - 1, 4) + 0.0  # no negative zero

    def said_cells(self) -> list[str]:
        """The columns that need no measurement."""
        return [self.what, self.form, self.source, str(self.setting), in_mib(self.says(Symbols(self.setting)))]

    def row(self) -> list[str]:
        """The row of the table."""
        return [*self.said_cells(), in_mib(self.holds(self.setting)), f"{self.error():+.2%}"]


# --- what was measured -----------------------------------------------------------------------------------------------


@cache
def traced(setting: Setting, n_layer: int = 3) -> Trace:
    return trace_step(setting.run(n_layer=n_layer), ranks=setting.ranks, grad_accum=setting.grad_accum)


def between_steps(kind: str) -> Callable[[Setting], int]:
    """What lives of a kind between two steps."""
    return lambda setting: traced(setting).steady.by_kind[kind]


def at(phase: str, *kinds: str) -> Callable[[Setting], int]:
    """What lives of these kinds at the fullest moment of a phase."""
    return lambda setting: sum(traced(setting).snapshots[phase].by_kind[kind] for kind in kinds)


def a_block(kind: str) -> Callable[[Setting], int]:
    """What one block adds when the loss is reached: with three layers more than with two."""

    def holds(setting: Setting) -> int:
        two, three = (traced(setting, layers).snapshots["loss"].by_kind[kind] for layers in (2, 3))
        return three - two

    return holds


def as_wide_as_the_vocabulary(phase: str, kinds: Sequence[str] = ("loss", "temporaries")) -> Callable[[Setting], int]:
    """Tensors [tokens, V] at the fullest moment of a phase: logits, and what is made of them."""

    def holds(setting: Setting) -> int:
        width = setting.run().model.vocab_size
        pieces = traced(setting).snapshots[phase].groups
        return sum(piece.size for piece in pieces if piece.shape[-1:] == (width,) and piece.kind in kinds)

    return holds


@cache
def deepspeed_ranks() -> dict[Setting, list[dict[str, Any]]]:
    """Real steps of every DeepSpeed row's configuration: each rank's figures."""
    settings = {formula.setting for formula in FORMULAS if not formula.setting.is_traced}
    task = {setting.flags: {"flags": setting.complete, "grad_accum": setting.grad_accum} for setting in settings}
    assert {setting.ranks for setting in settings} == {RANKS}
    with tempfile.TemporaryDirectory() as folder:
        worker = Path(__file__).with_name("deepspeed_worker.py")
        figures = run_ranks(worker, RANKS, task, Path(folder), timeout=1200)
    return {setting: figures[setting.flags] for setting in settings}


def tracked(kind: str) -> Callable[[Setting], int]:
    """What the fullest rank of DeepSpeed holds of a kind between two steps."""

    def holds(setting: Setting) -> int:
        ranks = deepspeed_ranks()[setting]
        return max(sum(piece[-1] for piece in rank["steady"]["pieces"] if piece[0] == kind) for rank in ranks)

    return holds


def tracked_figure(name: str) -> Callable[[Setting], int]:
    """The reduced ``gradients``, or the ``buckets``, of the fullest rank of DeepSpeed."""
    return lambda setting: max(int(rank[name]) for rank in deepspeed_ranks()[setting])


# --- the formulas ----------------------------------------------------------------------------------------------------


def of_states(state: str) -> Callable[[Symbols], float]:
    """A closed form of :func:`~scalegpt.planner.memory.states.rank_states`."""
    return lambda s: rank_states(s.run, s.W)[state]


def kept(s: Symbols) -> int:
    return (2 * s.r + 14 * s.c) * s.n * s.H + 16 * s.n + 4 * s.a * s.n


PLAIN = Setting()
GATED = "activation swiglu norm rmsnorm"
FULL_LOSS = Setting("loss full")
FSDP2, FSDP3 = (Setting(f"backend fsdp zero_stage {stage}", 8) for stage in (2, 3))
FSDP2_TWICE = Setting(FSDP2.flags, 8, grad_accum=2)
ZERO1, ZERO2, ZERO3 = (Setting(f"backend deepspeed zero_stage {stage}", 2) for stage in (1, 2, 3))

BLOCK, LOSS, STEP = "`model/gpt.py`", "`model/loss.py`", "`planner/memory/states.py`"
RECOMPUTE, FULLY_SHARD = "`model/recompute.py`", "torch `fsdp/_fully_shard`"
MATH = "torch `_scaled_dot_product_attention_math`"
ZERO_CODE, ZERO3_CODE = "DeepSpeed `stage_1_and_2.py`", "DeepSpeed `stage3.py`"

FORMULAS = (
    Formula("weights", "4P", STEP, PLAIN, of_states("weights"), between_steps("weights")),
    Formula("moments", "8P", STEP, PLAIN, of_states("optimizer"), between_steps("optimizer")),
    Formula("gradients", "4P", STEP, PLAIN, of_states("gradients"), at("optimizer_step", "gradients")),
    Formula("update, foreach", "4·(matrices)", "torch `_multi_tensor_adam`", Setting("fused false"),
        lambda s: 4 * s.P2, at("optimizer_step", "temporaries")),
    *(
        Formula("block, none", "(2r + 14c)·n·H + 16n + 4·a·n", BLOCK, Setting(flags), kept, a_block("activations"))
        for flags in ("", "residual_dtype fp32", "precision fp32")
    ),
    Formula("block, none, dropout", "(2r + 14c + 2)·n·H + 16n + 4·a·n", "torch `native_dropout`", Setting("dropout 0.1"),
        lambda s: kept(s) + 2 * s.n * s.H, a_block("activations")),
    Formula("block, none, math", "(2r + 11c + 12)·n·H + 16n + 4·B·a·T²", MATH, Setting("attention math"),
        lambda s: (2 * s.r + 11 * s.c + 12) * s.n * s.H + 16 * s.n + 4 * s.B * s.a * s.T**2, a_block("activations")),
    Formula("block, none, math, dropout", "(2r + 11c + 14)·n·H + 16n + 9·B·a·T²", MATH, Setting("attention math dropout 0.1"),
        lambda s: (2 * s.r + 11 * s.c + 14) * s.n * s.H + 16 * s.n + 9 * s.B * s.a * s.T**2, a_block("activations")),
    Formula("block, selective", "(r + 9c)·n·H + 4·a·n", RECOMPUTE, Setting("recompute selective"),
        lambda s: (s.r + 9 * s.c) * s.n * s.H + 4 * s.a * s.n, a_block("activations")),
    Formula("block, selective, dropout", "(r + 9c)·n·H", RECOMPUTE, Setting("recompute selective dropout 0.1"),
        lambda s: (s.r + 9 * s.c) * s.n * s.H, a_block("activations")),
    Formula("block, selective, math", "(r + 8c)·n·H", RECOMPUTE, Setting("recompute selective attention math"),
        lambda s: (s.r + 8 * s.c) * s.n * s.H, a_block("activations")),
    Formula("block, none, gated", "(2r + 6c)·n·H + 3c·n·F + 8n + 4·a·n", "`model/feed_forward.py`", Setting(GATED),
        lambda s: (2 * s.r + 6 * s.c) * s.n * s.H + 3 * s.c * s.n * s.F + 8 * s.n + 4 * s.a * s.n, a_block("activations")),
    Formula("block, selective, gated", "(r + 5c)·n·H + 2c·n·F + 4·a·n", RECOMPUTE, Setting(f"{GATED} recompute selective"),
        lambda s: (s.r + 5 * s.c) * s.n * s.H + 2 * s.c * s.n * s.F + 4 * s.a * s.n, a_block("activations")),
    Formula("block, full", "r·n·H", RECOMPUTE, Setting("recompute full"),
        lambda s: s.r * s.n * s.H, a_block("activations")),
    Formula("block computed again, full", "(r + 14c)·n·H + 16n + 4·a·n", RECOMPUTE, Setting("recompute full"),
        lambda s: kept(s) - s.r * s.n * s.H, at("block_backward", "recomputed")),
    Formula("block's weight copies", "c·(12H² + 2H)", BLOCK, PLAIN,
        lambda s: s.c * s.P_block, a_block("cast weights")),
    Formula("full logits, forward", "(c + 8)·n·V", LOSS, FULL_LOSS,
        lambda s: (s.c + 8) * s.n * s.V, as_wide_as_the_vocabulary("loss")),
    Formula("full logits, backward", "12·n·V", LOSS, FULL_LOSS,
        lambda s: 12 * s.n * s.V, as_wide_as_the_vocabulary("loss_backward")),
    Formula("a chunk's logits", "c·k·V + 4·min(k, 512)·V", LOSS, PLAIN,
        lambda s: s.c * s.k * s.V + 4 * min(s.k, LOSS_ROWS) * s.V, as_wide_as_the_vocabulary("loss")),
    Formula("chunked loss, gradients", "c·n·H + 4·V·H", LOSS, PLAIN,
        lambda s: s.c * s.n * s.H + 4 * s.V * s.H, at("loss", "loss", "gradients")),
    Formula("fsdp 3, weights and moments", "12·(shards of ⌈rows / W⌉ rows)", FULLY_SHARD,
        Setting(f"{FSDP3.flags} vocab_size 5003", 8),
        lambda s: 12 * s.shards(), lambda setting: traced(setting).steady_bytes),
    Formula("fsdp 3, gathered, forward", "c·(root + block)", FULLY_SHARD, FSDP3,
        lambda s: s.c * (s.P_root + s.P_block), at("forward", "gathered weights")),
    Formula("fsdp 3, gather buffer", "c·(block)", FULLY_SHARD, FSDP3,
        lambda s: s.c * s.P_block, at("block_backward", "gather buffers")),
    Formula("fsdp 3, reduce buffer", "4·(block)", FULLY_SHARD, FSDP3,
        lambda s: 4 * s.P_block, at("backward_tail", "reduce buffers")),
    Formula("fsdp 2, gathered", "c·P", FULLY_SHARD, FSDP2,
        lambda s: s.c * s.P, at("forward", "gathered weights")),
    Formula("fsdp 2, gradients of inner micro steps", "4P", FULLY_SHARD, FSDP2_TWICE,
        lambda s: 4 * s.P, at("forward", "gradients")),
    Formula("ZeRO-1, weights", "c·P", ZERO_CODE, ZERO1, of_states("weights"), tracked("weights")),
    Formula("ZeRO-1, masters and moments", "12P/W", ZERO_CODE, ZERO1, of_states("optimizer"), tracked("optimizer")),
    Formula("ZeRO-1, gradients", "4P", "DeepSpeed `bf16_optimizer.py`", ZERO1, of_states("gradients"),
            tracked("gradients")),
    Formula("ZeRO-2, gradients", "4P/W", ZERO_CODE, ZERO2, of_states("gradients"), tracked_figure("gradients")),
    Formula("ZeRO-2, bucket; two with `overlap_comm`", "c·(block)", ZERO_CODE, ZERO2,
        lambda s: s.c * s.P_block, tracked_figure("buckets")),
    Formula("ZeRO-3, weights, vectors whole", "c·(P/W + vectors)", ZERO3_CODE, ZERO3,
        lambda s: s.c * (s.P / s.W + s.P1), tracked("weights")),
    Formula("ZeRO-3, masters and moments", "12P/W", ZERO3_CODE, ZERO3, of_states("optimizer"), tracked("optimizer")),
    Formula("ZeRO-3, gradients", "4P/W", ZERO3_CODE, ZERO3, of_states("gradients"), tracked_figure("gradients")),
    Formula("ZeRO-3, bucket", "4·(block)", ZERO3_CODE, ZERO3, lambda s: 4 * s.P_block, tracked_figure("buckets")),
    Formula("ZeRO-3, offload: masters, moments, gradients", "host: (12 + 8)·P/W", ZERO3_CODE,
        Setting(f"{ZERO3.flags} offload optimizer", 2), lambda s: 20 * s.P / s.W, tracked("host")),
)  # fmt: skip


# --- the tables ------------------------------------------------------------------------------------------------------

LENGTHS = (256, 512, 1024, 2048)


def length_row(length: int) -> list[str]:
    """What a block keeps at such a block size, with flash and with math attention."""
    sizes = {}
    for kernel in ("flash", "math"):
        setting = Setting(f"attention {kernel} block_size {length}")
        sizes[kernel] = a_block("activations")(setting)
    return [
        f"{length:,}",
        in_mib(sizes["flash"]),
        in_mib(sizes["math"]),
        f"{sizes['math'] / sizes['flash']:.1f}",
    ]


LOGITS = "logits and what is made of them"
STATES = "weights, moments, gradients"
KEPT = "activations of all blocks"


@cache
def tiny(loss: str) -> dict[str, int]:
    """What the preset ``tiny`` holds in one process when the loss is at its fullest."""
    run = resolve(preset="tiny", flags={"backend": "plain", "precision": "bf16", "loss": loss})
    trace = trace_step(run)
    moment, vocabulary = trace.snapshots[trace.peak_phase], run.model.vocab_size
    logits = sum(
        piece.size
        for piece in moment.groups
        if piece.shape[-1:] == (vocabulary,) and piece.kind in {"loss", "temporaries"}
    )
    kinds = moment.by_kind
    figures = {
        LOGITS: logits,
        STATES: trace.steady_bytes + trace.snapshots["optimizer_step"].by_kind["gradients"],
        KEPT: kinds["activations"],
    }
    return {**figures, "the peak": trace.peak_bytes}


def tiny_rows() -> list[list[str]]:
    full, chunked = tiny("full"), tiny("chunked")
    return [[what, in_mib(full[what]), in_mib(chunked[what])] for what in full]


FORMULA_HEAD = ["what", "formula", "source", "example", "formula gives", "the step holds", "error"]
LENGTH_HEAD = ["T", "flash", "math", "math over flash"]
TINY_HEAD = ["`tiny`", "`--loss full`", "`--loss chunked`"]


def in_mib(size: float) -> str:
    return f"{size / MIB:,.3f} MiB"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A Markdown table whose first columns are set left, the others right."""
    rule = "|" + "|".join("---" if i < left else "--:" for i in range(len(head))) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def main() -> int:
    print(table(FORMULA_HEAD, (formula.row() for formula in FORMULAS), 4))
    print()
    print(table(LENGTH_HEAD, map(length_row, LENGTHS), 0))
    print()
    print(table(TINY_HEAD, tiny_rows(), 1))
    wrong = [formula for formula in FORMULAS if abs(formula.error()) > formula.bound]
    for formula in wrong:
        print(f"{formula.what}: {formula.error():+.2%}, claimed {formula.bound:.1%}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
