"""Preparing text with a ``tokenizer.json``, and token files of 32 bits for large vocabularies."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

import tokenizer_samples as samples
from scalegpt.cli.main import main
from scalegpt.config import DataConfig
from scalegpt.data import prepare as module
from scalegpt.data.prepare import prepare, prepare_cached
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.stored import StoredTokens
from scalegpt.data.text import packed, reading
from scalegpt.data.tokenizers import HFTokenizer, dtype_for, huggingface, load_tokenizer
from scalegpt.data.windows.sampler import WindowSampler, cut_windows
from scalegpt.errors import InputError, RunError
from tokenizer_samples import KINDS, TEXT

pytest.importorskip("tokenizers")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of three documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_bytes(TEXT[number * 1000 :].encode())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_encoded_whole_and_end_with_the_token(
    kind: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 500)
    folder = samples.write(kind, tmp_path / kind)
    tokens = prepare([texts], tmp_path / "out", DataConfig(tokenizer=str(folder), val_fraction=0.2))
    tokenizer = load_tokenizer(str(folder))
    train, val = [], []
    for path in sorted(texts.iterdir()):
        ids = tokenizer.encode(path.read_bytes().decode()).tolist()
        train += [*ids[: int(len(ids) * 0.8)], tokenizer.end_of_text]
        val += [*ids[int(len(ids) * 0.8) :], tokenizer.end_of_text]
    assert (tokens.train.tolist(), tokens.val.tolist()) == (train, val)
    assert isinstance(tokens.tokenizer, HFTokenizer)
    assert tokens.tokenizer.digest == tokenizer.digest


def test_threads_give_the_ids_of_one_thread(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 500)
    folder, found = samples.write("llama2_like", tmp_path / "tok"), []
    for cores in (1, 8):
        monkeypatch.setattr(module, "usable_cores", lambda cores=cores: cores)
        found.append(prepare([texts], tmp_path / f"out{cores}", DataConfig(tokenizer=str(folder))))
    assert found[0].digest == found[1].digest
    monkeypatch.setattr(huggingface, "FAST_FROM", 0)
    byte_level = [
        prepare([texts], tmp_path / "a", DataConfig(tokenizer=str(samples.write("gpt2_like", tmp_path / "g"))))
    ]
    monkeypatch.setattr(huggingface, "FAST_FROM", 1 << 60)
    byte_level += [prepare([texts], tmp_path / "b", DataConfig(tokenizer=str(tmp_path / "g")))]
    assert byte_level[0].digest == byte_level[1].digest


def _prepare(texts: Path, folder: Path, out: Path) -> None:
    prepare([texts], out, DataConfig(tokenizer=str(folder)))


def test_processes_give_the_same_ids(texts: Path, tmp_path: Path) -> None:
    folder = samples.write("gpt2_like", tmp_path / "tok")
    ours = prepare([texts], tmp_path / "ours", DataConfig(tokenizer=str(folder)))
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used threads is not safe
    workers = [context.Process(target=_prepare, args=(texts, folder, tmp_path / f"w{n}")) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert {open_tokens(tmp_path / f"w{n}").digest for n in range(2)} == {ours.digest}


def test_prepared_tokens_keep_their_tokenizer(texts: Path, tmp_path: Path, cache: Path) -> None:
    folder = samples.write("llama3_like", tmp_path / "tok")
    tokens = prepare([texts], tmp_path / "out", DataConfig(tokenizer=str(folder)))
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["tokenizer"].keys() == {
        "kind", "vocab_size", "digest", "end_of_text"
    }  # fmt: skip
    (folder / "tokenizer.json").unlink()
    again = open_tokens(tmp_path / "out")
    assert again.tokenizer.decode(again.val) == tokens.tokenizer.decode(tokens.val)
    # The folder itself can be named as the tokenizer.
    assert load_tokenizer(str(tmp_path / "out")).digest == tokens.tokenizer.digest
    samples.write("qwen_like", tmp_path / "out")
    with pytest.raises(InputError, match=r"meta\.json: .*is not the one that the tokens were made with"):
        open_tokens(tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"out/tokenizer\.json cannot be read"):
        open_tokens(tmp_path / "out")


def test_the_cache_is_by_the_tokenizers_content(texts: Path, tmp_path: Path, cache: Path) -> None:
    one, other = samples.write("gpt2_like", tmp_path / "one"), samples.write("gpt2_like", tmp_path / "other")
    data = DataConfig(input_file=str(texts), tokenizer=str(one))
    first = prepare_cached(data)
    assert prepare_cached(data.changed(tokenizer=str(other / "tokenizer.json"))).path == first.path
    samples.write("llama3_like", other)
    assert prepare_cached(data.changed(tokenizer=str(other))).path != first.path
    assert prepare_cached(data.changed(end_of_text="Ġt")).path != first.path
    samples.write("llama3_like", first.path)  # damage in the cache is repaired
    assert prepare_cached(data).digest == first.digest


@pytest.mark.parametrize("count", [65_536, 65_537, 70_000])
def test_large_vocabularies_are_stored_in_32_bits(
    count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = samples.words(count, tmp_path / "tok")
    numbers = [1, count - 1, 2, count - 2, 300] * 40
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in numbers))
    words = ["--tokenizer", str(folder), "--out", str(tmp_path / "out")]
    assert main(["data", "prepare", str(tmp_path / "text.txt"), *words]) == 0
    tokens = open_tokens(tmp_path / "out")
    kind = "uint16" if count == 65_536 else "uint32"
    assert tokens.meta["dtype"] == tokens.train.dtype.name == dtype_for(count).name == kind
    assert [*tokens.train.tolist()[:-1], *tokens.val.tolist()[:-1]] == numbers
    assert (tmp_path / "out" / "train.bin").stat().st_size == len(tokens.train) * tokens.train.dtype.itemsize
    assert np.asarray(tokens.train).dtype == tokens.train[3:5].dtype == tokens.train.dtype
    inputs, targets = cut_windows(tokens.train, WindowSampler(len(tokens.train), 8, 0).starts(0, 4), 8)
    assert inputs.max() == count - 1
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    tokens.check_vocabulary(count)
    with pytest.raises(
        InputError, match=rf"holds id {count - 1} at token offset 1, outside the vocabulary of {count - 1}"
    ):
        tokens.check_vocabulary(count - 1)
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dtype"], facts["vocab_size"], facts["tokenizer"]) == (kind, count, "hf")
    assert facts["padded_vocab_size"] % 128 == 0


@pytest.fixture
def wide(tmp_path: Path) -> TokenSet:
    """Tokens of 32 bits: 900 ids and the end of text for training."""
    folder = samples.words(70_000, tmp_path / "tok")
    (tmp_path / "text.txt").write_text(" ".join(f"w{60_000 + number}" for number in range(1000)))
    return prepare([tmp_path / "text.txt"], tmp_path / "out", DataConfig(tokenizer=str(folder)))


def test_damage_of_wide_files_is_located_in_tokens(wide: TokenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wide.path / "train.bin"
    content = path.read_bytes()
    path.write_bytes(content[:401])
    with pytest.raises(
        InputError, match=r"holds 401 bytes where its meta\.json says 3604: it was cut short at token offset 100"
    ):
        open_tokens(wide.path)
    path.write_bytes(content[:-8] + b"\1" * 8)
    with pytest.raises(InputError, match="has changed since, first between token offsets 0 and 1048576"):
        open_tokens(wide.path).check_contents()


def test_a_wide_file_that_becomes_shorter_is_an_error_of_one_line(wide: TokenSet) -> None:
    os.truncate(wide.path / "train.bin", 800)
    assert wide.train[199] == 60_199
    with pytest.raises(RunError, match=r"had 901 tokens when it was opened and has 200 now"):
        wide.train[198:202]
    assert StoredTokens.of_file(wide.path / "train.bin", dtype_for(70_000)).tolist()[:2] == [60_000, 60_001]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "tokenizer.model").write_text("x"), "holds a SentencePiece model"),
        (lambda folder: None, "is a folder without a tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text(samples.content("wordpiece")), "has no eos_token"),
        (lambda folder: (folder / "tokenizer.json").mkdir(), "cannot be read: Is a directory"),
    ],
)
def test_a_bad_tokenizer_ends_preparation_with_one_line(
    make: object, words: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tok"
    folder.mkdir()
    make(folder)  # type: ignore[operator]
    assert main(["data", "prepare", str(texts), "--out", str(tmp_path / "out"), "--tokenizer", str(folder)]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert str(folder) in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_text_that_the_tokenizer_cannot_encode(texts: Path, tmp_path: Path) -> None:
    values = json.loads((samples.words(5, tmp_path / "tok") / "tokenizer.json").read_text())
    values["model"]["unk_token"] = "<missing>"
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"tokenizer.json cannot encode"):
        prepare([texts], tmp_path / "out", DataConfig(tokenizer=str(tmp_path / "tok")))
    assert not (tmp_path / "out").exists()


def test_settings_of_the_tokenizer_are_checked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"'bite' is not a value of tokenizer.*did you mean byte"):
        DataConfig(tokenizer="bite")
    (tmp_path / "bite").mkdir()
    assert DataConfig(tokenizer="bite").tokenizer == "bite"
    with pytest.raises(InputError, match=r"end_of_text names a token of a tokenizer\.json, and tokenizer is byte"):
        DataConfig(tokenizer="byte", end_of_text="</s>")
