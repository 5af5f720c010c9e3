"""CSV and TSV: quotes, line ends in fields, delimiters, and rows that cannot be read."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegpt.data.text import packed
from scalegpt.data.text.corpus import survey
from scalegpt.data.text.packed import InputFile
from scalegpt.data.text.reading import read_documents
from scalegpt.data.text.records import base, tables
from scalegpt.data.text.records.base import TextField
from scalegpt.errors import InputError

CELLS = st.text(st.sampled_from([*"ab,;\t|\"' \n\r", "é", "\u2028", "\x0c"]), max_size=12)


def texts(path: Path, field: str | None = None) -> list[str]:
    (source,) = survey([path], "utf-8", text_field=field).sources
    return [piece.text for piece in read_documents(source)]


@given(rows=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1), delimiter=st.sampled_from(",;\t|"))
@settings(max_examples=200, deadline=None)
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], delimiter: str
) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([("id", "text", "note"), *rows])
    path = tmp_path_factory.mktemp("csv") / "d.csv"
    path.write_bytes(stream.getvalue().encode())
    with InputFile(path) as file:
        assert list(tables.read_csv(file, "utf-8", TextField(None))) == [row[1] for row in rows]


def test_header_decides_column_and_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbf\n"text";label\r\n"one, and\r\ntwo";1\r\n\r\n"say ""yes""";2\r\n')
    assert texts(path) == ["one, and\r\ntwo", 'say "yes"']
    assert texts(path, "label") == ["1", "2"]
    path = tmp_path / "d.tsv"
    path.write_bytes(b"id\tdoc.text\tcontent\n1\ta, b\tc\n")
    assert texts(path, "doc.text") == ["a, b"]
    assert texts(path) == ["c"]


def test_one_column(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('text\none\n"two, three"\n\n""\nlast')
    assert texts(path) == ["one", "two, three", "last"]
    assert survey([path], "utf-8").skipped.counts == {"record without text": 1}


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("a,b,c\n", "line 3: the row has 3 fields, and the header has 2"),
        ("a\n", "line 3: the row has 1 fields, and the header has 2"),
        ('"a\nb",1\n"cut', "line 5: broken CSV: unexpected end of data"),
        ('"a"b,1\n', "line 3: broken CSV: ',' expected after '\"'"),
        ("a\rb,1\n", "line 3: broken CSV: new-line character seen in unquoted field"),
        ("a\0,1\n", "line 3: field text has a NUL character"),
        ('a,1\n"b\n\n\xff",1\n', "line 6: it is not utf-8, at byte offset 26 of the file"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, rows: str, what: str) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"text,label\ngood,1\n" + rows.encode("latin-1"))
    with pytest.raises(InputError, match=rf"d\.csv, {what}") as caught:
        survey([path], "utf-8")
    assert "\n" not in str(caught.value)


def test_headers_that_do_not_help(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(InputError, match="line 1: the header has 2 columns text"):
        survey([path], "utf-8")
    for content in ("a,b\n1,2\n", "\n\n", '"'):
        path.write_text(content)
        with pytest.raises(InputError, match="CSV without a field text or content in its first record"):
            survey([path], "utf-8")
    path.write_text(";".join(f"c{number}" for number in range(12)) + "\n")
    with pytest.raises(InputError, match=r"first record, which has c0, c1, c2, .*, c9 and 2 more; name the field"):
        survey([path], "utf-8")
    path.write_text("text\n")
    with pytest.raises(InputError, match="is empty"):
        survey([path], "utf-8")


def test_long_fields_are_read_and_longer_rows_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "CHUNK_BYTES", 1000)
    path = tmp_path / "d.csv"
    long = "words of a line\n" * 20_000  # more than the csv module's own limit
    path.write_text(f'text\n"{long}"\nlast\n')
    assert "".join(texts(path)) == long + "last"
    for module in (base, tables):
        monkeypatch.setattr(module, "MOST_CHARACTERS", 5000)
    with pytest.raises(InputError, match="line 2: the row has more than 5,000 characters"):
        survey([path], "utf-8")


def test_auto_detects_the_encoding_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    rows = "text,n\n" + "Die Straße war naß und kalt. Früher hörte man schöne Mädchen,1\n".replace(" F", "; F") * 5
    path.write_bytes(rows.encode("latin-1"))
    with pytest.raises(InputError, match="line 2: it is not utf-8"):
        survey([path], "utf-8")
    (source,) = survey([path], "auto").sources
    assert next(read_documents(source)).text.startswith("Die Straße war naß")
