"""Train a byte-level BPE on the user's text, and write it as Hugging Face libraries read it."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from scalegpt.config import DataConfig
from scalegpt.data.leftovers import make_unfinished, remove_abandoned
from scalegpt.data.prepare import Progress, survey_reporting
from scalegpt.data.text.corpus import Corpus
from scalegpt.data.text.reading import read_documents
from scalegpt.data.tokenizers import HFTokenizer, load_tokenizer
from scalegpt.data.tokenizers.base import END_OF_TEXT
from scalegpt.data.tokenizers.cutting import cut_place
from scalegpt.data.tokenizers.export import bpe_files
from scalegpt.data.tokenizers.huggingface import package
from scalegpt.data.tokenizers.letters import LETTERS
from scalegpt.errors import InputError
from scalegpt.storage import disk_errors, sync_file, sync_folder
from scalegpt.text import one_line

FEWEST = len(LETTERS) + 1
"""The smallest vocabulary: the bytes and the end-of-text token."""

LEAST_OFTEN = 2
"""A pair of tokens is merged only if it occurs at least so often in the text."""

_PART_CHARACTERS = 1 << 16
"""The text is handed to the package ``tokenizers`` in parts of this size, of which it holds some hundreds at a time."""


def train_tokenizer(
    inputs: Sequence[str | Path],
    out: str | Path,
    vocab_size: int,
    settings: DataConfig,
    *,
    progress: Progress | None = None,
) -> HFTokenizer:
    """Train a byte-level BPE that splits text by GPT-2's pattern and ends documents with ``<|endoftext|>``.

    The same text gives the same files. Id 0 is the end-of-text token, and ids 1 to 256 are the bytes.

    Args:
        inputs: text files, and folders of text files.
        out: the folder to make, with ``tokenizer.json`` and ``tokenizer_config.json``.
        vocab_size: the number of tokens.
        settings: the data settings, of which only those on how to read text are used.
        progress: called with the bytes of text counted so far and the bytes of all text.

    Raises:
        InputError: there is no usable text, it has too few pairs for the vocabulary, ``out`` holds something already or
            cannot be written, or the package ``tokenizers`` is not installed.
    """
    out = Path(out)
    _check_free(out)
    try:
        library = package(parallel=True)
    except InputError as error:
        raise InputError(f"training a tokenizer {error}") from None
    corpus = survey_reporting(inputs, settings)
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST_OFTEN,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(LETTERS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_parts(corpus, progress), trainer)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        first = one_line(corpus.sources[0].path)
        name = first if len(corpus.sources) == 1 else f"the text of {len(corpus.sources):,} files ({first} …)"
        raise InputError(
            f"{name} gives only {size:,} tokens that occur at least {LEAST_OFTEN} times, fewer than the vocabulary of "
            f"{vocab_size:,}; give more text, or --vocab {size} or less"
        )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    _write(bpe_files(dict(sorted(model["vocab"].items(), key=lambda each: each[1])), merges), out)
    return load_tokenizer(str(out))


def _check_free(out: Path) -> None:
    """Refuse an output folder that holds something, or that cannot be made, before the text is read.

    Raises:
        InputError: there is something at ``out``, or its folder cannot be written.
    """
    with disk_errors(out):
        if out.is_file() or (out.exists() and any(out.iterdir())):
            raise InputError(f"out {one_line(out)} already holds something; choose another --out, or remove it first")
    parent = next(each for each in out.absolute().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"out {one_line(out)} cannot be made, since {one_line(parent)} cannot be written; choose another"
        )


def _parts(corpus: Corpus, progress: Progress | None) -> Iterator[str]:
    before = 0
    for source in corpus.sources:
        for text, read, _ in read_documents(source):
            first = 0
            while first < len(text):
                part = text[first : first + _PART_CHARACTERS]
                part = part if first + len(part) == len(text) else part[: cut_place(part) or len(part)]
                first += len(part)
                yield part
            if progress is not None:
                progress(before + read, corpus.bytes)
        before += source.bytes


def _write(files: dict[str, bytes], out: Path) -> None:
    """Write files into a new folder, which appears whole or not at all.

    Raises:
        InputError: the disk is full, or the folder cannot be made.
    """
    with disk_errors(out):
        remove_abandoned(out)
        folder, lock = make_unfinished(out.absolute())
        try:
            for name, content in files.items():
                with (folder / name).open("wb") as file:
                    file.write(content)
                    sync_file(file)
            sync_folder(folder)
            folder.rename(out)  # replaces ``out`` only if it is an empty folder
            sync_folder(out.absolute().parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(lock)
