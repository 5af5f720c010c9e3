"""Token files that the programs themselves write, where they are installed, are read exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tokenizer_samples as samples
from scalegpt.config import DataConfig
from scalegpt.data.foreign.given import found_at, open_given
from scalegpt.data.prepare import prepare_cached
from scalegpt.data.tokenizers import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_files_that_datatrove_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented pipeline, from JSON Lines and a tokenizer.json to a folder that the trainer reads."""
    pytest.importorskip("datatrove")
    monkeypatch.chdir(tmp_path)
    samples.write("llama3_like", Path("tok"))
    Path("in").mkdir()
    texts = [f"Document {number}: the cat sat on mat {number}." for number in range(60)]
    for part in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part::2]]
        Path(f"in/{part}.jsonl").write_text("".join(lines))
    words = [sys.executable, str(ROOT / "examples/datatrove_tokens.py"), "in", "tok/tokenizer.json", "tokens"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = found_at("tokens")
    assert found is not None
    assert (found.documents, found.tokenizer) == (60, str(tmp_path / "tok/tokenizer.json"))
    data = DataConfig(input_file="tokens", tokenizer=found.tokenizer or "")
    tokens = prepare_cached(data)
    tokens.check_document_ends()
    tokens.check_vocabulary(640)
    tokenizer = load_tokenizer("tok")
    ids = [*tokens.train.tolist(), *tokens.val.tolist()]
    documents = tokenizer.decode(ids).split(samples.END)
    assert documents.pop() == ""
    assert sorted(documents) == sorted(texts)
    expected = [[*map(int, tokenizer.encode(text)), tokenizer.end_of_text] for text in documents]
    assert ids == [token for document in expected for token in document]
    assert tokens.train[len(tokens.train) - 1] == tokenizer.end_of_text
    from datatrove.utils.dataset import DatatroveFolderDataset

    read = DatatroveFolderDataset("tokens", 99, filename_pattern="*.ds", token_size=2)
    for file, part in zip(read.files, found.files, strict=True):
        first = open_given(Path("tokens") / part.part.path.name, data)
        assert file[0]["input_ids"].tolist() == first.train[:100].tolist()


@pytest.mark.parametrize("vocabulary", [257, 70_000])
def test_files_that_megatron_writes(tmp_path: Path, vocabulary: int) -> None:
    module = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    rng, prefix = np.random.default_rng(1), str(tmp_path / "my_text_document")
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin", dtype=module.DType.optimal_dtype(vocabulary))
    for _ in range(200):
        lengths = rng.integers(0, 30, rng.integers(1, 4)).tolist()
        builder.add_document(torch.tensor(rng.integers(0, vocabulary, sum(lengths))), lengths)
    builder.finalize(f"{prefix}.idx")
    written = module.IndexedDataset(prefix)
    tokens, found = open_given(prefix, DataConfig(tokenizer="byte")), found_at(prefix)
    tokens.check_contents()
    assert np.array_equal([*tokens.train[:], *tokens.val[:]], np.concatenate([written[n] for n in range(len(written))]))
    assert found is not None
    ends, documents = found.files[0].ends, written.document_indices
    assert ends is not None
    assert [ends[n] for n in range(200)] == np.cumsum([0, *written.sequence_lengths])[documents[1:]].tolist()
