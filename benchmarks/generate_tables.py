"""Writes those tables in the documents that are made from the presets, the catalogue and the planner.

``python benchmarks/generate_tables.py`` rewrites the text between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in the
Markdown files. ``--check`` changes nothing; if files are stale, it names them and exits with status 1. The tables on the fit
of the time model need the two files of published runs. They are rewritten, and checked, only with ``--published FILE FILE``,
which takes a minute.

The user's own catalogue and measurements are not used.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import cards, context, presets, reports, time_model

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("configs/README.md", "docs/PLANNER.md", "docs/HIGH_CONTEXT_CONFIGS.md")

Table = Callable[[], str]

TABLES: Mapping[str, Table] = {
    "presets": presets.presets,
    "public models": presets.public_models,
    "model states": presets.states,
    "memory on one GPU": presets.memory_on_one_gpu,
    "common cards": presets.common_cards,
    "attention's share": presets.attention_share,
    "largest presets": cards.largest_presets,
    "batches": cards.batches,
    "batches that do not fit": cards.shortfalls,
    "largest presets as promised": cards.promised,
    "shares": time_model.shares,
    "figures": time_model.figures,
    "networks": time_model.networks,
    "network names": time_model.network_names,
    "network shares": time_model.network_shares,
    "latencies": time_model.latencies,
    "search": time_model.search_constants,
    "report": reports.whole,
    "report, does not fit": reports.does_not_fit,
    "report, every preset": reports.every_preset,
    "sweep": reports.sweep,
    "json keys": reports.json_keys,
    "256 against 1024": context.pairs,
    "micro batches that fit": context.micro_batches,
    "beyond 1024": context.beyond,
    "math attention": context.math_attention,
}

OF_PUBLISHED_RUNS = (
    "fitted numbers", "fit", "fit, llm-foundry", "terms left out", "trainers left out", "range", "our trainer in their place",
    "published memory", "rows left out", "trainers", "16 GPUs and more", "scaling efficiency",
)  # fmt: skip
"""The names of the tables that need the files of published runs."""

_GENERATED = re.compile(r"(<!-- generated: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def names_in(text: str) -> list[str]:
    """The names of the generated tables in a document, in order."""
    return [match[2] for match in _GENERATED.finditer(text)]


def rewritten(text: str, tables: Mapping[str, Table]) -> str:
    """The text of a document with new tables. Tables of :data:`OF_PUBLISHED_RUNS` that ``tables`` lacks are kept.

    Args:
        text: the document.
        tables: name → the function that makes the table.

    Raises:
        KeyError: the document has a table of another name.
    """

    def replace(match: re.Match[str]) -> str:
        opening, name, now, end = match.groups()
        if name in OF_PUBLISHED_RUNS and name not in tables:
            return match[0]
        del now
        return f"{opening}{tables[name]().strip()}\n{end}"

    return _GENERATED.sub(replace, text)


def stale(tables: Mapping[str, Table], root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """The documents with outdated tables, each with the text that it should have."""
    for name in DOCUMENTS:
        path = root / name
        text = path.read_text(encoding="utf-8")
        current = rewritten(text, tables)
        if current != text:
            yield path, current


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables or check them. Return 1 if a check finds an outdated table, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; name stale files and exit 1")
    parser.add_argument(
        "--published", metavar="FILE", nargs=2, type=Path, help="llm-foundry's published runs, and other trainers'"
    )
    arguments = parser.parse_args(argv)
    os.environ["SCALEGPT_GPUS"] = ""  # the catalogue as it is shipped
    tables = dict(TABLES)
    if arguments.published:
        from benchmarks.tables.fit import tables_of

        tables |= tables_of(*arguments.published)
    found = list(stale(tables))
    for path, text in found:
        print(f"{path.relative_to(ROOT)} {'is stale' if arguments.check else 'rewritten'}")
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
    if found and arguments.check:
        print("run python benchmarks/generate_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
