"""A ``tokenizer.json``: the ids that ``tokenizers`` and ``transformers`` give, in pieces and whole, and back to text."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer_samples as samples
from scalegpt.config.tokenizer import parse_tokenizer, vocabulary
from scalegpt.data.tokenizers import HFTokenizer, Tokenizer, huggingface, load_tokenizer
from scalegpt.data.tokenizers.cutting import cut_place
from scalegpt.data.tokenizers.export import tokenizer_files
from scalegpt.data.tokenizers.fast import fast_encoder
from scalegpt.errors import InputError
from tokenizer_samples import BYTE_LEVEL, END, KINDS, TEXT

library = pytest.importorskip("tokenizers")


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return samples.write(request.param, tmp_path / request.param)


def load(kind: str, tmp_path: Path) -> HFTokenizer:
    return load_tokenizer(str(samples.write(kind, tmp_path / kind)))


def test_transformers_gives_the_same_ids(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours = load_tokenizer(str(folder))
    for text in (TEXT, samples.PROSE, "", "x", "  two  spaces", "\n\n"):
        assert ours.encode(text).tolist() == other(text, add_special_tokens=False)["input_ids"]
    assert ours.vocab_size == len(other)
    assert ours.padded_vocab_size == -(-len(other) // 128) * 128


def test_pieces_have_the_ids_of_the_whole_text(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    whole = tokenizer.encode(TEXT).tolist()
    for size in (500, 700):
        kept, before, ids, pieces = "", "", list[int](), 0
        for first in range(0, len(TEXT), size):
            kept += TEXT[first : first + size]
            place = cut_place(kept) if first + size < len(TEXT) else len(kept)
            if place:
                ids += tokenizer.encode_after(before, kept[:place]).tolist()
                before, kept, pieces = kept[:place], kept[place:], pieces + 1
        assert pieces > 5
        assert ids == whole


def test_a_stream_gives_the_text_that_decoding_at_once_gives(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer.encode(TEXT).tolist()
    for some in (ids, ids[5:9], ids[::-1], []):
        stream = tokenizer.stream()
        assert "".join(stream.push(token) for token in some) + stream.finish() == tokenizer.decode(some)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(max_examples=60, deadline=None)
def test_byte_level_round_trip(kind: str, text: str) -> None:
    tokenizer = HFTokenizer({"tokenizer.json": samples.content(kind).encode()})
    if kind == "qwen_like":  # it composes characters first
        import unicodedata

        text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.text("a'sS 1²\n\r\té.", max_size=60))
@settings(max_examples=100, deadline=None)
def test_tiktoken_gives_the_same_ids(kind: str, text: str) -> None:
    content = samples.content(kind).encode()
    document, theirs = parse_tokenizer(content), huggingface.library_of(content)
    encoder = fast_encoder(document, vocabulary(document), theirs)
    assert encoder is not None
    found = encoder.encode(text)
    assert found is None or found.tolist() == theirs.encode(text, add_special_tokens=False).ids
    assert found is not None or kind == "qwen_like"


def test_tiktoken_is_used_only_where_its_ids_are_known_to_be_equal(tmp_path: Path) -> None:
    def encoder(change: object = None, kind: str = "gpt2_like") -> object:
        values = json.loads(samples.content(kind))
        if callable(change):
            change(values)
        theirs = library.Tokenizer.from_str(json.dumps(values))
        return fast_encoder(values, vocabulary(values), theirs)

    assert encoder() is not None
    assert all(encoder(kind=kind) is None for kind in KINDS if kind not in BYTE_LEVEL)
    assert encoder(lambda values: values.update(normalizer={"type": "Lowercase"})) is None
    assert encoder(lambda values: values["pre_tokenizer"].update(add_prefix_space=True)) is None
    assert encoder(lambda values: values["pre_tokenizer"].update(use_regex=False)) is None
    assert encoder(lambda values: values["model"].update(dropout=0.1)) is None
    assert encoder(lambda values: values["model"]["vocab"].update(unreachable=600)) is None
    # A merge that is never done, since an earlier one takes its letter away: tiktoken would take the word as it is.
    listed = json.loads(samples.content("gpt2_like"))["model"]["merges"]
    merges = [pair if isinstance(pair, list) else pair.split() for pair in listed]
    first, second = next(pair for pair in merges if "".join(pair).isalpha() and "".join(pair).isascii())

    def misled(values: dict[str, Any]) -> None:
        values["model"]["vocab"].update({f"q{first}": 600, f"q{first}{second}": 601})
        values["model"]["merges"] += [["q", first], [f"q{first}", second]]

    assert encoder(misled) is None


def test_long_texts_have_the_same_ids_by_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load("llama3_like", tmp_path)
    slow = tokenizer.encode(TEXT).tolist()
    monkeypatch.setattr(huggingface, "FAST_FROM", 0)
    monkeypatch.setattr(tokenizer, "_arrays", None)  # the package is not asked
    assert tokenizer.encode(TEXT).tolist() == slow
    monkeypatch.undo()
    monkeypatch.setattr(huggingface, "FAST_FROM", 0)
    blanks = "a" + " " * 400_000 + "b"  # overflows the stack of tiktoken's regular expressions
    assert tokenizer.decode(tokenizer.encode(blanks)) == blanks


def test_special_tokens_in_a_text_are_ordinary_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load("gpt2_like", tmp_path)
    for fast_from in (1 << 30, 0):
        monkeypatch.setattr(huggingface, "FAST_FROM", fast_from)
        ids = tokenizer.encode(f"a{END}b")
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == f"a{END}b"


def test_added_tokens_that_are_not_special_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads(samples.content("gpt2_like"))
    values["added_tokens"].append({**values["added_tokens"][0], "id": 600, "content": "é  x", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == 601
    for fast_from in (1 << 30, 0):
        monkeypatch.setattr(huggingface, "FAST_FROM", fast_from)
        ids = tokenizer.encode("aé  xb").tolist()
        assert 600 in ids
        assert tokenizer.decode(ids) == "aé  xb"


def test_ids_outside_the_vocabulary_and_halves_of_pairs(tmp_path: Path) -> None:
    tokenizer = load("gpt2_like", tmp_path)
    assert tokenizer.decode([600, 60_000]) == "��"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"


# --- the token that ends documents --------------------------------------------------------------------------------------


def test_end_of_text_is_found_where_it_is_named(tmp_path: Path) -> None:
    def found(beside: dict[str, object], end: str | None = None, kind: str = "llama2_like") -> tuple[str, int | None]:
        for old in tmp_path.glob("*.json"):
            old.unlink()
        (tmp_path / "tokenizer.json").write_text(samples.content(kind))
        for name, values in beside.items():
            (tmp_path / name).write_text(json.dumps(values))
        made = load_tokenizer(str(tmp_path), end)
        assert json.loads(tokenizer_files(made).get("tokenizer_config.json", b"{}")).get("eos_token") in (
            made.end_token, {"content": made.end_token}, None
        )  # fmt: skip
        again = HFTokenizer(made.files)
        assert (again.end_token, again.digest) == (made.end_token, made.digest)
        return made.end_token, made.end_of_text

    assert found({}) == ("</s>", 2)
    assert found({"tokenizer_config.json": {"eos_token": "<s>"}}) == ("<s>", 1)
    assert found({"tokenizer_config.json": {"eos_token": {"content": "<s>"}}}) == ("<s>", 1)
    assert found({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<s>"}}) == ("<s>", 1)
    assert found({"tokenizer_config.json": {"eos_token": "<s>"}}, "</s>") == ("</s>", 2)
    assert found({"tokenizer_config.json": {"eos_token": None}}, "<0x0A>")[0] == "<0x0A>"


def test_no_end_of_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(samples.content("wordpiece"))
    with pytest.raises(InputError, match=r"has no eos_token .* --end_of_text TOKEN; its special tokens are .*SEP"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match=r"has no token '<eos>'"):
        load_tokenizer(str(tmp_path), "<eos>")
    assert load_tokenizer(str(tmp_path), "[SEP]").end_of_text == 1
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"has a tokenizer_config.json beside it that is not JSON"):
        load_tokenizer(str(tmp_path), "[SEP]")


def test_a_file_of_another_name_does_not_take_what_lies_beside_it(tmp_path: Path) -> None:
    samples.write("llama2_like", tmp_path, "<s>").joinpath("tokenizer.json").rename(tmp_path / "other.json")
    made = load_tokenizer(str(tmp_path / "other.json"))
    assert made.end_token == "</s>"


# --- kept with what is made by it ---------------------------------------------------------------------------------------


def test_a_description_holds_the_whole_tokenizer(folder: Path, tmp_path: Path) -> None:
    made = load_tokenizer(str(folder))
    values = json.loads(json.dumps(made.as_dict()))
    for path in folder.iterdir():
        path.unlink()
    again = Tokenizer.from_dict(values)
    assert isinstance(again, HFTokenizer)
    assert (again.digest, again.end_of_text) == (made.digest, made.end_of_text)
    assert again.encode(TEXT).tolist() == made.encode(TEXT).tolist()
    assert dict(again.files) == dict(made.files)
    without = {key: value for key, value in values.items() if key != "files"}
    with pytest.raises(InputError, match="lacks its files"):
        Tokenizer.from_dict(without)
    for name, content in made.files.items():
        (tmp_path / name).write_bytes(content)
    assert Tokenizer.from_dict(without, tmp_path).digest == made.digest
    samples.write("gpt2_like" if folder.name != "gpt2_like" else "qwen_like", tmp_path)
    with pytest.raises(InputError):
        Tokenizer.from_dict(without, tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"files": []}, {"files": {}}, {"files": {"tokenizer.json": "!"}}, {"files": {"tokenizer.json": 3}},
        {"end_of_text": 7},        {"files": {"tokenizer.json": "eJw="}}, {"end_of_text": "<none>"}, {"digest": "0" * 64},
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(damage: dict[str, object], tmp_path: Path) -> None:
    values = load("gpt2_like", tmp_path).as_dict()
    with pytest.raises(InputError) as raised:
        Tokenizer.from_dict({**values, **damage})
    assert "\n" not in str(raised.value)


def test_transformers_loads_the_files_that_are_kept(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = load_tokenizer(str(folder))
    for name, content in tokenizer_files(made).items():
        (tmp_path / name).write_bytes(content)
    other = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert other(TEXT, add_special_tokens=False)["input_ids"] == made.encode(TEXT).tolist()
    assert other.eos_token_id == made.end_of_text


# --- what cannot be used ------------------------------------------------------------------------------------------------

BAD = {
    "empty": ("", "is not JSON"),
    "not JSON": ("{", "is not JSON"),
    "a list": ("[]", "no object 'model'"),
    "deep": ("[" * 100_000, "nests too deep|is not JSON"),
    "no vocabulary": ('{"model": {}}', "has no vocabulary"),
    "odd ids": ('{"model": {"vocab": {"a": "1"}}}', "has no vocabulary"),
    "negative ids": ('{"model": {"vocab": {"a": -1}}}', "has no vocabulary"),
    "huge ids": ('{"model": {"vocab": {"a": 10000000000}}}', "has no vocabulary"),
    "odd added tokens": ('{"model": {"vocab": {"a": 1}}, "added_tokens": [3]}', "has no vocabulary"),
    "unknown model": (
        '{"model": {"type": "Foo", "vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "</s>", "special": true}]}',
        "is not a tokenizer.json that the package tokenizers reads",
    ),
    "a merge of nothing": (
        '{"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": ["a b"]},'
        ' "added_tokens": [{"id": 1, "content": "</s>", "special": true}]}',
        "is not a tokenizer.json that the package tokenizers reads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_malformed_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, words = BAD[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words) as raised:
        load_tokenizer(str(tmp_path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "is a folder without a tokenizer.json"),
        (("tokenizer.model",), r"holds a SentencePiece model \(tokenizer.model\) and no tokenizer.json; make one with"),
        (("vocab.json", "merges.txt"), r"holds the older vocab.json \(vocab.json\)"),
    ],
)
def test_folders_without_the_file_are_refused(names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=words):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match=r"does not exist; give gpt2, byte, char, or the path of a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "missing"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = samples.write("gpt2_like", tmp_path) / "tokenizer.json"
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        load_tokenizer(str(tmp_path))


def test_random_damage_is_an_input_error_or_harmless(tmp_path: Path) -> None:
    content, random = samples.content("llama2_like").encode(), np.random.default_rng(0)
    refused = []
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 3):
            damaged[place] = int(random.integers(32, 127))
        (tmp_path / "tokenizer.json").write_bytes(bytes(damaged))
        try:
            load_tokenizer(str(tmp_path)).encode("The cat")
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert not [each for each in refused if "\n" in each]


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path) -> None:
    folder = samples.write("gpt2_like", tmp_path / "tok")
    (tmp_path / "a.txt").write_text("some text " * 100)
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from scalegpt.cli.main import main\n"
        f"sys.exit(main(['data', 'prepare', {str(tmp_path / 'a.txt')!r}, '--out', {str(tmp_path / 'o')!r}, "
        f"'--tokenizer', {str(folder)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs the package tokenizers: pip install 'scalegpt[hf]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_bytes_without_a_token_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = json.loads(samples.content("gpt2_like"))
    del values["model"]["vocab"]["Ā"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    load_tokenizer(str(tmp_path))
    assert "has no token for 1 of the 256 bytes" in caplog.text
