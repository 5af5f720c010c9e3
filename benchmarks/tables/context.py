"""Tables by block size: the cost of 1024 compared with 256, and plans for block sizes above 1024."""

import itertools

from benchmarks.tables.markdown import code, gib, table
from benchmarks.tables.plans import chosen, parameters, preset_plan
from benchmarks.tables.presets import PAIRS
from scalegpt.architecture.operations import ATTENTION
from scalegpt.config.presets import resolve
from scalegpt.planner.plan import Plan
from scalegpt.planner.search.question import MARGIN

FAST = ("RTX 4090", "A100 80GB", "H100 SXM")
SIZES = {
    "RTX 3060": "12 GB", "RTX 4080": "16 GB", "RTX 4090": "24 GB", "A100 40GB": "40 GB", "A100 80GB": "80 GB",
}  # fmt: skip
LARGE = tuple(SIZES)[2:]
LONG = ("150M_1024", "350M_1024", "500M_1024")


def pairs() -> str:
    """The table of parameters, memory and speed of presets with block sizes of 256 and of 1024."""
    rows = []
    for name in itertools.chain(*PAIRS):
        each = _each_sequence(name)
        block = resolve(preset=name).model.block_size
        plans = [_best(name, card) for card in FAST]
        share = plans[1].time.parts[ATTENTION] / plans[1].seconds
        rows.append((
            code(name), f"{parameters(name):,}", f"{each / 2**20:.0f} MiB", f"{each / block / 1024:.0f} KiB",
            *(f"{plan.tokens_per_second:,.0f}" for plan in plans), f"{share:.1%}",
        ))  # fmt: skip
    speeds = " | ".join(f"tokens/s, {card}" for card in FAST)
    return table(f"preset | parameters | a sequence | a token | {speeds} | attention's time", rows, right=range(1, 8))


def _each_sequence(preset: str) -> float:
    """Bytes that each sequence of the micro batch adds to the peak, in one process without recompute."""
    micro = resolve(preset=preset).train.micro_batch
    step = 8 * micro * resolve(preset=preset).model.block_size
    settings = {"backend": "plain", "recompute": "none", "loss": "chunked", "tokens_per_step": step}
    some, twice = (preset_plan(preset, "A100 80GB", micro_batch=size, **settings) for size in (micro, 2 * micro))
    return (twice.peak_bytes - some.peak_bytes) / micro


def _best(preset: str, card: str) -> Plan:
    plan = chosen(preset, card)
    assert plan is not None
    return plan


def micro_batches() -> str:
    """The table of the largest micro batches that fit, by preset and card."""
    rows = [(code(name), *(_micro_batch(name, card) for card in SIZES)) for pair in PAIRS for name in pair]
    return table(("preset", *map(_sized, SIZES)), rows)


def _sized(card: str) -> str:
    return f"{SIZES[card]} ({card})"


def _micro_batch(preset: str, card: str) -> str:
    """The largest micro batch that fits and divides the step, in words.

    Layout, recompute and loss are fixed, so the fastest plan has the largest micro batch.
    """
    plan = chosen(preset, card, backend="plain", recompute="none", loss="chunked")
    if plan is None:
        return "none"
    micro = plan.batch.micro_batch
    return f"{micro} = {micro * plan.run.model.block_size:,} tokens"


def beyond() -> str:
    """The table of plans for block sizes up to four times the presets' own."""
    rows = [
        (code(name), f"{block:,}", *(_plan_of_block(name, block, card) for card in LARGE))
        for name, block in itertools.product(LONG, (1024, 2048, 4096))
    ]
    return table(("preset", "`--block_size`", *map(_sized, LARGE)), rows, right={1})


def _plan_of_block(preset: str, block: int, card: str) -> str:
    plan = chosen(preset, card, block_size=block)
    if plan is None:
        return f"does not fit with a margin of {MARGIN:.0%}"
    train, offload = plan.run.train, plan.run.parallel.offload
    said = f"micro batch {plan.batch.micro_batch}, {train.recompute}, {train.loss} loss"
    moved = "" if offload == "none" else f", {offload} offloaded"
    return f"{said}{moved}: {gib(plan.total_bytes)}, {plan.tokens_per_second:,.0f} tokens/s"


def math_attention() -> str:
    """The table of peak memory with flash and with math attention, at the same number of tokens per micro batch."""
    rows = []
    tokens = 8192
    for block in (256, 512, 1024, 2048, 4096):
        settings = {"block_size": block, "micro_batch": tokens // block, "tokens_per_step": 8 * tokens}
        flash, math = (
            preset_plan("150M_1024", "A100 80GB", backend="plain", attention=kernel, **settings).peak_bytes
            for kernel in ("flash", "math")
        )
        rows.append((f"{block:,}", f"{tokens // block}", gib(flash), gib(math), f"{math / flash:.1f}"))
    return table(("block", "micro batch", "flash", "math", "math over flash"), rows, right={0, 1, 2, 3, 4})
