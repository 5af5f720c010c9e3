"""``scalegpt gpus``: the catalogue of cards, or one card with the sources of its figures."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from scalegpt.cli.output import aligned, show, show_json
from scalegpt.cli.parser import Parser, add_json
from scalegpt.hardware.catalogue_file import FIGURES, PRICE
from scalegpt.hardware.gpus import GB, Card, catalogue, find_card_and_note, user_file
from scalegpt.planner.time.rates import basis
from scalegpt.text import one_line

EXAMPLE = """\
scalegpt gpus
scalegpt gpus a100-40gb

your own cards, and other figures for known ones, in ~/.config/scalegpt/gpus.yaml or the file that SCALEGPT_GPUS names:
  - name: RTX 5090 D                       # a new card; link, link_gbps, link_cards, peer, match and aliases are optional
    capability: 12.0
    gib: [31.36, nvidia-smi on my machine] # the memory that torch reports, GiB; its source is optional
    tflops: 209.5                          # dense half-precision peak with fp32 accumulation
    gbps: 1790                             # bandwidth of its memory, GB/s
    host_gbps: 128                         # PCIe, both directions together, GB/s
  - name: RTX 4090                         # a known card: only the figures that differ
    peer: true
    price_per_gpu_hour: 0.35               # optional; plans then say what a run costs"""

UNITS = {
    "gib": "GiB of memory, as torch reports it",
    "tflops": "TFLOP/s, dense half precision with fp32 accumulation",
    "gbps": "GB/s, its memory",
    "host_gbps": "GB/s to the host, both directions together",
    "link_gbps": "GB/s to other cards, both directions together",
}


def main(argv: Sequence[str]) -> int:
    """Print the catalogue, or one card of it."""
    parser = Parser("gpus", "List the known GPUs, or show one with the sources of its figures.", EXAMPLE)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a card, for example a100-40gb; none: list all")
    add_json(parser, "print JSON: a list of the cards, or one card, with all sources")
    arguments = parser.parse(argv)
    if arguments.name is not None:
        card, remark = find_card_and_note(arguments.name, advice="")
        show_json(as_dict(card)) if arguments.json else show(one_card(card, remark))
    else:
        cards = catalogue()
        show_json([as_dict(card) for card in cards]) if arguments.json else show(table(cards))
    return 0


def as_dict(card: Card) -> dict[str, Any]:
    """A card as plain values, with the sources of its figures."""
    own = {"has_bf16": card.has_bf16, "usable_bytes": card.usable_bytes, "estimated": card.estimated}
    return {field.name: getattr(card, field.name) for field in fields(card)} | own | {"sources": dict(card.sources)}


def table(cards: Sequence[Card]) -> str:
    """The cards as a text table, where ``~`` marks an estimated figure."""
    heading = ("gpu", "GiB", "TFLOP/s", "GB/s", "link", "link GB/s", "copies", "capability", "bf16")
    rows = [heading, *map(_row, cards)]
    own = user_file()
    notes = [
        "GiB: the memory that torch reports. TFLOP/s: dense half precision. link GB/s: both directions together; pairs:",
        "a bridge joins two cards, larger groups use PCIe. copies: between cards over PCIe, directly or through the host.",
        "~ marks a figure that is estimated; `scalegpt gpus NAME` shows the sources.",
    ]
    if own is not None:
        notes.append(f"Your own file is read too: {own}.")
    return f"{aligned(rows, right={1, 2, 3, 5})}\n\n" + "\n".join(notes)


def one_card(card: Card, remark: str | None = None) -> str:
    """The figures of one card with their sources, then ``remark``: a line on other cards that the user may have meant."""
    rows = [("figure", "value", "", "source")]
    rows += [(figure, f"{getattr(card, figure):g}", UNITS[figure], _source(card, figure)) for figure in FIGURES]
    if card.price_per_gpu_hour is not None:
        rows.append((PRICE, f"{card.price_per_gpu_hour:g}", "for one card for one hour", _source(card, PRICE)))
    rows.append(
        ("peer", "yes" if card.peer else "no", "copies directly to other cards over PCIe", _source(card, "peer"))
    )
    link = card.link if card.link_cards is None else f"{card.link} for {card.link_cards} cards, else pcie"
    words = {
        "also called": ", ".join(card.aliases) or "-",
        "driver's name": f"has the words {', '.join(card.match)}",
        "capability": f"{card.capability}, {'bf16' if card.has_bf16 else 'fp16 only, no flash attention'}",
        "usable": f"{card.usable_bytes:,} bytes = {card.usable_bytes / GB:.2f} GB",
        "link": link,
    }
    described = "\n".join(f"{key:<15}{one_line(value)}" for key, value in words.items())
    notes = [f"note: {note}" for note in (remark, basis(card)) if note]
    return f"{one_line(card.name)}\n\n{described}\n\n{aligned(rows, right={1})}\n\n" + "\n".join(notes)


def _row(card: Card) -> tuple[str, ...]:
    link = card.link if card.link_cards is None else f"{card.link}, pairs"
    copies = ("direct" if card.peer else "by host") + ("~" if "peer" in card.estimated else "")
    figures = (_figure(card, figure) for figure in ("gib", "tflops", "gbps"))
    bf16 = "yes" if card.has_bf16 else "fp16"
    return (card.name, *figures, link, _figure(card, "link_gbps"), copies, card.capability, bf16)


def _figure(card: Card, figure: str) -> str:
    return f"{'~' if figure in card.estimated else ''}{getattr(card, figure):g}"


def _source(card: Card, figure: str) -> str:
    source = card.sources[figure]
    if not source.startswith("~"):
        return source
    return source[1:] if source.startswith("~estimated") else f"estimated: {source[1:]}"
