import codecs
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegpt.data.text import packed, reading
from scalegpt.data.text.corpus import survey
from scalegpt.data.text.diagnosis import diagnose
from scalegpt.data.text.documents import find_documents
from scalegpt.data.text.encodings import codec_name
from scalegpt.data.text.ignoring import Selection
from scalegpt.data.text.reading import read_documents
from scalegpt.data.tokenizers import cutting, make_tokenizer
from scalegpt.data.tokenizers.cutting import cut_place
from scalegpt.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
COMEDY = SHARED / "divine_comedy.txt"

# Text where cutting is delicate: blanks of all kinds, contractions, control characters that Python calls spaces.
DELICATE = st.lists(
    st.sampled_from([*"ab1.' \n\r\t\x1c\x85\xa0\u2003é字😀", "  ", "'s", "\r\n", " \n", "\n\n"]), max_size=40
).map("".join)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def names(inputs):
    return [document.name for document in find_documents(inputs).documents]


def test_folders_are_searched_in_order_without_hidden_files(tmp_path):
    write(tmp_path, {"b.txt": "b", "a/z.py": "z", "a/c.py": "c", ".git/x": "x", "a/.hidden": "h"})
    assert names([tmp_path]) == ["a/c.py", "a/z.py", "b.txt"]


def test_prepared_tokens_inside_a_folder_are_not_text(tmp_path):
    write(tmp_path, {"a.txt": "a", "tokens/train.bin": "x", "tokens/meta.json": "{}"})
    assert names([tmp_path]) == ["a.txt"]
    with pytest.raises(InputError, match="already prepared"):
        find_documents([tmp_path / "tokens"])


def test_a_file_named_twice_is_read_once(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    assert names([tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "a.txt"]) == ["a.txt", "b.txt"]


def test_the_order_of_the_inputs_does_not_matter(tmp_path):
    write(tmp_path, {"1/a.txt": "one", "2/a.txt": "two"})
    first, second = tmp_path / "1", tmp_path / "2"
    assert [s.sha256 for s in survey([first, second], "utf-8").sources] == [
        s.sha256 for s in survey([second, first], "utf-8").sources
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (codecs.BOM_UTF8, "is empty"),
        (b"text\0more", "is binary"),
        (b"\x7fELF\x01\x02\0\xff\xfe", "is binary"),
        (bytes(range(1, 9)) * 20, "is binary"),
        (b"a" * 70000 + b"\0", "is binary"),
        (b"good\nr\xe9sum\xe9 et caf\xe9\n", r"not UTF-8: byte 0xe9 at byte offset 6; .*--encoding auto"),
        (b"cut short \xe2\x82", r"offset 10"),
        (codecs.BOM_UTF16_LE + "hello".encode("utf-16-le"), "--encoding utf-16"),
    ],
)
def test_a_named_file_that_is_not_text(tmp_path, content, words):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        survey([path], "utf-8")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_offsets_behind_the_first_chunk_and_a_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK_BYTES", 7)
    path = tmp_path / "file.txt"
    path.write_bytes(codecs.BOM_UTF8 + "aéé".encode() * 10 + b"\xff")
    with pytest.raises(InputError, match=r"UTF-8, broken at byte offset 53 \(0xff\)"):
        survey([path], "utf-8")


