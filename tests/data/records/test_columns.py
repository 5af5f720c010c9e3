"""Parquet and Arrow, written by pyarrow; and folders saved by the package datasets."""

import json
from pathlib import Path
from typing import Any

import pytest

from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare
from scalegpt.data.text.corpus import Corpus, survey
from scalegpt.data.text.reading import read_documents
from scalegpt.errors import InputError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow has no Parquet")

TEXTS = ["one", "zwei\nLinien", "drei — 😀", "a \0 b", "x" * 3000] * 60


def documents(corpus: Corpus) -> list[str]:
    return [piece.text for source in corpus.sources for piece in read_documents(source)]


def write_stream(table: Any, path: Path, rows: int | None = None) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_file(table: Any, path: Path, rows: int | None = None, **options: Any) -> Path:
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer,
    ):
        writer.write_table(table, max_chunksize=rows)
    return path


def write_parquet(table: Any, path: Path, rows: int | None = None, **options: Any) -> Path:
    pq.write_table(table, path, row_group_size=rows, **options)
    return path


WRITERS = [write_stream, write_file, write_parquet]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("rows", [None, 7])
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "string_view"])
def test_texts_of_every_type_are_read_in_order(tmp_path: Path, write: Any, rows: int | None, kind: str) -> None:
    types = {"string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view()}
    column = pa.array(TEXTS).dictionary_encode() if kind == "dictionary" else pa.array(TEXTS).cast(types[kind])
    table = pa.table({"id": range(len(TEXTS)), "text": column, "more": [["a", "b"]] * len(TEXTS)})
    try:
        path = write(table, tmp_path / "d", rows)
    except pa.ArrowNotImplementedError as error:  # older releases write no views to Parquet
        pytest.skip(f"pyarrow {pa.__version__}: {error}")
    corpus = survey([path], "utf-8")
    assert documents(corpus) == TEXTS
    (source,) = corpus.sources
    assert (source.documents, source.text_bytes) == (len(TEXTS), len("".join(TEXTS).encode()))
    assert source.form == ("Parquet" if write is write_parquet else "Arrow")
    reads = [piece.read for piece in read_documents(source)]
    assert reads == sorted(reads)
    assert reads[-1] <= source.bytes


@pytest.mark.parametrize("write", WRITERS)
def test_nested_fields_nulls_and_empty_texts(tmp_path: Path, write: Any) -> None:
    rows = [{"text": "a"}, None, {"text": None}, {"text": ""}, {"text": "b"}]
    table = pa.table(
        {"doc": pa.array(rows, pa.struct([("text", pa.string()), ("n", pa.int64())])), "content": [""] * 5}
    )
    path = write(table, tmp_path / "d")
    found = survey([path], "utf-8", text_field="doc.text")
    assert documents(found) == ["a", "b"]
    assert found.skipped.counts == {"record without text": 3}
    with pytest.raises(InputError, match="has 5 records, all without text"):
        survey([path], "utf-8")


@pytest.mark.parametrize("write", WRITERS)
def test_columns_that_do_not_help(tmp_path: Path, write: Any) -> None:
    path = write(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "d")
    with pytest.raises(InputError, match="the schema: column text is int64, not text"):
        survey([path], "utf-8")
    # Such a file cannot be read as it is written, so --as_text is no remedy.
    with pytest.raises(
        InputError, match=r"without a field other in its first record, which has text, body; .*_field\)$"
    ):
        survey([path], "utf-8", text_field="other")
    assert documents(survey([path], "utf-8", text_field="body")) == ["a", "b"]
    path = write(pa.table({"text": pa.array([b"a"])}), tmp_path / "d")
    with pytest.raises(InputError, match="column text is binary, not text"):
        survey([path], "utf-8")


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_files(tmp_path: Path, codec: str) -> None:
    table = pa.table({"text": TEXTS})
    for path in (
        write_file(table, tmp_path / "d.arrow", compression=codec),
        write_parquet(table, tmp_path / "d.parquet", compression=codec, use_dictionary=False, data_page_version="2.0"),
    ):
        assert documents(survey([path], "utf-8")) == TEXTS


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    for write in WRITERS:
        path = write(pa.table({"text": ["good text", "more text"]}), tmp_path / "d")
        content = path.read_bytes()
        assert b"more text" in content
        path.write_bytes(content.replace(b"more text", b"more\xfftext"))
        with pytest.raises(InputError, match=r"is damaged (Parquet|Arrow): .*; get an undamaged copy"):
            survey([path], "utf-8")


@pytest.mark.parametrize("write", WRITERS)
def test_a_cut_file_is_refused(tmp_path: Path, write: Any) -> None:
    path = write(pa.table({"text": TEXTS}), tmp_path / "d", 50)
    content = path.read_bytes()
    for size in (12, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"is damaged (Parquet|Arrow)") as caught:
            survey([path], "utf-8")
        assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(pa.table({"text": TEXTS}), tmp_path / "d.parquet")
    (tmp_path / "a.txt").write_text("text " * 9999)
    monkeypatch.setattr("scalegpt.data.text.corpus.lacks_package", lambda form: form == "Parquet")
    with pytest.raises(InputError, match=r"d\.parquet: .*pip install 'scalegpt\[data\]'"):
        survey([path], "utf-8")
    assert str(survey([tmp_path], "utf-8").skipped) == "1 Parquet (d.parquet)"


def test_memory_is_that_of_a_few_rows(tmp_path: Path) -> None:
    """Of a file in one row group, pyarrow never holds more than pages and some rows."""
    text = "words of a text " * 250
    table = pa.table({"text": [f"{number}{text}" for number in range(20_000)]})  # 80 MB
    path = write_parquet(table, tmp_path / "d.parquet", use_dictionary=False, compression="none")
    del table
    (source,) = survey([path], "utf-8").sources
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_documents(source):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 16e6


# --- folders saved by datasets -----------------------------------------------------------------------------------------


def save(folder: Path, parts: list[list[str]]) -> Path:
    """A data set as ``save_to_disk`` of datasets 4 writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, texts in zip(names, parts, strict=True):
        write_stream(pa.table({"text": texts}), folder / name)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    return folder


def save_splits(folder: Path, splits: dict[str, list[list[str]]]) -> Path:
    for name, parts in splits.items():
        save(folder / name, parts)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", [["a", "b"], ["c"]])
    assert documents(survey([folder], "utf-8")) == ["a", "b", "c"]
    (tmp_path / "README.md").write_text("what this is\n")
    assert documents(survey([tmp_path], "utf-8")) == ["what this is\n", "a", "b", "c"]
    (folder / "data-00009-of-00009.arrow").write_bytes(b"not listed")
    assert documents(survey([folder], "utf-8")) == ["a", "b", "c"]


def test_of_several_splits_train_is_read(tmp_path: Path) -> None:
    folder = save_splits(tmp_path / "set", {"test": [["t"]], "train": [["a"], ["b"]]})
    found = survey([folder], "utf-8")
    assert documents(found) == ["a", "b"]
    assert str(found.skipped) == "1 other split of a saved data set (test)"
    assert documents(survey([folder / "test"], "utf-8")) == ["t"]
    assert documents(survey([save_splits(tmp_path / "one", {"test": [["t"]]})], "utf-8")) == ["t"]
    other = save_splits(tmp_path / "other", {"test": [["t"]], "dev": [["d"]]})
    with pytest.raises(InputError, match="without a split train; name the folder of one of its splits: test, dev"):
        survey([other], "utf-8")


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ("{", "state.json is damaged"),
        ('{"_data_files": 5}', "state.json is damaged"),
        ('{"_data_files": []}', "state.json is damaged"),
        ('{"_data_files": [{"filename": "../../secret.arrow"}]}', "state.json is damaged"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "saved data set without its gone.arrow"),
        (
            '{"_data_files": [{"filename": "a"}], "_indices_data_files": [{"filename": "b"}]}',
            "is a selection of a data set",
        ),
    ],
)
def test_a_damaged_saved_data_set_is_refused(tmp_path: Path, state: str, what: str) -> None:
    folder = save(tmp_path / "set", [["a"]])
    (folder / "state.json").write_text(state)
    with pytest.raises(InputError, match=what):
        survey([folder], "utf-8")


def test_the_cache_of_datasets_is_refused_where_it_lies(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", [["a"]])
    (folder / "state.json").unlink()
    with pytest.raises(InputError, match="is part of the cache of Hugging Face datasets"):
        survey([folder], "utf-8")
    (tmp_path / "a.txt").write_text("text")
    assert str(survey([tmp_path], "utf-8").skipped) == "1 cache of datasets (set)"


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    data = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert documents(survey([tmp_path / "one"], "utf-8")) == TEXTS
    chosen = data.select([4, 2, 0])
    datasets.DatasetDict({"train": chosen, "test": data}).save_to_disk(tmp_path / "two")
    assert documents(survey([tmp_path / "two"], "utf-8")) == [TEXTS[4], TEXTS[2], TEXTS[0]]


def test_a_data_set_by_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_parquet(pa.table({"text": TEXTS}), tmp_path / "set" / "train-00000-of-00001.parquet")
    write_parquet(
        pa.table({"text": [f"words of {number}" for number in range(30)]}),
        tmp_path / "set" / "test-00000-of-00001.parquet",
    )
    made = prepare([f"hf://{tmp_path}/set"], tmp_path / "out", DataConfig(tokenizer="byte"))
    assert made.meta["documents"] == len(TEXTS)
    made = prepare([f"hf://{tmp_path}/set:test"], tmp_path / "out2", DataConfig(tokenizer="byte"))
    assert made.meta["documents"] == 30
    with pytest.raises(InputError, match=r"hf://.*set:dev cannot be loaded: ") as caught:
        prepare([f"hf://{tmp_path}/set:dev"], tmp_path / "out3", DataConfig(tokenizer="byte"))
    assert "\n" not in str(caught.value)
