"""Text that is cut or damaged is said to be so, and is never read as something else."""

import codecs
import pickle
import random
from pathlib import Path

import pytest

from scalegpt.data.text import guessing
from scalegpt.data.text.corpus import survey
from scalegpt.data.text.decoding import UnusableTextError
from scalegpt.data.text.reading import read_documents
from scalegpt.errors import InputError

TEXTS = {
    "French": "Le vieux château dominait la vallée. « Où êtes-vous allés ? » demanda la maîtresse. Ça ne leur plaisait "
    "guère, mais ils répondirent : « Là-bas, près du chêne, où coule une rivière. » L'été dernier, Noël semblait "
    "déjà éloigné.\n",
    "Spanish": "El niño corrió hacia la montaña con su pequeño perro. ¿Dónde está el camino?, preguntó mamá. ¡Qué alegría! "
    "Mañana será otro día, y después del almuerzo volverán al jardín.\n",
    "German": "Die Straße war naß und kalt. Früher hörte man schöne Mädchen über Äpfel reden, natürlich in München. Während "
    "der Übung fielen die Blätter; große Vögel flogen über die Dächer.\n",
    "Polish": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Zażółć gęślą jaźń.\n",
    "Turkish": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Güneş ışığı çok güçlüydü.\n",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Ещё вчера шёл дождь.\n",
    "Greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.\n",
    "Hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון.\n",
    "Chinese": "人人生而自由,在尊严和权利上一律平等。今天天气很好，我们一起去公园散步吧。学习语言需要时间和耐心。\n",
    "Japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。\n",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.\n",
    "English": "The café’s menu was naïve at best: “soufflé, crème brûlée, and a résumé of regrets,” she said — "
    "it cost £5.\n",
}

LEGACY = {
    "French": ["latin-1", "cp1252", "mac-roman", "cp850"],
    "Spanish": ["latin-1", "mac-roman", "cp850"],
    "German": ["latin-1", "mac-roman", "cp850"],
    "Polish": ["cp1250", "iso8859-2", "cp852"],
    "Turkish": ["cp1254"],
    "Russian": ["cp1251", "koi8-r", "cp866", "iso8859-5", "mac-cyrillic"],
    "Greek": ["cp1253", "iso8859-7"],
    "Hebrew": ["cp1255"],
    "Chinese": ["gbk", "gb18030"],
    "Japanese": ["shift_jis", "euc-jp"],
    "Korean": ["euc-kr"],
    "English": ["cp1252"],
}


def refusal(path: Path, content: bytes, encoding: str) -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        survey([path], encoding)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def inside_characters(content: bytes) -> list[int]:
    return [place for place in range(len(content)) if content[place] & 0xC0 == 0x80]


@pytest.mark.parametrize("encoding", ["auto", "utf-8"])
@pytest.mark.parametrize("language", TEXTS)
def test_utf8_that_was_cut_inside_a_character(tmp_path: Path, language: str, encoding: str) -> None:
    content = (TEXTS[language] * 2).encode()
    first = next(place for place, byte in enumerate(content) if byte > 127)
    places = [place for place in inside_characters(content) if place > first + 4]
    for place in random.Random(language).sample(places, 30 if len(places) > 30 else len(places)):
        begin = max(each for each in range(place) if content[each] & 0xC0 == 0xC0)
        said = refusal(tmp_path / "a.txt", content[:place], encoding)
        assert f"is UTF-8, cut inside its last character, at byte offset {begin};" in said


@pytest.mark.parametrize("encoding", ["auto", "utf-8"])
@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("bad", [b"\xff", b"\xe9", b"\xc3", b"\x92\x93"])
def test_utf8_with_a_bad_byte(tmp_path: Path, language: str, bad: bytes, encoding: str) -> None:
    text = TEXTS[language] * 2
    for place in random.Random(language).sample(range(1, len(text) - 1), 6):
        before = text[:place].encode()
        said = refusal(tmp_path / "a.txt", before + bad + text[place:].encode(), encoding)
        # The bad byte may be the beginning of a character that the text does not continue.
        assert f"is UTF-8, broken at byte offset {len(before)} (0x{bad[:1].hex()});" in said


@pytest.mark.parametrize("encoding", ["auto", "utf-8"])
@pytest.mark.parametrize("language", TEXTS)
def test_a_line_of_latin_1_in_utf8(tmp_path: Path, language: str, encoding: str) -> None:
    line, text = "Une ligne déjà réécrite en été à l'école.\n".encode("latin-1"), TEXTS[language].encode()
    for content, place in (
        (text + line + text, len(text) + line.index(b"\xe9")),
        (line + text * 2, line.index(b"\xe9")),
    ):
        assert f"is UTF-8, broken at byte offset {place} (0xe9)" in refusal(tmp_path / "a.txt", content, encoding)


