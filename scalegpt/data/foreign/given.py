"""Open tokens that a user names: a folder that ScaleGPT or nanoGPT prepared, or files of another program."""

from pathlib import Path

from scalegpt.config import DataConfig
from scalegpt.data.foreign.found import Found
from scalegpt.data.foreign.opening import open_found, tokenizer_of, tokenizer_setting
from scalegpt.data.foreign.table import recognise
from scalegpt.data.shards import TokenSet, open_tokens
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError
from scalegpt.text import one_line


def found_at(path: str | Path) -> Found | None:
    """The token files of another program at a path; None if none are there.

    Raises:
        InputError: the files are malformed.
    """
    form = recognise(Path(path))
    return None if form is None else form.find(Path(path))


def open_given(path: str | Path, settings: DataConfig) -> TokenSet:
    """Open prepared tokens. Their contents are not read.

    Args:
        path: a folder that :func:`~scalegpt.data.shards.open_tokens` opens, or files of another program.
        settings: of files that do not say it, ``tokenizer`` and ``end_of_text`` say which tokenizer made them, and
            ``val_fraction`` how many tokens are held out.

    Raises:
        InputError: the files are malformed, or their tokenizer cannot be used.
    """
    found = found_at(path)
    if found is None:
        return open_tokens(path, lambda: tokenizer_of(settings.tokenizer, settings.end_of_text))
    return open_found(found, tokenizer_of(settings.tokenizer, settings.end_of_text), settings.val_fraction)


def open_for(path: str | Path, tokenizer: Tokenizer) -> TokenSet:
    """Open prepared tokens for a model whose tokenizer is known.

    Raises:
        InputError: the files are malformed, or say that another tokenizer made them.
    """
    found = found_at(path)
    if found is None:
        return open_tokens(path, lambda: tokenizer)
    made = None if found.tokenizer is None else tokenizer_of(tokenizer_setting(found, None), None)
    if made is not None and made.text_digest != tokenizer.text_digest:
        raise InputError(
            f"{one_line(path)} was prepared with another tokenizer ({made.kind}) than the model's ({tokenizer.kind}); give "
            "the text itself"
        )
    return open_found(found, tokenizer)
