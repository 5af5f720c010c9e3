"""Damaged token files; ``python tests/fuzz/token_headers.py --cases 10000`` runs more."""

from pathlib import Path

import pytest

from fuzz.token_headers import KINDS, fault

CASES, SEED = 500, 1


def test_damaged_token_files_are_refused_or_read_right(tmp_path: Path) -> None:
    found = {number: fault(SEED, number, tmp_path) for number in range(CASES)}
    assert {number: each for number, each in found.items() if each is not None} == {}


@pytest.mark.parametrize(("make", "read"), KINDS)
def test_the_plain_readers_read_what_is_whole(tmp_path: Path, make, read) -> None:  # type: ignore[no-untyped-def]
    ids = read(make(tmp_path))
    assert len(ids) > 100
    assert 256 in ids