def test_the_whole_file_is_in_view(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.txt", b"plain words\n" * 300_000
    path.write_bytes(b"one \xff\n" + plain + TEXTS["French"].encode())
    with pytest.raises(InputError, match=r"UTF-8, broken at byte offset 4 \(0xff\)"):
        survey([path], "auto")
    # Other text of the same size, with the same beginning.
    path.write_bytes(b"un \xe9t\xe9\n" + plain + TEXTS["French"].replace("’", "'").encode("cp1252"))
    assert survey([path], "auto").sources[0].encoding == "iso8859-1"


def test_long_latin_1_behind_utf8_is_not_latin_1(tmp_path: Path) -> None:
    begin, tail = "Été à Noël.\n".encode(), TEXTS["French"].encode("latin-1", "ignore") * 20
    for encoding in ("auto", "utf-8"):
        assert f"broken at byte offset {len(begin) + tail.index(0xE2)} (0xe2)" in refusal(
            tmp_path / "a.txt", begin + tail, encoding
        )


def test_a_byte_order_mark_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for encoding in ("auto", "utf-8"):
        assert "UTF-8, broken at byte offset 6 (0xe9)" in refusal(
            path, codecs.BOM_UTF8 + b"caf\xe9 au lait\n", encoding
        )
        assert "UTF-8, cut inside its last character" in refusal(path, codecs.BOM_UTF8 + b"caf\xc3", encoding)
    path.write_bytes(codecs.BOM_UTF8 + "déjà\n".encode())
    (source,) = survey([path], "auto").sources
    assert (source.encoding, [piece.text for piece in read_documents(source)]) == ("utf-8", ["déjà\n"])
    for mark, codec in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        whole = mark + TEXTS["Russian"].encode(codec)
        path.write_bytes(whole)
        (source,) = survey([path], "auto").sources
        assert "".join(piece.text for piece in read_documents(source)) == TEXTS["Russian"]
        assert "has the byte order mark of utf-16 and is not utf-16" in refusal(path, whole[:-1], "auto")
        assert "--encoding utf-16" in refusal(path, whole, "utf-8")


@pytest.mark.parametrize("content", [b"caf\xe9", b"Voil\xc3", b"one \xe2\x82"])
def test_what_may_be_cut_or_in_another_encoding_is_neither(tmp_path: Path, content: bytes) -> None:
    for encoding in ("auto", "utf-8"):
        said = refusal(tmp_path / "a.txt", content, encoding)
        assert "may end inside a character" in said
        assert "--encoding auto" not in said


@pytest.mark.parametrize(
    "content", [b"5 \xa3\n", b"x \x80 y\n", bytes(range(0x80, 0xFF)), b"\xdf\xea\xe9\xc6\xd8 abc \xfe\n" * 9]
)
def test_what_is_not_sure_is_not_guessed(tmp_path: Path, content: bytes) -> None:
    said = refusal(tmp_path / "a.txt", content, "auto")
    assert "its encoding cannot be detected" in said
    assert "auto" not in refusal(tmp_path / "a.txt", content, "utf-8").replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("language", "encoding"), [(language, each) for language in LEGACY for each in LEGACY[language]]
)
def test_a_guess_is_right_or_is_not_made(language: str, encoding: str) -> None:
    text = TEXTS[language].encode(encoding, "ignore").decode(encoding)
    assert text.encode(encoding).decode(guessing.guess(text.encode(encoding)) or "") == text
    for size in (10, 25, 60):
        for first in range(0, len(text) - size, 9):
            part = text[first : first + size].encode(encoding)
            found = None if part.isascii() else guessing.guess(part)
            assert found is None or part.decode(found) == part.decode(encoding)


def test_in_a_folder_broken_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(TEXTS["French"].encode()[:-30] + b"\xff")
    (tmp_path / "c.txt").write_bytes(b"5 \xa3\n")
    assert str(survey([tmp_path], "auto").skipped) == "1 broken utf-8 (b.txt), 1 in an unknown encoding (c.txt)"


def test_ranks_can_send_each_other_what_is_wrong() -> None:
    error = pickle.loads(pickle.dumps(UnusableTextError("binary", "input a is binary")))
    assert (type(error), error.reason, str(error)) == (UnusableTextError, "binary", "input a is binary")
