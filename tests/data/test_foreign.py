"""Token files of llm.c, Megatron and datatrove are read as they are: recognised by content, ids exact, nothing copied."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from scalegpt.config import DataConfig
from scalegpt.data.foreign.given import found_at, open_for, open_given
from scalegpt.data.foreign.opening import MOST_VAL_TOKENS, open_found, tokenizer_setting
from scalegpt.data.prepare import prepare, prepare_cached
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.text.documents import find_documents, is_prepared
from scalegpt.data.tokenizers import make_tokenizer
from scalegpt.errors import InputError
from token_files import write_datatrove, write_llmc, write_megatron

BYTES = DataConfig(tokenizer="byte")
END = 256


def documents(count: int = 40) -> list[list[int]]:
    """Documents of 5 to 14 bytes, each with end-of-text after it."""
    return [[*(97 + (number + place) % 26 for place in range(5 + number % 10)), END] for number in range(count)]


def joined(docs: list[list[int]]) -> list[int]:
    return [token for doc in docs for token in doc]


def opened(path: Path, settings: DataConfig = BYTES) -> TokenSet:
    assert is_prepared(path)
    tokens = open_given(path, settings)
    tokens.check_contents()
    tokens.check_vocabulary(257)
    return tokens


# --- llm.c -----------------------------------------------------------------------------------------------------------


def test_shards_of_llmc(tmp_path: Path) -> None:
    ids = list(range(257)) * 4
    for number, name in enumerate(("val_000000", "train_000001", "train_000002", "train_000010")):
        write_llmc(tmp_path / f"fineweb_{name}.bin", ids[number * 257 : (number + 1) * 257])
    (tmp_path / "readme.txt").write_text("what these are")
    tokens = opened(tmp_path)
    assert (tokens.val.tolist(), tokens.train.tolist()) == (list(range(257)), ids[257:])
    assert tokens.origin == "llm.c's 4 files as they are, file with val in the name held out"
    assert tokens.files["val"].path == tmp_path / "fineweb_val_000000.bin"
    assert [part.offset for part in tokens.train.parts] == [1024] * 3


def test_a_file_of_llmc_without_a_held_out_one(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / "edu.bin", list(range(200)))
    tokens = opened(path)
    assert (tokens.train.tolist(), tokens.val.tolist()) == (list(range(180)), list(range(180, 200)))
    assert "last 20 tokens held out" in tokens.origin
    assert opened(path, BYTES.changed(val_fraction=0.5)).val.tolist() == list(range(100, 200))
    assert opened(tmp_path).val.tolist() == tokens.val.tolist()


def test_llmc_names_its_tokenizer(tmp_path: Path) -> None:
    found = found_at(write_llmc(tmp_path / "a.bin", [1, 2, 50256]))
    assert found is not None
    assert tokenizer_setting(found, None) == "gpt2"
    assert tokenizer_setting(found, "byte") == "byte"
    llama = write_llmc(tmp_path / "b.bin", [128000, 1, 127_999, 5], "llama-3")
    found = found_at(llama)
    assert found is not None
    with pytest.raises(
        InputError, match=r"b\.bin holds tokens of llm\.c, which were made by 'Llama 3'; give .*--tokenizer"
    ):
        tokenizer_setting(found, None)
    tokens = open_found(found, make_tokenizer("byte"))
    assert tokens.train.tolist() == [128000, 1, 127_999]
    assert tokens.train.dtype == np.dtype("<u4")
    with pytest.raises(InputError, match=r"b\.bin holds id 128000 at token offset 0, outside the vocabulary of 257"):
        tokens.check_vocabulary(257)
    with pytest.raises(InputError, match="GPT-2 and of Llama 3"):
        open_given(tmp_path, BYTES)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (1, 2, "of llm.c's version 2"), (2, 11, "1,044 bytes and its header says 11 tokens, which need 1,046"),
        (2, -10, "says -10 tokens"), (2, 0, "says 0 tokens"), (0, 20240522, "questions of an evaluation"),
    ],
)  # fmt: skip
def test_headers_of_llmc_that_are_refused(tmp_path: Path, place: int, value: int, words: str) -> None:
    path = write_llmc(tmp_path / "a.bin", range(10))
    with path.open("r+b") as file:
        file.seek(4 * place)
        file.write(struct.pack("<i", value))
    assert is_prepared(path)
    with pytest.raises(InputError, match=words):
        open_given(path, BYTES)


def test_other_files_beside_those_of_llmc(tmp_path: Path) -> None:
    write_llmc(tmp_path / "a.bin", range(100))
    (tmp_path / "gpt2_124M.bin").write_bytes(struct.pack("<i", 20240326) + bytes(100))
    assert len(opened(tmp_path).train) == 90
    (tmp_path / "what.bin").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"what\.bin has no whole header"):
        open_given(tmp_path, BYTES)
    os.truncate(tmp_path / "a.bin", 1000)
    with pytest.raises(InputError, match=r"a\.bin has no whole header"):
        open_given(tmp_path / "a.bin", BYTES)


# --- Megatron --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "int64"])
def test_a_prefix_of_megatron(tmp_path: Path, dtype: str) -> None:
    docs = [[token % 128 for token in doc[:-1]] for doc in documents()]
    prefix = write_megatron(tmp_path / "my_text_document", [[doc[:3], doc[3:]] for doc in docs], dtype)
    ends = np.cumsum([len(doc) for doc in docs])
    for path in (prefix, Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), tmp_path):
        tokens = opened(path)
        assert [*tokens.train.tolist(), *tokens.val.tolist()] == joined(docs)
        assert len(tokens.train) in ends
        assert "from a document's start on" in tokens.origin
    found = found_at(prefix)
    assert found is not None
    assert found.documents == len(docs)
    assert [found.files[0].ends[k] for k in range(len(docs))] == ends.tolist()  # type: ignore[index]
    with pytest.raises(InputError, match="do not say which tokenizer made them; give it with --tokenizer"):
        tokenizer_setting(found, None)


def test_several_prefixes_of_megatron(tmp_path: Path) -> None:
    docs = documents()
    write_megatron(tmp_path / "b_document", [[doc] for doc in docs[20:]])
    write_megatron(tmp_path / "a_document", [[doc] for doc in docs[:20]], "int32")
    tokens = opened(tmp_path)
    assert [*tokens.train.tolist(), *tokens.val.tolist()] == joined(docs)
    write_megatron(tmp_path / "valid_document", [[[1, 2, 3]]])
    tokens = opened(tmp_path)
    assert (tokens.train.tolist(), tokens.val.tolist()) == (joined(docs), [1, 2, 3])
    (tmp_path / "c.bin").write_bytes(bytes(10))
    with pytest.raises(InputError, match=r"c\.bin has no index"):
        open_given(tmp_path, BYTES)


def test_negative_numbers_are_no_ids(tmp_path: Path) -> None:
    for dtype in ("int16", "int32", "int64"):
        tokens = open_given(write_megatron(tmp_path / dtype, [[[1, 2, -3, 4, 5, 6, 7, 8, 9, 10]]], dtype), BYTES)
        with pytest.raises(InputError, match=r"holds id \d+ at token offset 2, outside"):
            tokens.check_vocabulary(10_000_000)


@pytest.mark.parametrize(
    ("offset", "form", "value", "words"),
    [
        (0, "9s", b"TNTIDX\0\0\0", "older format"), (9, "<Q", 2, "version 2 with ids of type 8"),
        (17, "B", 6, "ids of type 6"), (17, "B", 4, "first or last entries"), (18, "<Q", 1 << 60, "says 1,152,921,504"),
        (18, "<Q", 0, "says 0 sequences"), (26, "<Q", 3, "says 2 sequences and 3 bounds"),
        (34, "<i", 4, "sequences do not follow"), (34, "<i", -1, "sequences do not follow"),
        (38, "<i", 7, r"a\.bin has 10 bytes, where its index says 10 tokens"), (38, "<i", -9, "first or last entries"),
        (50, "<q", 5, "first or last entries"), (50, "<q", 8, r"where its index says"), (42, "<q", 2, "do not follow"),
        (58, "<q", 1, "first or last entries"), (66, "<q", 1, "first or last entries"),
    ],
)  # fmt: skip
def test_indices_of_megatron_that_are_refused(
    tmp_path: Path, offset: int, form: str, value: int | bytes, words: str
) -> None:
    write_megatron(tmp_path / "a", [[[1, 2, 3], [4, 5]]])
    with (tmp_path / "a.idx").open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))
    assert is_prepared(tmp_path / "a")
    with pytest.raises(InputError, match=words):
        open_given(tmp_path / "a", BYTES).check_contents()


def test_indices_of_megatron_of_another_size(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[1, 2, 3], [4, 5]]])
    index = tmp_path / "a.idx"
    content = index.read_bytes()
    for size in range(len(content)):
        index.write_bytes(content[:size])
        if size > 9:
            with pytest.raises(InputError):
                open_given(tmp_path / "a", BYTES)
    index.write_bytes(content + bytes(2))
    with pytest.raises(InputError, match="multimodal"):
        open_given(tmp_path / "a", BYTES)
    index.write_bytes(content)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(InputError, match=r"a\.bin is missing"):
        open_given(tmp_path / "a", BYTES)


# --- datatrove -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize(("index", "name"), [(True, "gpt2"), (False, "gpt2"), (True, None)])
def test_a_folder_of_datatrove(tmp_path: Path, width: int, index: bool, name: str | None) -> None:
    docs = documents()
    write_datatrove(tmp_path / "00001_00000_shuffled.ds", docs[25:], name, width, index=index)
    write_datatrove(tmp_path / "00000_00000_shuffled.ds", docs[:25], name, width, index=index)
    write_datatrove(tmp_path / "00002_00000_shuffled.ds", [], name, width, index=index)
    tokens = opened(tmp_path)
    assert [*tokens.train.tolist(), *tokens.val.tolist()] == joined(docs)
    assert tokens.train.dtype.itemsize == width
    assert (tokens.train[len(tokens.train) - 1] == END) or not index
    found = found_at(tmp_path)
    assert found is not None
    assert (found.documents, found.tokenizer) == (40 if index else None, name)
    one = opened(tmp_path / "00000_00000_shuffled.ds")
    assert [*one.train.tolist(), *one.val.tolist()] == joined(docs[:25])


def test_folders_of_datatrove_inside_a_folder(tmp_path: Path) -> None:
    docs = documents()
    for number, name in enumerate(("web", "code/deep", "validation")):
        (tmp_path / name).mkdir(parents=True)
        write_datatrove(tmp_path / name / "0.ds", docs[10 * number : 10 * number + 10])
    (tmp_path / "web/back").symlink_to(tmp_path)
    tokens = opened(tmp_path)
    assert tokens.train.tolist() == joined([*docs[10:20], *docs[:10]])  # in the order of their paths
    assert tokens.val.tolist() == joined(docs[20:30])
    write_datatrove(tmp_path / "9.ds", docs[30:])
    assert len(opened(tmp_path).train) == sum(map(len, [*docs[:20], *docs[30:]]))
    (tmp_path / "web/0.ds.loss").write_bytes(bytes(9))
    with pytest.raises(InputError, match=r"web/0\.ds has a mask of the loss"):
        open_given(tmp_path, BYTES)


def test_tokens_of_datatrove_beside_text_hide_no_text(tmp_path: Path) -> None:
    for name in ("tokens", "text"):
        (tmp_path / name).mkdir()
    write_datatrove(tmp_path / "tokens/0.ds", documents())
    (tmp_path / "text/a.txt").write_text("text")
    assert found_at(tmp_path) is None
    assert [document.name for document in find_documents([tmp_path]).documents] == ["text/a.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root lists every folder")
def test_a_folder_of_datatrove_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    write_datatrove(tmp_path / "0.ds", documents())
    (tmp_path / "more").mkdir(mode=0)
    with pytest.raises(InputError, match="more cannot be read: Permission denied; make it readable"):
        open_given(tmp_path, BYTES)


def test_datatrove_names_its_tokenizer(tmp_path: Path) -> None:
    def setting(name: str | None) -> str:
        found = found_at(write_datatrove(tmp_path / "a.ds", documents(), name))
        assert found is not None
        return tokenizer_setting(found, None)

    (tmp_path / "tokenizer.json").write_text("{}")
    assert setting(str(tmp_path / "tokenizer.json")) == str(tmp_path / "tokenizer.json")
    assert setting("openai-community/gpt2") == "gpt2"
    with pytest.raises(InputError, match="were made by 'HuggingFaceTB/SmolLM2-135M'; give it with --tokenizer"):
        setting("HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(InputError, match="do not say which tokenizer made them"):
        setting("Unknown Tokenizer|2")
    write_datatrove(tmp_path / "b.ds", documents(), "other")
    write_datatrove(tmp_path / "a.ds", documents(), "gpt2")
    with pytest.raises(InputError, match="files of several tokenizers, 'gpt2' and 'other'"):
        found_at(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.ds", bytes(40), r"a\.ds has 40 bytes, where its metadata says 30 tokens of 2"),
        ("a.ds.index", struct.pack("<4Q", 6, 13, 21, 29), r"has 60 bytes, where its index says 29 tokens of 2"),
        ("a.ds.index", struct.pack("<4Q", 6, 13, 2, 30), "do not ascend"),
        ("a.ds.index", bytes(31), "no multiple of 8"), ("a.ds.index", b"", "its index says 0 tokens"),
        ("a.ds.metadata", b"gpt2|3\n30\n", "begins with 'gpt2|3'"), ("a.ds.metadata", b"\xff|2\n30", "not UTF-8"),
        ("a.ds.metadata", b"gpt2|2\nmany", "begins with"), ("a.ds.metadata", b"", "begins with"),
        ("a.ds.metadata", b"gpt2|4\n30\n", "says 30 tokens of 4"), ("a.ds.loss", bytes(30), "mask of the loss"),
    ],
)  # fmt: skip
def test_files_of_datatrove_that_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    write_datatrove(tmp_path / "a.ds", documents(4))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_given(tmp_path, BYTES).check_contents()


def test_a_file_of_datatrove_that_is_lost(tmp_path: Path) -> None:
    for name in ("0.ds", "1.ds"):
        write_datatrove(tmp_path / name, documents())
    (tmp_path / "all.ds.metadata").write_text("gpt2|2\n680\n680 T")  # the merger writes it of all its files
    (tmp_path / "1.ds").unlink()
    with pytest.raises(InputError, match=r"1\.ds is missing; restore it"):
        open_given(tmp_path, BYTES)
    (tmp_path / "1.ds").mkdir()
    with pytest.raises(InputError, match=r"1\.ds cannot be read: Is a directory"):
        open_given(tmp_path, BYTES)
    (tmp_path / "1.ds").rmdir()
    (tmp_path / "1.ds.index").unlink()
    assert len(opened(tmp_path).train) > 300


def test_a_file_of_datatrove_without_anything_beside_it(tmp_path: Path) -> None:
    path = write_datatrove(tmp_path / "a.ds", documents(4), None, index=False)
    with pytest.raises(InputError, match="does not say whether its ids have 2 or 4 bytes"):
        open_given(path, BYTES)
    assert not is_prepared(tmp_path)


# --- what is held out ------------------------------------------------------------------------------------------------


def test_the_tail_is_held_out_from_a_document_on(tmp_path: Path) -> None:
    docs = [[1] * 50, [2] * 30, [3] * 12, [4] * 8]
    path = write_megatron(tmp_path / "a", [[doc] for doc in docs])
    assert opened(path).val.tolist() == [4] * 8
    assert opened(path, BYTES.changed(val_fraction=0.18)).val.tolist() == [3] * 12 + [4] * 8
    assert opened(path, BYTES.changed(val_fraction=0.5)).val.tolist() == [2] * 30 + [3] * 12 + [4] * 8
    whole = write_megatron(tmp_path / "b", [[list(range(100))]])
    tokens = opened(whole)
    assert tokens.val.tolist() == list(range(90, 100))
    assert "cut inside a document" in tokens.origin


def test_a_document_boundary_between_files(tmp_path: Path) -> None:
    for number in range(10):
        write_datatrove(tmp_path / f"{number}.ds", [[number] * 30])
    tokens = opened(tmp_path)
    assert tokens.val.tolist() == [9] * 30
    assert tokens.files["val"].path == tmp_path / "9.ds"


def test_little_of_much_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_llmc(path, [1])
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<i", 10**9))
    os.truncate(path, 1024 + 2 * 10**9)
    assert len(open_given(path, BYTES).val) == MOST_VAL_TOKENS


def test_too_little_to_hold_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 1 tokens, too few to hold some out"):
        open_given(write_llmc(tmp_path / "a.bin", [1]), BYTES)


def test_only_held_out_files(tmp_path: Path) -> None:
    write_llmc(tmp_path / "fineweb_val_000000.bin", [1])
    with pytest.raises(InputError, match="only held-out files"):
        open_given(tmp_path, BYTES)


# --- the rest of the data stage ---------------------------------------------------------------------------------------


def test_equal_tokens_have_equal_digests(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[1] * 45], [[2] * 5]])
    digest = opened(tmp_path).digest
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert opened(tmp_path / "copy").digest == digest
    write_megatron(tmp_path / "a", [[[1] * 45], [[3] * 5]])
    assert opened(tmp_path).digest != digest
    assert prepare_cached(BYTES.changed(input_file=str(tmp_path / "a"))).digest == opened(tmp_path).digest


def test_packing_needs_the_end_of_text(tmp_path: Path) -> None:
    docs = documents()
    opened(write_megatron(tmp_path / "with", [[doc] for doc in docs])).check_document_ends()
    without = opened(write_megatron(tmp_path / "without", [[doc[:-1]] for doc in docs]))
    with pytest.raises(InputError, match=r"\(id 256\), and .*without has none; write it .*--append-eod"):
        without.check_document_ends()


def test_what_is_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(2000))
    (tmp_path / "a.idx").write_bytes(b"index of a book")
    (tmp_path / "b.ds").write_text("text")
    (tmp_path / "text.txt").write_text("text")
    os.mkfifo(tmp_path / "c.bin")
    for path in (
        tmp_path,
        tmp_path / "a.bin",
        tmp_path / "a",
        tmp_path / "c.bin",
        tmp_path / "missing",
        Path("a\0b"),
        Path(),
    ):
        assert found_at(path) is None
        assert not is_prepared(path)


def test_our_own_folder_is_ours_whatever_its_first_tokens_are(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("0123456789" * 100)
    folder = prepare([text], tmp_path / "tokens", DataConfig(tokenizer="byte")).path
    shutil.copy(write_llmc(tmp_path / "x.bin", range(5)), folder / "val.bin")
    assert found_at(folder) is None
    with pytest.raises(InputError, match=r"val\.bin holds 1034 bytes where its meta\.json says 202"):
        open_given(folder, BYTES)
    np.arange(10, dtype="<u2").tofile(tmp_path / "val.bin")
    np.arange(10, dtype="<u2").tofile(tmp_path / "train.bin")
    (tmp_path / "x.bin").unlink()
    assert open_given(tmp_path, DataConfig()).digest == open_tokens(tmp_path).digest


def test_nanogpts_folder_is_of_the_tokenizer_that_is_named(tmp_path: Path) -> None:
    ids = np.arange(100_000, 100_010, dtype="<u4")
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
    assert open_given(tmp_path, DataConfig()).tokenizer.kind == "gpt2"
    assert open_given(tmp_path, BYTES).train.tolist() == ids.view("<u2").tolist()
    wide = make_tokenizer("byte")
    wide.vocab_size = 128_256
    assert open_for(tmp_path, wide).train.tolist() == ids.tolist()


def test_token_files_inside_a_folder_of_text_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    write_llmc(tmp_path / "one" / "a.bin", range(10))
    write_megatron(tmp_path / "two" / "a", [[[1, 2]]])
    write_datatrove(tmp_path / "three" / "a.ds", documents())
    found = find_documents([tmp_path])
    assert [document.name for document in found.documents] == ["text.txt"]
    assert found.skipped.counts["folder of prepared tokens"] == 3
