"""The generated tables of the documents are current."""

from pathlib import Path

import pytest

from benchmarks.generate_tables import DOCUMENTS, OF_PUBLISHED_RUNS, ROOT, TABLES, main, names_in, rewritten, stale
from benchmarks.tables.cards import CLAIMS, Claim
from benchmarks.tables.plans import fits_with_margin
from scalegpt.config.train import RECOMPUTE
from scalegpt.planner.search.question import MARGIN


def test_every_table_is_current_whatever_cards_the_user_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "gpus.yaml"
    own.write_text("- name: RTX 4090\n  gib: 12\n", encoding="utf-8")
    monkeypatch.setenv("SCALEGPT_GPUS", str(own))
    status = main(["--check"])
    assert (status, capsys.readouterr().out) == (0, "")


def test_every_table_stands_in_a_document() -> None:
    there = [name for document in DOCUMENTS for name in names_in((ROOT / document).read_text(encoding="utf-8"))]
    assert sorted(there) == sorted({*TABLES, *OF_PUBLISHED_RUNS})


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.preset)
def test_a_preset_trains_with_its_own_batch_on_the_card_it_was_made_for(claim: Claim) -> None:
    assert any(fits_with_margin(claim.plan(recompute), MARGIN) for recompute in RECOMPUTE)


def test_what_is_not_generated_stays_as_it_is() -> None:
    text = "before\n<!-- generated: presets -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    assert rewritten(text, {"presets": lambda: "new\n"}) == text.replace("old", "new")


def test_tables_of_published_runs_wait_for_them() -> None:
    text = f"<!-- generated: {OF_PUBLISHED_RUNS[0]} -->\nold\n<!-- end -->\n"
    assert rewritten(text, {}) == text
    assert "new" in rewritten(text, {OF_PUBLISHED_RUNS[0]: lambda: "new"})


def test_a_name_without_a_table_is_refused() -> None:
    with pytest.raises(KeyError, match="no such table"):
        rewritten("<!-- generated: no such table -->\n<!-- end -->\n", {})


def test_stale_documents_are_found_and_nothing_is_changed(tmp_path: Path) -> None:
    for document in DOCUMENTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text("<!-- generated: search -->\nold\n<!-- end -->\n", encoding="utf-8")
    current = dict(stale(TABLES, tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in current] == list(DOCUMENTS)
    assert all("safety margin" in text for text in current.values())
    assert all("old" in (tmp_path / document).read_text(encoding="utf-8") for document in DOCUMENTS)
