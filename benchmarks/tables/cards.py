"""Tables by card: the largest preset that fits each card, and whether presets fit the cards for which they were made."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

from benchmarks.tables.markdown import code, gib, table
from benchmarks.tables.plans import HIGH_CONTEXT, block_size, by_size, chosen, predicted
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import resolve
from scalegpt.config.train import RECOMPUTE
from scalegpt.hardware.gpus import GIB, Card, catalogue, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.planner.plan import Plan

LIGHT = ("none", "selective")
"""The kinds of recompute that cost little time."""


# --- the largest preset of each card ---------------------------------------------------------------------------------

SMALL_CARDS = (
    "GTX 1650", "GTX 1660", "RTX 2060", "RTX 2070", "RTX 3060 Ti", "RTX 3070", "RTX 4060", "RTX 5060", "RTX 3080",
    "RTX 2080 Ti", "RTX 4070", "RTX 5070", "RTX 2060 12GB", "RTX 3060",
)  # fmt: skip
"""The cards with less than 12 GiB that the table shows. The catalogue has others of the same sizes."""


def largest_presets() -> str:
    """The table of the largest presets that fit one card. Cards with the same presets share a row."""
    same: dict[tuple[str, ...], list[Card]] = defaultdict(list)
    shown = (card for card in catalogue() if card.gib >= 12 or card.name in SMALL_CARDS)
    cards = sorted(shown, key=lambda card: card.gib)
    for card in cards:
        same[_largest_of(card.name)].append(card)
    head = ("GPU", "usable GiB", "block 256", "block 1024", "at all")
    return table(head, ((*_together(alike, cards), *answer) for answer, alike in same.items()), right={1})


def _together(alike: list[Card], cards: list[Card]) -> tuple[str, str]:
    """The names and the memory of the cards that share a row.

    If they are all of ``cards`` above some memory size, the text has three names and "and all with more".
    """
    low, high = f"{alike[0].gib:.1f}", f"{alike[-1].gib:.1f}"
    if alike == cards[-len(alike) :] and len(alike) > 3:
        names = ", ".join(card.name for card in alike[:3])
        return f"{names} and all with more", f"from {low}"
    return ", ".join(card.name for card in alike), low if low == high else f"{low} to {high}"


def _largest_of(card: str) -> tuple[str, ...]:
    short, long = (_lightly(card, high_context=high) for high in (False, True))
    return _named(short), _named(long), _at_all(card, long)


@cache
def _lightly(card: str, *, high_context: bool) -> Plan | None:
    """The plan of the largest preset that fits without offload and without recompute "full"; None: none fits.

    With ``high_context`` only presets with a block size of at least :data:`HIGH_CONTEXT` count, else only the others.
    """
    for name in reversed(by_size()):
        if (block_size(name) >= HIGH_CONTEXT) != high_context:
            continue
        plan = lightest(name, card)
        if plan is not None:
            return plan
    return None


def lightest(preset: str, card: str) -> Plan | None:
    """The plan of a preset in one process. Recompute is "selective" only if "none" does not fit.

    None if neither fits.
    """
    plans = (chosen(preset, card, backend="plain", recompute=recompute, loss="chunked") for recompute in LIGHT)
    return next((plan for plan in plans if plan is not None), None)


def _named(plan: Plan | None) -> str:
    if plan is None:
        return "none"
    recompute = plan.run.train.recompute
    return code(plan.run.name) + ("" if recompute == "none" else f", {recompute}")


def _at_all(card: str, lightly: Plan | None) -> str:
    """The largest preset that fits if recompute "full" and offload are allowed, and which of them it needs."""
    largest = by_size()[-1]
    if lightly is not None and lightly.run.name == largest:
        return "the same"
    for name in reversed(by_size()):
        heavier = chosen(name, card, backend="plain", recompute="full", loss="chunked")
        if heavier is not None:
            return f"{code(name)}, full"
        offloaded = chosen(name, card)
        if offloaded is not None:
            train, parallel = offloaded.run.train, offloaded.run.parallel
            return f"{code(name)}, {parallel.offload} offloaded" + (
                "" if train.recompute == "none" else f", {train.recompute}"
            )
    return "none"


# --- presets that were promised for a card -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """The claim that a preset with its own micro batch fits the cards of one size.

    Attributes:
        preset: the preset's name.
        gb: the cards' memory size, GB.
        card: the card of that size with the least usable memory; None: a card with exactly ``gb`` · 10⁹ usable bytes.
        others: other cards of that size, which have more usable memory.
    """

    preset: str
    gb: int
    card: str | None
    others: tuple[str, ...] = ()

    @property
    def machine(self) -> Machine:
        """A machine with one card of the claim."""
        settings = MachineConfig(memory_gb=self.gb) if self.card is None else MachineConfig(gpu=self.card)
        return Machine.of(settings)

    def plan(self, recompute: str, **flags: str) -> Plan:
        """The plan of the preset with its own micro batch on one card."""
        run = resolve(
            preset=self.preset, flags={"precision": "bf16", "recompute": recompute, "loss": "chunked", **flags}
        )
        return predicted(run, self.machine)


CLAIMS = (
    Claim("150M_1024", 12, "RTX 3060"),
    Claim("200M_1024", 16, "RTX A4000", ("RTX 4080",)),
    Claim("250M_1024", 16, "RTX A4000", ("RTX 4080",)),
    Claim("350M_1024", 20, None),
    Claim("500M_1024", 24, "RTX 4090", ("RTX 3090",)),
)


def batches() -> str:
    """The table of claims. Each has two rows: the preset's own layout, and a single process without sharding."""
    rows = []
    for claim in CLAIMS:
        for flags in ({}, {"backend": "plain"}):
            plans = [claim.plan(recompute, **flags) for recompute in RECOMPUTE]
            run = plans[0].run
            rows.append(
                (code(claim.preset), str(run.train.micro_batch), _card(claim), run.parallel.label(), *map(room, plans))
            )
    return table(("preset", "batch", "card", "layout", *(f"recompute {kind}" for kind in RECOMPUTE)), rows, right={1})