def test_missing_and_special_files(tmp_path):
    with pytest.raises(InputError, match=r"missing\.txt does not exist"):
        survey([tmp_path / "missing.txt"], "utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        survey(["a\0b"], "utf-8")
    with pytest.raises(InputError, match="not a regular file"):
        survey(["/dev/null"], "utf-8")
    with pytest.raises(InputError, match="no input"):
        survey([], "utf-8")


def test_a_weight_where_none_is_taken(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"a\.txt=0\.7 does not exist; weights are for --input_file of train and eval"):
        survey([tmp_path / "a.txt=0.7"], "utf-8")
    with pytest.raises(InputError, match=r"b\.txt=0\.7 does not exist; name a text file"):
        survey([tmp_path / "b.txt=0.7"], "utf-8")


def test_what_is_skipped_of_a_folder_is_counted(tmp_path):
    write(tmp_path, {"a.txt": "good", "b.bin": b"\0\1", "c.txt": "", "d.txt": b"caf\xe9", "e.bin": b"\0"})
    found = survey([tmp_path], "utf-8")
    assert [source.name for source in found.sources] == ["a.txt"]
    assert found.skipped.counts == {"binary": 2, "empty": 1, "not utf-8": 1}
    assert str(found.skipped) == "2 binary (such as b.bin), 1 empty (c.txt), 1 not utf-8 (d.txt)"


def test_a_folder_without_text(tmp_path):
    write(tmp_path, {"some/b.bin": b"\0\1", "more/a.txt": "good", "none/.hidden": "x"})
    with pytest.raises(InputError, match=r"some holds no text.*1 binary \(b\.bin\)"):
        survey([tmp_path / "some"], "utf-8")
    with pytest.raises(InputError, match="none holds no text"):
        survey([tmp_path / "more", tmp_path / "none"], "utf-8")


@pytest.mark.parametrize(
    ("name", "content", "selection", "remedy"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\0", Selection(), "name another folder"),
        (
            "a.txt",
            "perché ".encode("latin-1"),
            Selection(),
            "name another folder, or give its --encoding, or --encoding auto",
        ),
        ("a.txt", b"text", Selection(include="*.md"), "name another folder, or change --include"),
        ("a.txt", b"text", Selection(exclude="a.*"), "name another folder, or change --exclude"),
    ],
)
def test_the_remedy_for_a_folder_without_text(tmp_path, name, content, selection, remedy):
    """Follows from what is in the folder: another encoding does not help where there are only images."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"; {re.escape(remedy)}$"):
        survey([tmp_path], "utf-8", selection=selection)


def test_nested_inputs_count_for_both(tmp_path):
    write(tmp_path, {"a/b/c.txt": "text"})
    assert len(survey([tmp_path, tmp_path / "a" / "b", tmp_path / "a" / ".." / "a"], "utf-8").sources) == 1


@pytest.mark.parametrize("name", ["klingon", "base64", "rot13", "", "a\0b"])
def test_unknown_encodings(tmp_path, name):
    path = write(tmp_path, {"a.txt": "a"}) / "a.txt"
    with pytest.raises(InputError, match="is not known"):
        survey([path], name)


def test_spellings_of_an_encoding_are_one():
    assert codec_name("latin-1") == codec_name("ISO-8859-1") == codec_name("l1")
    assert codec_name("utf8") == codec_name("UTF-8-sig") == "utf-8"
    with pytest.raises(InputError, match="did you mean"):
        codec_name("latin-11")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp1252", "shift_jis", "iso2022_jp", "utf-7"])
def test_any_codec_reads_its_own_text(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(packed, "CHUNK_BYTES", 5)
    text = "café\n" * 9 if encoding == "cp1252" else "日本語 text\n" * 9
    path = write(tmp_path, {"a.txt": text.encode(encoding)}) / "a.txt"
    (source,) = survey([path], encoding).sources
    assert "".join(piece.text for piece in read_documents(source)) == text


def test_bytes_that_the_given_encoding_lacks(tmp_path):
    path = write(tmp_path, {"a.txt": b"caf\x81\n"}) / "a.txt"
    with pytest.raises(InputError, match="not cp1252: byte 0x81 at byte offset 3"):
        survey([path], "cp1252")


def test_codecs_that_make_lone_surrogates_are_refused(tmp_path):
    path = write(tmp_path, {"a.txt": rb"\ud800"}) / "a.txt"
    with pytest.raises(InputError, match="not unicode-escape"):
        survey([path], "unicode_escape")


GERMAN = "Die Straße war naß und kalt. Früher hörte man schöne Mädchen über Äpfel reden, natürlich in München.\n" * 5
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах.\n" * 5
POLISH = "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Zażółć gęślą jaźń.\n" * 5
JAPANESE = "すべての人間は、生まれながらにして自由であり、尊厳と権利とについて平等である。\n" * 5


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "latin-1"),
        (GERMAN + "“Äh – nein”, sagte er.\n", "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (POLISH, "cp1250"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc-jp"),
        (GERMAN, "utf-16"),
        (GERMAN, "utf-8-sig"),
    ],
)
def test_detection_reads_the_text_right(tmp_path, text, encoding):
    path = write(tmp_path, {"a.txt": text.encode(encoding)}) / "a.txt"
    (source,) = survey([path], "auto").sources
    assert "".join(piece.text for piece in read_documents(source)) == text


def test_detection_sees_the_whole_file(tmp_path):
    # The bytes that make it cp1252 are far behind the sample.
    path = write(tmp_path, {"a.txt": GERMAN.encode("latin-1") + b"plain\n" * 60000 + b"\x93quoted\x94\n"}) / "a.txt"
    assert diagnose(path, GERMAN.index("ß")).encoding == "cp1252"


def test_detection_refuses_binary(tmp_path):
    path = write(tmp_path, {"a.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"}) / "a.png"
    with pytest.raises(InputError, match="is binary"):
        survey([path], "auto")


@pytest.mark.skipif(not COMEDY.exists(), reason=f"{COMEDY} is not there")
def test_divine_comedy():
    with pytest.raises(InputError, match=r"divine_comedy.* ISO-8859-1 .*--encoding latin-1, or --encoding auto"):
        survey([COMEDY], "utf-8")
    (source,) = survey([COMEDY], "auto").sources
    text = "".join(piece.text for piece in read_documents(source))
    assert text == COMEDY.read_bytes().decode("latin-1")
    for word in ("ché la diritta via", "Tant' è amara", "più", "così", "virtù", "può"):
        assert word in text


def test_characters_of_all_usable_files(tmp_path):
    write(tmp_path, {"a.txt": "ba", "b.txt": "é😀", "c.bin": "zz\0"})
    assert survey([tmp_path], "utf-8", want_characters=True).characters == "abé😀"


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path):
    path = write(tmp_path, {"a.txt": "before"}) / "a.txt"
    (source,) = survey([path], "utf-8").sources
    path.write_text("after!")
    with pytest.raises(InputError, match="changed while"):
        list(read_documents(source))
    path.unlink()
    with pytest.raises(InputError, match="any more"):
        list(read_documents(source))


@given(before=DELICATE, after=DELICATE)
@settings(max_examples=300, deadline=None)
def test_a_cut_leaves_gpt2_ids_alone(before, after):
    text = before + after
    gpt2, place = make_tokenizer("gpt2"), cut_place(text)
    if place:
        pieces = [gpt2.encode(text[:place]), gpt2.encode(text[place:])]
        assert np.concatenate(pieces).tolist() == gpt2.encode(text).tolist()


def test_cut_places():
    assert cut_place("one two\nthree  four") == 3  # a single space is preferred
    assert cut_place("one\ntwo  three") == 4  # then the place after a single newline
    assert cut_place("one\r\ntwo") == 4
    assert cut_place("one  two") == 4
    assert cut_place("x" + " y" * 5000) == 9999
    assert cut_place("unbroken") == cut_place("one \n") == cut_place(" one") == 0


@pytest.mark.parametrize("line_end", ["\n", "\r\n", " "])
def test_pieces_of_a_real_text(tmp_path, monkeypatch, line_end):
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 2000)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 999)
    text = Path(codecs.__file__).read_text(encoding="utf-8").replace("\n", line_end)
    path = write(tmp_path, {"a.txt": text}) / "a.txt"
    (source,) = survey([path], "utf-8").sources
    pieces = list(read_documents(source))
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) > 10
    assert max(len(piece.text) for piece in pieces) < 4000
    assert pieces[-1].read == source.bytes
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    gpt2 = make_tokenizer("gpt2")
    assert np.concatenate([gpt2.encode(piece.text) for piece in pieces]).tolist() == gpt2.encode(text).tolist()


def test_text_without_a_place_is_cut_at_the_hard_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(cutting, "HARD_LIMIT_CHARACTERS", 400)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 50)
    path = write(tmp_path, {"a.txt": "x" * 1000}) / "a.txt"
    (source,) = survey([path], "utf-8").sources
    assert [len(piece.text) for piece in read_documents(source)] == [400, 400, 200]
