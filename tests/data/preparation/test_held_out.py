"""Which documents are held out, and which are left out as copies."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from scalegpt.config import DataConfig
from scalegpt.data.preparation.split import Split, choose_split
from scalegpt.data.prepare import prepare
from scalegpt.data.shards import TokenSet
from scalegpt.data.text.reading import Source

END = "<|endoftext|>"


def record(number: int) -> str:
    return f"document {number}: " + "words " * random.Random(number).randrange(5, 30)


def records(path: Path, numbers: Any) -> Path:
    path.write_text("".join(json.dumps({"text": record(number)}) + "\n" for number in numbers))
    return path


def parts(tokens: TokenSet) -> tuple[list[str], list[str]]:
    """The training documents and the held-out ones."""
    train, val = (tokens.tokenizer.decode(tokens.files[split].tokens[:]).split(END)[:-1] for split in ("train", "val"))
    return train, val


def test_documents_stay_where_they_are_as_data_grow(tmp_path: Path) -> None:
    settings = DataConfig(tokenizer="byte", val_fraction=0.1)
    small = parts(prepare([records(tmp_path / "a.jsonl", range(500))], tmp_path / "small", settings))
    numbers = [*range(700, 199, -1), *range(200), 701, 702]  # the same documents and more, in another order
    large = parts(prepare([records(tmp_path / "b.jsonl", numbers)], tmp_path / "large", settings))
    assert set(small[0]) < set(large[0])
    assert set(small[1]) < set(large[1])
    assert sorted(small[0] + small[1]) == sorted(record(number) for number in range(500))
    assert 25 < len(small[1]) < 100
    rarer = parts(prepare([tmp_path / "a.jsonl"], tmp_path / "rare", settings.changed(val_fraction=0.05)))
    assert set(rarer[1]) < set(small[1])


def test_a_file_and_a_record_of_the_same_text_are_alike(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number in range(200):
        path = tmp_path / "files" / f"{number:03}.txt"
        if number % 2:
            path.write_text(record(number))
        else:
            path.write_bytes(record(number).encode("utf-16" if number % 4 else "utf-8-sig"))
    settings = DataConfig(tokenizer="byte", val_fraction=0.2, encoding="auto")
    files = parts(prepare([tmp_path / "files"], tmp_path / "a", settings))
    lines = parts(prepare([records(tmp_path / "b.jsonl", range(200))], tmp_path / "b", settings))
    assert files == lines


def source(size: int, first: int, form: str | None = None, documents: int = 1) -> Source:
    """A source whose text has a SHA-256 that begins with a number of 16 bits."""
    digest = f"{first:04x}" + "0" * 60
    name = f"{first}"
    return Source(
        path=Path(name), name=name, encoding="utf-8", bytes=size, sha256=digest, form=form, documents=documents,
        text_bytes=size,
    )  # fmt: skip


def spread(count: int, size: int) -> list[Source]:
    """Documents whose hashes are spread evenly."""
    return [source(size, number * 65536 // count) for number in range(count)]


def test_the_default_share_is_a_power_of_ten_that_is_at_most_eight_megabytes() -> None:
    for total, fraction in ((10**6, 0.1), (79 * 10**6, 0.1), (81 * 10**6, 0.01), (10**9, 0.001), (10**12, 1e-6)):
        assert choose_split([source(total, 0, "JSON Lines", 10**9)], None) == Split("documents", fraction)


def test_few_documents_give_their_tails_with_a_share_of_at_most_eight_megabytes() -> None:
    assert choose_split(spread(19, 1000), None) == Split("tails", 0.1)
    assert choose_split([source(10**9, 0)], None) == Split("tails", 0.008)
    assert choose_split(spread(19, 1000), 0.3) == Split("tails", 0.3)


def test_tails_where_hashes_would_hold_out_too_little_or_too_much() -> None:
    assert choose_split(spread(40, 1000), 0.1) == Split("documents", 0.1)
    giant = source(10**6, 60_000)
    assert choose_split([*spread(40, 1000), giant], 0.1).method == "tails", "the rest is far less than a tenth"
    assert choose_split([*spread(40, 1000), source(10**6, 1)], 0.1).method == "tails", "it would be nearly everything"
    assert choose_split(spread(40, 1000)[4:], 0.1).method == "tails", "none is held out"


def test_a_fall_back_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = records(tmp_path / "a.jsonl", range(30))
    with path.open("a") as file:
        file.write(json.dumps({"text": "giant " * 20_000}) + "\n")
    caplog.set_level(logging.WARNING)
    tokens = prepare([path], tmp_path / "out", DataConfig(tokenizer="byte", val_fraction=0.1))
    assert tokens.meta["split"]["method"] == "tails"
    assert "the end of each document is held out" in caplog.text
    assert all(val and train for train, val in zip(*parts(tokens), strict=True))


def test_copies_are_left_out_and_the_first_stays(tmp_path: Path) -> None:
    numbers = [5, 1, 2, 1, 3, 3, 4, 1, *range(10, 40), 12]
    folder = tmp_path / "in"
    folder.mkdir()
    records(folder / "a.jsonl", numbers)
    (folder / "b.txt").write_text(record(99))
    (folder / "c.txt").write_text(record(2))  # as a record before it
    (folder / "d.txt").write_text(record(99))
    (folder / "e.txt").write_text(record(99) + " ")  # not the same
    settings = DataConfig(tokenizer="byte", val_fraction=0.2, deduplicate=True)
    tokens = prepare([folder], tmp_path / "out", settings)
    train, val = parts(tokens)
    expected = [*map(record, [5, 1, 2, 3, 4, *range(10, 40), 99]), record(99) + " "]
    assert sorted(train + val) == sorted(expected)
    assert train == [each for each in expected if each in train], "in order"
    assert (tokens.meta["documents"], tokens.meta["duplicates"]) == (len(expected), 6)
    assert tokens.meta["split"]["held_out_documents"] == len(val)
    every = prepare([folder], tmp_path / "every", settings.changed(deduplicate=False))
    assert (every.meta["documents"], "duplicates" in every.meta) == (len(expected) + 6, False)


def test_copies_among_few_documents(tmp_path: Path) -> None:
    path = records(tmp_path / "a.jsonl", [1, 2, 1])
    tokens = prepare([path], tmp_path / "out", DataConfig(tokenizer="byte", val_fraction=0.2, deduplicate=True))
    assert ["".join(each) for each in zip(*parts(tokens), strict=True)] == [record(1), record(2)]
