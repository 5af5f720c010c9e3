"""Damaged token files; ``python tests/fuzz/token_headers.py --cases 10000`` runs more."""

from pathlib import Path

import pytest

from fuzz.token_headers import KINDS, fault, read_datatrove, read_llmc, read_megatron

CASES, SEED = 500, 1


def test_damaged_token_files_are_refused_or_read_right(tmp_path: Path) -> None:
    found = {number: fault(SEED, number, tmp_path) for number in range(CASES)}
    assert {number: each for number, each in found.items() if each is not None} == {}


@pytest.mark.parametrize(("make", "read"), KINDS)
def test_the_plain_readers_read_what_is_whole(tmp_path: Path, make, read) -> None:  # type: ignore[no-untyped-def]
    assert len(read(make(tmp_path))) > 100
    if read in (read_llmc, read_megatron, read_datatrove):
        assert 256 in read(tmp_path)
