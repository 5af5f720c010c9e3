"""JSON Lines and JSON arrays: each record is a document, and a record that cannot be read is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scalegpt.config import DataConfig
from scalegpt.data.prepare import prepare
from scalegpt.data.text import packed, reading
from scalegpt.data.text.corpus import Corpus, survey
from scalegpt.data.text.reading import read_documents
from scalegpt.data.text.records import base
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.errors import InputError

TEXTS = ["one", "zwei\nLinien", "drei — 😀 \u2028\x85", "a \0 b", " ", "<|endoftext|>"]


def write_lines(path: Path, records: list[Any], end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(record) + end for record in records).encode())
    return path


def documents(corpus: Corpus) -> list[str]:
    """The texts of all documents in order."""
    found, parts = [], []
    for source in corpus.sources:
        for piece in read_documents(source):
            parts.append(piece.text)
            if piece.ends:
                found.append("".join(parts))
                parts = []
        assert not parts
    return found


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_each_line_is_a_document(tmp_path: Path, ascii_only: bool, end: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(
        "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=ascii_only) + end for text in TEXTS), newline=""
    )
    corpus = survey([path], "utf-8")
    assert documents(corpus) == TEXTS
    (source,) = corpus.sources
    assert (source.documents, source.text_bytes) == (len(TEXTS), len("".join(TEXTS).encode()))
    assert (source.form, source.field, source.bytes) == ("JSON Lines", "text", path.stat().st_size)


def test_an_array_of_objects_is_read_as_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.json"
    records = [{"text": text, "more": [{"a": [1, {}]}]} for text in TEXTS]
    for chunk in (3, 1 << 20):
        monkeypatch.setattr(packed, "CHUNK_BYTES", chunk)
        for indent in (None, 2):
            path.write_text(json.dumps(records, indent=indent) + "\n")
            assert documents(survey([path], "utf-8")) == TEXTS


def test_what_is_read_by_its_content_has_any_name_and_may_be_packed(tmp_path: Path) -> None:
    for name in ("d.txt", "d", "d.ndjson", "d.jsonl"):
        assert documents(survey([write_lines(tmp_path / name, [{"text": "a"}, {"text": "b"}])], "utf-8")) == ["a", "b"]
    path = tmp_path / "d.jsonl.gz"
    content = gzip.compress((tmp_path / "d.jsonl").read_bytes())
    path.write_bytes(content + content)  # two members
    (source,) = survey([path], "utf-8").sources
    assert (source.packing, source.documents, source.bytes) == ("gzip", 4, path.stat().st_size)
    assert [piece.text for piece in read_documents(source)] == ["a", "b"] * 2


@pytest.mark.parametrize(
    ("asked", "record", "text"),
    [
        (None, {"text": "yes", "content": "no"}, "yes"),
        (None, {"content": "yes", "body": "no"}, "yes"),
        ("body", {"text": "no", "body": "yes"}, "yes"),
        ("doc.text", {"doc": {"text": "yes"}, "text": "no"}, "yes"),
        ("doc.text", {"doc.text": "yes", "doc": {"text": "no"}}, "yes"),
        ("a.b.c", {"a": {"b": {"c": "yes"}}}, "yes"),
    ],
)
def test_the_field_of_the_text(tmp_path: Path, asked: str | None, record: dict[str, Any], text: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", [record])
    assert documents(survey([path], "utf-8", text_field=asked)) == [text]


def test_all_records_are_read_by_the_field_of_the_first(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"content": "a"}, {"text": "b", "content": "c"}])
    assert documents(survey([path], "utf-8")) == ["a", "c"]
    write_lines(path, [{"content": "a"}, {"text": "b"}])
    with pytest.raises(InputError, match=r"d\.jsonl, line 2: the record has no field content; "):
        survey([path], "utf-8")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "cut', r"broken JSON: Unterminated string starting at, at its character 10"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON: Extra data"),
        (b'{"text": 5}', "field text is 5, not text"),
        (b'{"text": ["a"]}', "field text is a list, not text"),
        (b'{"texts": "a"}', "the record has no field text"),
        (b'["text"]', "the record has no field text: it is a list, not an object"),
        (b'"text"', "the record has no field text: it is 'text', not an object"),
        (rb'{"text": "a\ud83d"}', r"field text has half of a surrogate pair \(\\ud83d\), at its character 2"),
        (b'{"text": "a\xff"}', "it is not utf-8, at byte offset 46 of the file"),
        (b'{"text": "\x01"}', "broken JSON: Invalid control character"),
        (b"[" * 100_000, "broken JSON: it is nested too deep"),
        (b'{"n": ' + b"1" * 5000 + b', "text": "a"}', "broken JSON: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("where", ["named", "in a folder"])
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, line: bytes, what: str, where: str) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "good"}, {"text": "fine"}])
    (tmp_path / "a.txt").write_text("other text\n" * 99)
    path.write_bytes(path.read_bytes() + b"\n" + line + b'\n{"text": "after"}\n')
    with pytest.raises(
        InputError, match=rf"d\.jsonl, line 4: {what}.*; repair it there, or leave the file out"
    ) as caught:
        survey([path if where == "named" else tmp_path], "utf-8")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('[{"text": "a"}, {"text": "b"', "record 2: broken JSON"),
        ('[{"text": "a"}, 7]', "record 2: broken JSON: '7' stands where '{' must"),
        ('[{"text": "a"}, ]', "record 2: broken JSON: ']' stands where '{' must"),
        ('[{"text": "a"} {"text": "b"}]', "record 2: broken JSON: '{' stands where ']' must"),
        ('[{"text": "a"}', "record 2: broken JSON: the file ends where ']' must"),
        ('[{"text": "a"}] x', "record 2: more text follows the end of the array"),
        ('[{"text": "a"}, {"text": 1}]', "record 2: field text is 1, not text"),
    ],
)
def test_a_broken_array_is_refused(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(content)
    with pytest.raises(InputError, match=what.replace("[", r"\[")):
        survey([path], "utf-8")


def test_a_file_without_the_field_is_refused_and_skipped_in_a_folder(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"id": 1}, {"text": "a"}])
    with pytest.raises(
        InputError,
        match=r"JSON Lines without a field text or content in its first record, which has id; .*--text_field.*--as_text true",
    ):
        survey([path], "utf-8")
    with pytest.raises(InputError, match=r"without a field doc\.text in its first record, which has id; name another"):
        survey([path], "utf-8", text_field="doc.text")
    other = write_lines(tmp_path / "words.jsonl", ["words"])
    with pytest.raises(InputError, match=r"without a field text or content in its first record; name the field"):
        survey([other], "utf-8")
    other.unlink()
    (tmp_path / "a.txt").write_text("text\n" * 99)
    found = survey([tmp_path], "utf-8")
    assert [source.name for source in found.sources] == ["a.txt"]
    assert str(found.skipped) == "1 JSON Lines without a field text or content (d.jsonl)"


def test_records_without_text_are_counted_and_skipped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a"}, {"text": ""}, {"text": None}, {"text": "b"}])
    found = survey([path], "utf-8")
    assert (documents(found), found.documents) == (["a", "b"], 2)
    assert str(found.skipped) == "2 record without text (such as d.jsonl)"
    write_lines(path, [{"text": ""}, {"text": None}])
    with pytest.raises(InputError, match="has 2 records, all without text"):
        survey([path], "utf-8")


def test_a_folder_of_documents_and_records(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# What this is\n")
    write_lines(tmp_path / "data.jsonl", [{"text": "a"}, {"text": "b"}])
    found = survey([tmp_path], "utf-8", want_characters=True)
    assert documents(found) == ["# What this is\n", "a", "b"]
    assert found.characters == "".join(sorted(set("# What this is\nab")))
    assert [source.form for source in found.sources] == [None, "JSON Lines"]


def test_as_text_reads_records_as_they_are_written(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a"}, 5])
    assert documents(survey([path], "utf-8", as_text=True)) == ['{"text": "a"}\n5\n']


def test_a_long_record_is_cut_into_pieces_and_a_longer_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 2000)
    monkeypatch.setattr(reading, "_PART_CHARACTERS", 999)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 100)
    text = Path(__file__).read_text()
    path = write_lines(tmp_path / "d.jsonl", [{"text": "first"}, {"text": text}, {"text": "last"}])
    found = survey([path], "utf-8")
    assert documents(found) == ["first", text, "last"]
    (source,) = found.sources
    pieces = list(read_documents(source))
    assert max(len(piece.text) for piece in pieces) < 4000
    gpt2 = make_tokenizer("gpt2")
    ids = np.concatenate([gpt2.encode(piece.text) for piece in pieces[1:-1]])
    assert ids.tolist() == gpt2.encode(text).tolist()
    monkeypatch.setattr(base, "MOST_CHARACTERS", 5000)
    with pytest.raises(InputError, match="line 2: it has more than 5,000 characters"):
        survey([path], "utf-8")


def test_a_file_that_changes_after_the_survey_is_noticed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "a"}, {"text": "b"}])
    (source,) = survey([path], "utf-8").sources
    for content in (b'{"text": "a"}\n{"text": "c"}\n', b'{"text": "a"}\n', b'{"text"', b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="changed while it was read"):
            list(read_documents(source))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "d.jsonl"
    line = json.dumps({"text": "Früher hörte man schöne Mädchen über Äpfel reden, natürlich."}, ensure_ascii=False)
    path.write_bytes((f"{line}\n" * 9).encode(encoding))
    assert documents(survey([path], "auto")) == [json.loads(line)["text"]] * 9
    assert documents(survey([path], encoding)) == [json.loads(line)["text"]] * 9


def test_a_damaged_packing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % number**9 for number in range(99_999)))
    path.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"d\.jsonl\.gz is damaged gzip: it ends too early; get an undamaged copy"):
        survey([path], "utf-8")
    path.write_bytes(content[:-99_999] + b"\xff" * 9 + content[-99_990:])
    with pytest.raises(InputError, match="is damaged gzip: "):
        survey([tmp_path], "utf-8")


def test_end_of_text_follows_every_record(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": text} for text in ("aa", "b", "cc")])
    tokens = prepare([path], tmp_path / "out", DataConfig(tokenizer="byte", val_fraction=0.3))
    end = 256
    assert tokens.train.tolist() == [*b"a", end, *b"b", end, *b"c", end]
    assert tokens.val.tolist() == [*b"a", end, *b"c", end]
    assert tokens.meta["documents"] == 3
