"""Which windows a step consumed: the same for any layout, before and after a resume, and past a rollback."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from scalegpt.data.windows.ledger import Ledger, LedgerFile, LedgerSource
from scalegpt.data.windows.sampler import MixtureSampler, WindowSampler
from scalegpt.errors import InputError
from stretches import of_one_file

START = of_one_file(1, 0, 6, 8, 1337, 5000, "/data/train.bin", "digest", "start")


def test_windows_are_the_samplers_in_their_order() -> None:
    stretch = replace(START, first_step=11, first_window=100)
    windows = stretch.windows(13)
    assert [each.order for each in windows] == list(range(6))
    assert [each.number for each in windows] == list(range(112, 118))
    assert [each.offset for each in windows] == WindowSampler(5000, 8, 1337).starts(112, 6).tolist()
    assert {each.length for each in windows} == {9}


def test_a_stretch_written_from_another_step_is_the_same() -> None:
    later = START.starting_at(40)
    assert later.windows(45) == START.windows(45)
    (source,) = START.sources
    moved = replace(source, name="other", files=(LedgerFile("/moved/train.bin", 0, 5000),))
    assert replace(later, sources=(moved,), reason="resumed").continues(START)
    assert not replace(later, first_window=later.first_window + 1).continues(START)
    for change in ({"seed": 1}, {"windows_per_step": 7}, {"data": "other"}, {"block_size": 4}):
        assert not replace(later, **change).continues(START)
    for change in ({"tokens": 4999}, {"share": 5000}, {"data": "other"}):
        assert not replace(later, sources=(replace(source, **change),)).continues(START)
    assert not replace(later, sources=(source, source)).continues(START)


def test_a_line_of_an_earlier_release_is_read_and_continued(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "data_ledger.jsonl")
    line = {
        "first_step": 1, "first_window": 0, "windows_per_step": 6, "block_size": 8, "seed": 1337, "tokens": 5000,
        "file": "/data/train.bin", "data": "digest", "reason": "start",
    }  # fmt: skip
    ledger.path.write_text(json.dumps(line) + "\n")
    assert ledger.read() == [START]
    ledger.append(replace(START.starting_at(20), reason="resumed"))
    assert json.loads(ledger.path.read_text()) == line


def test_more_files_than_a_line_can_list_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "data_ledger.jsonl")
    ledger.append(START)
    before = ledger.path.read_text()
    monkeypatch.setattr("scalegpt.data.windows.ledger._LONGEST_LINE", len(before))
    assert ledger.read() == [START]
    files = tuple(LedgerFile(f"/data/{number}.bin", 0, 50) for number in range(100))
    many = replace(START, first_step=9, sources=(replace(START.sources[0], files=files, data="more"),))
    with pytest.raises(InputError, match="cannot list 100 token files; put the tokens into fewer"):
        ledger.append(many)
    assert ledger.path.read_text() == before


def test_windows_of_a_mixture_name_their_source_and_file(tmp_path: Path) -> None:
    wiki = LedgerSource("wiki", 7000, 4000, "one", (LedgerFile("/w/0.bin", 0, 1500), LedgerFile("/w/1.bin", 512, 2500)))
    code = LedgerSource("code", 3000, 900, "two", (LedgerFile("/c/train.bin", 0, 900),))
    stretch = replace(START, windows_per_step=500, sources=(wiki, code))
    ledger = Ledger(tmp_path / "data_ledger.jsonl")
    ledger.append(stretch)
    assert ledger.read() == [stretch]
    drawn = MixtureSampler([4000, 900], [7000, 3000], 8, 1337).windows(500, 500)
    windows = stretch.windows(2)
    assert {(each.source, each.file) for each in windows} == {
        ("wiki", "/w/0.bin"), ("wiki", "/w/1.bin"), ("code", "/c/train.bin"),
    }  # fmt: skip
    for window, source, start in zip(windows, drawn.sources.tolist(), drawn.starts.tolist(), strict=True):
        assert window.source == ("wiki", "code")[source]
        assert window.offset == (start if start < 1500 or source else start - 1500 + 512)
        assert (window.file == "/w/1.bin") == (source == 0 and start >= 1500)


def test_what_is_appended_is_found_and_what_changes_nothing_is_not_appended(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "data_ledger.jsonl")
    assert ledger.read() == []
    assert ledger.stretch_of(1) is None
    ledger.append(START)
    ledger.append(replace(START.starting_at(20), reason="resumed"))
    assert ledger.read() == [START]
    back = replace(START, first_step=11, first_window=300, reason="rolled back")
    ledger.append(back)
    assert [ledger.stretch_of(step) for step in (1, 10, 11, 99)] == [START, START, back, back]
    windows = dict(ledger.windows([10, 11]))
    assert [each.number for each in windows[10] + windows[11]] == [*range(54, 60), *range(300, 306)]


def test_stretches_of_steps_to_come_again_are_forgotten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "data_ledger.jsonl")
    ledger.forget_after(5)
    back = replace(START, first_step=11, first_window=300)
    ledger.append(START)
    ledger.append(back)
    ledger.forget_after(11)
    assert ledger.read() == [START, back]
    ledger.forget_after(10)
    assert ledger.read() == [START]
    ledger.forget_after(0)
    assert ledger.read() == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is missing"),
        ("", "has no line that can be read"),
        ("garbage\n\0\n", "has no line that can be read"),
        (json.dumps({**asdict(START), "first_step": "1"}) + "\n", "has no line that can be read"),
        (
            json.dumps(asdict(START.starting_at(3))) + "\n",
            "has no entry for step 2: the file may have been cut short or replaced",
        ),
    ],
)
def test_what_the_ledger_does_not_tell_is_laid_to_nobody_else(tmp_path: Path, content: str | None, reason: str) -> None:
    ledger = Ledger(tmp_path / "data_ledger.jsonl")
    if content is not None:
        ledger.path.write_text(content)
    with pytest.raises(InputError) as caught:
        list(ledger.windows([2]))
    assert str(caught.value) == (
        f"{ledger.path} {reason}; restore it from a backup: no other file records which windows a step consumed"
    )


def test_a_line_that_was_cut_short_is_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "data_ledger.jsonl")
    ledger.append(START)
    whole = ledger.path.read_text()
    values = json.loads(whole)
    (source,) = values["sources"]
    wrong = (
        *({"share": share} for share in (0, 9999, True, "10000")),
        *({"files": files} for files in ([], [["a", 0]], [["a", 0, 4999]], [["a", -1, 5000]], [[1, 0, 5000]], None)),
        {"tokens": 8}, {"tokens": 4999}, {"name": None}, {"data": 1}, {"more": 1},
    )  # fmt: skip
    bad = [json.dumps({**values, "sources": [{**source, **change}]}) + "\n" for change in wrong]
    bad += [json.dumps({**values, "sources": listed}) + "\n" for listed in ([], [source, source], [None], {}, None)]
    for damage in (whole[:-1], whole[:20], "{}\n", "null\n", "\0\n", *bad):
        ledger.path.write_text(whole + damage)
        assert ledger.read() == [START]
    assert json.loads(whole)["reason"] == "start"
    ledger.path.unlink()
    ledger.path.mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        ledger.read()
