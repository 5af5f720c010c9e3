"""Tables of the presets: their settings, and the memory that they take on one GPU."""

from benchmarks.tables.markdown import code, gib, table
from benchmarks.tables.plans import block_size, by_size, fits_with_margin, parameters, preset_plan
from scalegpt.architecture.counting import count_parameters
from scalegpt.config.presets import public_names, resolve
from scalegpt.config.train import RECOMPUTE
from scalegpt.planner.memory.states import training_bytes
from scalegpt.planner.search.question import MARGIN
from scalegpt.planner.time.work import flops_per_token
from scalegpt.units import format_bytes

COMMON = (
    "RTX 3070", "RTX 3080", "RTX 3060", "RTX 4080", "RTX 4090", "RTX 5090", "A100 40GB", "RTX A6000", "A100 80GB", "H200",
)  # fmt: skip
"""Common cards, one for each memory size, the smallest memory first; all have bf16."""

PAIRS = (("150M", "150M_1024"), ("200M", "200M_1024"), ("250M", "250M_1024"))
"""Pairs of presets with the same width and depth and with block sizes of 256 and 1024."""


def presets() -> str:
    """The table of each preset's settings and number of parameters."""
    head = "preset | layers | width | heads | block | batch | parameters | tokens per step | backend | learning rate"
    return table(head, map(_row, by_size()), right={1, 2, 3, 4, 5, 6, 7, 9})


def _row(name: str) -> tuple[str, ...]:
    run = resolve(preset=name)
    model, train = run.model, run.train
    micro = f"{train.micro_batch * model.block_size:,} a GPU"
    return (
        code(name), *map(str, (model.n_layer, model.n_embd, model.n_head, model.block_size, train.micro_batch)),
        f"{parameters(name):,}", micro if train.tokens_per_step is None else f"{train.tokens_per_step:,}",
        run.parallel.label(), f"{train.learning_rate:g}",
    )  # fmt: skip


def public_models() -> str:
    """The table of the public models' shapes and settings, the smallest first."""
    rows = []
    for name in sorted(public_names(), key=parameters):
        run = resolve(preset=name)
        model, train = run.model, run.train
        sizes = (model.n_layer, model.n_embd, model.n_head, model.kv_heads, model.head_width, model.inner_width)
        head = "tied" if model.tie_head else "untied"
        rows.append(
            (
                code(name), *map(str, sizes), str(model.block_size), str(model.vocab_size), head, f"{parameters(name):,}",
                f"{train.tokens_per_step:,}", f"{train.learning_rate:g}",
            )
        )  # fmt: skip
    head = (
        "preset | layers | width | heads | kv heads | head size | inner | block | vocabulary | head | parameters | "
        "tokens per step | learning rate"
    )
    return table(head, rows, right={1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12})


def states() -> str:
    """The table of the sizes of each preset's weights and model states (weights, gradients, optimizer state)."""
    rows = []
    for name in by_size():
        run = resolve(preset=name)
        count = parameters(name)
        whole = sum(training_bytes(run.model, run.train).values())
        rows.append((code(name), format_bytes(4 * count), format_bytes(2 * count), format_bytes(whole)))
    return table(("preset", "weights, fp32", "weights, bf16", "model states of training"), rows, right={1, 2, 3})


def memory_on_one_gpu() -> str:
    """The table of each preset's memory with its own micro batch, by recompute, and the smallest common card that fits it."""
    head = ("preset", "batch", *(f"recompute {kind}" for kind in RECOMPUTE))
    rows = [
        (code(name), str(resolve(preset=name).train.micro_batch), *(_smallest(name, kind) for kind in RECOMPUTE))
        for name in by_size()
    ]
    return table(head, rows, right={1})


def _smallest(preset: str, recompute: str) -> str:
    """A preset's total memory on the smallest common card that fits it with the margin, and the card's name."""
    for card in COMMON:
        plan = preset_plan(preset, card, backend="plain", recompute=recompute)
        if fits_with_margin(plan, MARGIN):
            return f"{gib(plan.total_bytes)}: {card}"
    return f"{gib(plan.total_bytes)}: none of these"


def common_cards() -> str:
    """The names and the memory of the cards that :func:`memory_on_one_gpu` chooses from."""
    from scalegpt.hardware.gpus import find_card

    return ", ".join(f"{name} ({find_card(name).gib:g} GiB)" for name in COMMON)


def attention_share() -> str:
    """The table of the parameters and attention FLOPs that a block size of 1024 adds to those of 256."""
    rows = []
    for short, long in PAIRS:
        more = parameters(long) / parameters(short) - 1
        rows.append(
            (f"`{short}`, `{long}`", f"{more:.2%}", f"{_over_matmuls(short):.1%}", f"{_over_matmuls(long):.1%}")
        )
    head = ("presets", f"more parameters at {block_size(PAIRS[0][1])}", "attention over 6·P at 256", "at 1024")
    return table(head, rows, right={1, 2, 3})


def _over_matmuls(preset: str) -> float:
    """Attention's FLOPs relative to those of all other matmuls: 12·L·H·T ÷ 6·P."""
    model = resolve(preset=preset).model
    matmuls = 6 * count_parameters(model).total
    return flops_per_token(model) / matmuls - 1
