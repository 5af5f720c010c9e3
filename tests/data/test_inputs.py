"""Inputs that are not paths: standard input, and addresses of data sets."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare_again, prepare_cached
from scalegpt.data.remote.inputs import parse_address
from scalegpt.data.shards import open_tokens
from scalegpt.errors import InputError

LINES = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(30)).encode()


def prepare(
    folder: Path, given: str, content: bytes = b"", *flags: str, **more: str
) -> "subprocess.CompletedProcess[bytes]":
    """Run ``data prepare`` in a folder, where it writes ``out``; ``more`` is added to the environment."""
    words = [sys.executable, "-m", "scalegpt", "data", "prepare", given, "--out", "out", "--tokenizer", "byte", *flags]
    return subprocess.run(words, input=content, capture_output=True, cwd=folder, env={**os.environ, **more})


@pytest.mark.parametrize("content", [LINES, gzip.compress(LINES)], ids=["plain", "gzip"])
def test_standard_input_is_read_by_its_content(tmp_path: Path, content: bytes) -> None:
    done = prepare(tmp_path, "-", content)
    assert done.returncode == 0, done.stderr
    tokens = open_tokens(tmp_path / "out")
    assert tokens.meta["documents"] == 30
    assert [source["path"] for source in tokens.meta["sources"]] == ["standard input"]
    assert tokens.tokenizer.decode(tokens.train[:7]).startswith("text 0")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_standard_input_that_cannot_be_used_leaves_nothing(tmp_path: Path) -> None:
    for content, what in (
        (b"", b"error: standard input is empty"),
        (LINES + b"{", b"error: standard input, line 31: broken JSON"),
        (b"caf\xe9 " * 99, b"error: standard input is not UTF-8"),
    ):
        done = prepare(tmp_path, "-", content)
        assert done.returncode == 2
        assert what in done.stderr
        assert done.stderr.count(b"\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_a_field_of_standard_input_that_is_no_records_is_refused(tmp_path: Path) -> None:
    """Nothing in CSV shows its form, so it would be read as plain text."""
    done = prepare(tmp_path, "-", b"text,id\na,1\nb,2\n", "--text_field", "text")
    assert done.returncode == 2
    assert b"error: standard input is plain text, or CSV or TSV" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert prepare(tmp_path, "-", LINES, "--text_field", "text").returncode == 0


def test_a_run_on_standard_input_resumes_with_the_tokens_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d.jsonl").write_bytes(LINES)
    begun = prepare_cached(DataConfig(input_file=str(tmp_path / "d.jsonl"), tokenizer="byte"))
    resumed, warning = prepare_again(DataConfig(input_file="-", tokenizer="byte"), begun.digest)
    assert (resumed.path, warning) == (begun.path, None)
    with pytest.raises(InputError, match="standard input"):
        prepare_again(DataConfig(input_file="-", tokenizer="byte"), "0" * 64)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://wikitext", ("wikitext", None, "train")),
        ("hf://Salesforce/wikitext", ("Salesforce/wikitext", None, "train")),
        ("hf://Salesforce/wikitext/wikitext-2-raw-v1:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("hf://datasets/HuggingFaceFW/fineweb/sample-10BT", ("HuggingFaceFW/fineweb", "sample-10BT", "train")),
        ("hf:///data/set:dev", ("/data/set", None, "dev")),
        ("hf://./set", ("./set", None, "train")),
    ],
)
def test_addresses_of_data_sets(address: str, parts: tuple[str, str | None, str]) -> None:
    assert parse_address(address) == parts


@pytest.mark.parametrize("address", ["hf://", "hf://a:", "hf://a/b:train[:10%]", "hf://a/b/c/", "hf://:train"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match="is no address of a data set; write hf://OWNER/NAME"):
        parse_address(address)


def test_without_a_network_a_data_set_is_refused_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    done = prepare(tmp_path, "hf://someone/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert done.stderr.startswith(b"scalegpt data: error: hf://someone/nothing cannot be loaded: ")
    assert done.stderr.endswith(b"; check the name and the network\n")
    assert done.stderr.count(b"\n") == 1
    assert not (tmp_path / "out").exists()