def _card(claim: Claim) -> str:
    usable = f"{(claim.machine.usable_bytes or 0) / GIB:.2f} GiB"
    if claim.card is None:
        return f"{claim.gb} GB: {usable}"
    more = ", ".join(f"{name} {find_card(name).gib:.2f}" for name in claim.others)
    return f"{claim.card}: {usable}" + (f" ({more})" if more else "")


def room(plan: Plan) -> str:
    """A plan's total memory, and how much memory is left on the card or lacking, in words."""
    left = f"{abs(plan.missing_bytes) / GIB:.2f}"
    return f"{gib(plan.total_bytes)}, " + (f"{left} to spare" if plan.fits else f"**{left} too much**")


def shortfalls() -> str:
    """The claims that are false with the trainer's default recompute, by how much and why, in words."""
    lines = [_shortfall(claim) for claim in CLAIMS if not claim.plan("none").fits]
    if not lines:
        return "All hold with `--recompute none`, the trainer's default."
    return "\n".join(lines)


def _shortfall(claim: Claim) -> str:
    plan = claim.plan("none")
    train = plan.run.train
    parts = plan.prediction.breakdown
    largest = max(parts, key=lambda part: parts[part])
    alone = chosen(claim.preset, claim.machine, backend="plain", recompute="none", loss="chunked")
    best = chosen(claim.preset, claim.machine)
    assert alone is not None
    assert best is not None
    holds = next(kind for kind in RECOMPUTE if claim.plan(kind).fits)
    model = plan.run.model
    each = parts[largest] / (train.micro_batch * model.block_size * model.n_layer * model.n_embd)
    needs = (
        f"- `{claim.preset}`, batch {train.micro_batch} on {claim.gb} GB: with `--recompute none` it needs "
        f"{gib(plan.total_bytes)}, {abs(plan.missing_bytes) / GIB:.2f} GiB more than there is. {gib(parts[largest])} of "
        f"that are {largest}: {each:.1f} bytes for each of {train.micro_batch} × {model.block_size} tokens, "
        f"{model.n_layer} layers and {model.n_embd} numbers."
    )
    instead = (
        f"With `--recompute {holds}` it fits, with {gib(-claim.plan(holds).missing_bytes)} to spare. Without recompute the "
        f"largest micro batch that divides the step and fits is {alone.batch.micro_batch}; the planner takes micro batch "
        f"{best.batch.micro_batch}, recompute {best.run.train.recompute} and the {best.run.train.loss} loss there."
    )
    return f"{needs} {instead}"


PROMISED = (
    ("RTX 2060 Super", ("150M",)),
    ("RTX 3060", ("200M", "150M_1024")),
    ("RTX 3080", ("200M", "150M_1024")),
    ("RTX 4080", ("250M_1024",)),
    ("RTX 3090", ("250M", "500M_1024")),
    ("RTX 4090", ("250M", "500M_1024")),
    ("A100 40GB", ("500M_1024", "gpt2-large", "gpt2-xl")),
)
"""(GPU, the largest presets that were promised for it). For the A100 40GB "and more" was promised. Two sizes of GPT-2
without a preset stand for that."""

_MORE = {
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}
_MORE_TRAINING = {"block_size": 1024, "vocab_size": 50304, "tokens_per_step": 524288}


def promised() -> str:
    """The table of the largest presets that were promised for each card, beside the planner's results."""
    rows = []
    for card, names in PROMISED:
        for name in names:
            shape = {**_MORE[name], **_MORE_TRAINING} if name in _MORE else {}
            plans = (
                chosen(None if shape else name, card, backend="plain", recompute=recompute, loss="chunked", **shape)
                for recompute in RECOMPUTE
            )
            plan = next((plan for plan in plans if plan is not None), None)
            first = name == names[0]
            largest = _largest_of(card)
            rows.append((
                card if first else "", "more: " * bool(shape) + code(name), _how(plan),
                *(largest if first else ("", "", "")),
            ))  # fmt: skip
    return table(
        "GPU | promised | in one process, nothing offloaded | largest, block 256 | largest, block 1024 | at all", rows
    )


def _how(plan: Plan | None) -> str:
    if plan is None:
        return "**does not fit**"
    return f"micro batch {plan.batch.micro_batch}, recompute {plan.run.train.recompute}: {room(plan)}"
