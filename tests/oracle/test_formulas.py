"""The section "The formulas, one by one" of docs/MEMORY.md is what ``formulas.py`` prints, and its errors are as claimed.

Here a few rows are measured again, and the arithmetic of all of them; ``SCALEGPT_ORACLE=all`` measures all.
"""

import os
import re
from itertools import pairwise
from pathlib import Path

import pytest

from oracle.formulas import (
    FORMULA_HEAD,
    FORMULAS,
    KEPT,
    LENGTH_HEAD,
    LENGTHS,
    LOGITS,
    STATES,
    TINY_HEAD,
    TRACED_WITHIN,
    TRACKED_WITHIN,
    Formula,
    length_row,
    line,
    tiny,
    tiny_rows,
)

DOC = (Path(__file__).parents[2] / "docs" / "MEMORY.md").read_text(encoding="utf-8")
SECTION = DOC.partition("## The formulas, one by one\n")[2].partition("\n## ")[0]

ALL = os.environ.get("SCALEGPT_ORACLE") == "all"
FEW = ("weights", "moments", "gradients", "block, none, math", "block, full", "full logits, forward",
       "full logits, backward", "fsdp 3, gathered, forward", "fsdp 3, reduce buffer")  # fmt: skip


def printed(head: list[str]) -> list[str]:
    """The rows of the table in the document that has this head."""
    rows = SECTION.partition(line(head) + "\n")[2].split("\n\n", maxsplit=1)[0].splitlines()
    assert rows, f"docs/MEMORY.md has no table {line(head)}"
    return rows[1:]


def test_the_arithmetic_of_every_row_is_printed() -> None:
    rows = printed(FORMULA_HEAD)
    assert [row.split(" | ")[:5] for row in rows] == [
        line([*formula.said_cells(), ""]).split(" | ")[:5] for formula in FORMULAS
    ]


def test_no_printed_error_exceeds_what_is_claimed() -> None:
    for formula, row in zip(FORMULAS, printed(FORMULA_HEAD), strict=True):
        error = row.split(" | ")[-1].removesuffix(" |")
        assert abs(float(error.removesuffix("%"))) / 100 <= formula.bound, row
    claim = f"{TRACED_WITHIN:.1%} against the trace, or {TRACKED_WITHIN:.0%} against DeepSpeed"
    assert claim in SECTION.replace("\n", " ")


@pytest.mark.parametrize(
    "formula",
    [formula for formula in FORMULAS if ALL or formula.what in FEW],
    ids=lambda formula: f"{formula.what} {formula.setting}",
)
def test_what_the_step_holds_is_printed(formula: Formula) -> None:
    assert abs(formula.error()) <= formula.bound
    assert line(formula.row()) in printed(FORMULA_HEAD)


@pytest.mark.parametrize("length", LENGTHS if ALL else LENGTHS[:1])
def test_activations_by_block_size_are_printed(length: int) -> None:
    assert line(length_row(length)) in printed(LENGTH_HEAD)


def test_flash_grows_with_the_block_size_and_math_with_its_square() -> None:
    flash, maths = (
        [float(row.split(" | ")[column].removesuffix(" MiB")) for row in printed(LENGTH_HEAD)] for column in (1, 2)
    )
    for shorter, longer in pairwise(flash):
        assert longer == pytest.approx(2 * shorter, rel=1e-3)
    steps = [longer - 2 * shorter for shorter, longer in pairwise(maths)]  # twice the T² part
    for shorter, longer in pairwise(steps):
        assert longer == pytest.approx(4 * shorter, rel=1e-3)


def test_tiny_is_printed() -> None:
    assert printed(TINY_HEAD) == [line(row) for row in tiny_rows()]
    full = tiny("full")
    states, kept = re.findall(r"([\d.]+) times as much as (?:all|the)", SECTION.replace("\n", " "))
    assert (states, kept) == (f"{full[LOGITS] / full[STATES]:.1f}", f"{full[LOGITS] / full[KEPT]:.1f}")
