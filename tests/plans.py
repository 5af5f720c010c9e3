"""Questions to the planner drawn at random, and the whole space of answers, for tests of the search and of the time."""

import itertools
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from scalegpt.config import ModelConfig, RunConfig
from scalegpt.config.backends import BACKENDS, OFFLOADS
from scalegpt.config.optimizers import OPTIMIZERS
from scalegpt.config.presets import resolve
from scalegpt.config.run import PLANNED, ParallelConfig
from scalegpt.config.train import LOSSES, RECOMPUTE
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import GB, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import BatchPlan
from scalegpt.planner.plan import Estimator, Plan
from scalegpt.planner.search.question import Question, Scheme
from scalegpt.planner.search.ranking import handicap, simplicity, time_class

PRESETS = ("demo", "tiny", "small", "150M_1024", "350M_1024", "500M_1024")
CARDS = ("t4", "rtx3060", "4090", "v100-32gb", "a100-40gb", "h100", "mi300x")


def block_parameters(model: ModelConfig) -> int:
    """Parameters of one block with as many heads of keys as of queries, independent of the planner's count.

    GPT-2's has 12H² and 2H, with biases 13H. A gate adds H·F.
    """
    width, inner = model.n_embd, model.inner_width
    up = 2 * inner if model.activation in ("swiglu", "geglu") else inner
    norms = 4 * width if model.bias is True and model.norm == "layernorm" else 2 * width
    biases = {False: 0, "qkv": 3 * width, True: 5 * width + up}[model.bias]
    return 4 * width**2 + (up + inner) * width + norms + biases


def model_flags(draw: random.Random) -> dict[str, Any]:
    """The shape of a model that is nobody's preset."""
    return {
        "n_layer": draw.choice([1, 2, 3, 8, 40]),
        "n_embd": draw.choice([64, 128, 256, 768, 2048]),
        "n_head": draw.choice([1, 2, 4]),
        "block_size": draw.choice([16, 64, 100, 256, 768, 1024]),
        "vocab_size": draw.choice([256, 5000, 50304]),
        "dropout": draw.choice([0, 0, 0.1]),
        "bias": draw.random() < 0.3,
        "tie_head": draw.random() < 0.7,
        "residual_dtype": draw.choice(["compute", "compute", "fp32"]),
        "fused": draw.random() < 0.8,
        "loss_chunk": draw.choice([512, 512, 64, 2048]),
        "activation": draw.choice(["gelu", "relu2", "swiglu"]),
        "norm": draw.choice(["layernorm", "rmsnorm"]),
        "n_inner": draw.choice([None, None, 1000]),
    }


def draw_run(draw: random.Random, *, precisions: tuple[str, ...] = ("bf16", "bf16", "fp16", "fp32")) -> RunConfig:
    """A preset's run or another, with its precision said."""
    run = resolve(preset=draw.choice(PRESETS)) if draw.random() < 0.3 else resolve(flags=model_flags(draw))
    return replace(run, train=run.train.changed(precision=draw.choice(precisions)))


def draw_optimizer(draw: random.Random, run: RunConfig) -> RunConfig:
    """The run with any optimizer."""
    return replace(run, train=run.train.changed(optimizer=draw.choice([*OPTIMIZERS])))


def draw_layout(draw: random.Random) -> ParallelConfig:
    """Any layout that there is."""
    return draw.choice(LAYOUTS)


def all_layouts() -> Iterator[ParallelConfig]:
    """Every layout that some library runs."""
    for backend, stage, offload in itertools.product(BACKENDS, range(4), OFFLOADS):
        try:
            yield ParallelConfig(backend=backend, zero_stage=stage, offload=offload)
        except InputError:
            continue


LAYOUTS = tuple(all_layouts())


def sized_layouts(machine: Machine) -> Iterator[ParallelConfig]:
    """Every layout whose shards are those of one, two or four of several machines."""
    for layout, count in itertools.product(LAYOUTS, (1, 2, 4)):
        size = count * machine.gpus
        if machine.nodes > 1 and 1 < size < machine.ranks and machine.ranks % size == 0:
            with suppress(InputError):
                yield layout.changed(shard_size=size)


def has_optimizer(run: RunConfig, layout: ParallelConfig) -> bool:
    """Whether the run's optimizer works with a layout: Muon neither offloaded nor over DeepSpeed's flat parts."""
    return run.train.optimizer != "muon" or (
        layout.offload == "none" and (layout.backend != "deepspeed" or layout.stage == 0)
    )


def draw_machine(draw: random.Random, *, gpus: int, nodes: int) -> Machine:
    """So many cards, of the catalogue or unknown ones, with more or less of a network and of host memory."""
    machine = Machine.with_card(find_card(draw.choice(CARDS)), gpus=gpus, nodes=nodes)
    if nodes > 1:
        machine = replace(machine, network_gbps=draw.choice([None, 1, 10, 3200]))
    if draw.random() < 0.3:
        machine = replace(machine, host_bytes=int(draw.uniform(0.1, 30) * GB))
    if draw.random() < 0.2:
        machine = replace(machine, card=None, link=None)
    return machine


@dataclass
class Candidate:
    """A configuration of the space: with how many cards fewer (0: all there are), and the seconds of a step."""

    place: int
    estimator: Estimator
    run: RunConfig
    batch: BatchPlan
    seconds: float
    known: Plan | None = None

    def plan(self) -> Plan:
        """The plan with its memory, found out once."""
        if self.known is None:
            self.known = self.estimator.plan(self.run, self.batch)
        return self.known


def space(run: RunConfig, machine: Machine) -> list[Candidate]:
    """All that could be chosen: cards × layouts × recompute × loss × micro batches.

    Args:
        run: a run with its tokens per step.
        machine: the machine; of its cards fewer may be used, the most first.
    """
    sizes = itertools.product(range(1, machine.nodes + 1), range(1, machine.gpus + 1))
    ordered = sorted(sizes, key=lambda size: (-size[0] * size[1], size[0]))
    return [each for place, size in enumerate(ordered) for each in _with_cards(run, machine, place, *size)]


def _with_cards(run: RunConfig, machine: Machine, place: int, nodes: int, gpus: int) -> Iterator[Candidate]:
    there = machine if place == 0 else machine.with_cards(gpus=gpus, nodes=nodes)
    if place and there.ranks == machine.ranks:
        return
    assert run.train.tokens_per_step is not None
    sequences, rest = divmod(run.train.tokens_per_step, there.ranks * run.model.block_size)
    if rest or not sequences:
        return
    estimator = Estimator(there)
    for layout, recompute, loss in itertools.product((*LAYOUTS, *sized_layouts(there)), RECOMPUTE, LOSSES):
        if (layout.backend == "plain" and there.ranks > 1) or not has_optimizer(run, layout):
            continue
        for micro in (size for size in range(1, sequences + 1) if sequences % size == 0):
            train = run.train.changed(recompute=recompute, loss=loss, micro_batch=micro)
            batch = BatchPlan(micro, sequences // micro, there.ranks, run.model.block_size)
            each = replace(run, train=train, parallel=layout)
            yield Candidate(place, estimator, each, batch, estimator.time(each, batch).seconds)


def is_allowed(each: Candidate, question: Question) -> bool:
    """Whether a candidate keeps what is fixed, and shards over one rank only where that is asked for."""
    own, run, open_ = question.run, each.run, question.open
    if each.place and not question.fewer:
        return False
    if not all(_value(run, name) == _value(own, name) for name in PLANNED - open_):
        return False
    if each.batch.ranks > 1 or run.parallel.offload != "none" or "zero_stage" not in open_:
        return True
    return run.parallel.stage == 0 and (run.parallel.backend == "plain" or "backend" not in open_)


def _value(run: RunConfig, name: str) -> object:
    if name == "zero_stage":
        return run.parallel.stage
    return getattr(run.parallel if name in {"backend", "offload", "shard_size"} else run.train, name)


def brute_force(question: Question, candidates: list[Candidate]) -> Plan | None:
    """The best of the allowed candidates that fits: by class of time with its margins, more cards, simplicity, seconds."""

    def rank(each: Candidate) -> tuple[Any, ...]:
        scheme, own = Scheme.of(each.run), Scheme.of(question.run)
        simple, margin = simplicity(scheme, own), handicap(scheme, own, each.batch.ranks)
        seconds = each.seconds * margin
        return time_class(seconds), each.place, simple, seconds

    for each in sorted((each for each in candidates if is_allowed(each, question)), key=rank):
        plan = each.plan()
        if plan.total_bytes <= question.limit and plan.fits_host:
            return plan
    return None
