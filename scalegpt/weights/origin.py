"""The model from which a run starts: the weights of a Hugging Face folder, checked and read one tensor at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalegpt.config import ModelConfig
from scalegpt.config.tokenizer import NAMES
from scalegpt.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from scalegpt.errors import InputError
from scalegpt.interop.families import HfModel
from scalegpt.interop.families.reading import tokenizer_setting
from scalegpt.text import shown
from scalegpt.weights.files import WeightFiles
from scalegpt.weights.layouts import Layout, Target, from_theirs, targets
from scalegpt.weights.table import HUGGING_FACE

EMBEDDING, POSITIONS, HEAD = "wte.weight", "wpe.weight", "head.weight"

_ROWS = 4096
"""Rows that are compared at once."""

ReadWeights = Callable[[], Iterator[tuple[str, Tensor]]]
"""A function that yields each parameter's name and its whole fp32 CPU tensor, one at a time, in the model's order."""


@dataclass(frozen=True)
class Origin:
    """A model from which a run starts.

    Attributes:
        model: the shape of the weights as they are stored.
        stored: reads the weights as they are stored.
    """

    model: ModelConfig
    stored: ReadWeights

    def weights(self, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and its fp32 CPU tensor for ``model``, one at a time.

        ``model`` may differ from the stored shape in the rows of the vocabulary, and have fewer learned positions. Rows
        that it lacks are cut off. Rows that it adds are the mean of the stored rows, so that an added token is about as
        likely as an average token (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
        """
        for name, value in self.stored():
            rows = model.block_size if name == POSITIONS else model.vocab_size
            yield name, _with_rows(value, rows) if name in {EMBEDDING, POSITIONS, HEAD} else value
            del value  # before the next one is read


def _with_rows(value: Tensor, rows: int) -> Tensor:
    added = rows - value.shape[0]
    if added <= 0:
        return value[:rows]
    return torch.cat([value, value.mean(0, keepdim=True).expand(added, -1)])


def open_folder(read: HfModel) -> Origin:
    """Open the weights of a Hugging Face folder, and check every name, shape and dtype. No tensor is read.

    Args:
        read: the folder's configuration.

    Raises:
        InputError: the folder has no weights, a file is damaged or not allowed, or the tensors do not match the
            configuration.
    """
    model = read.model
    if model.position == "learned":
        model = model.changed(block_size=read.positions)
    folder, layout = read.path.parent, HUGGING_FACE[read.family]
    files = WeightFiles(folder)
    wanted = [target for target in targets(model, layout) if target.source is not None]
    named, tied = _named(files, wanted, layout, model)

    def read_named(name: str) -> Tensor:
        return files.read(named[name])

    def stored() -> Iterator[tuple[str, Tensor]]:
        for name, value in from_theirs(read_named, wanted, model):
            if not torch.stack(torch.aminmax(value)).isfinite().all():  # NaN passes through; no second tensor is made
                raise InputError(
                    f"{folder}: the weights of {name} are not all finite; give a model that has not diverged"
                )
            if name == EMBEDDING and tied is not None and not _same_rows(files.read(tied), value):
                raise InputError(
                    f"{folder}: {tied} differs from the embedding, but config.json says tie_word_embeddings; set it to false"
                )
            yield name, value
            del value  # before the next one is read

    return Origin(model, stored)


def _same_rows(stored: Tensor, value: Tensor) -> bool:
    """Whether a stored tensor has the fp32 values of another; compared in parts, without a whole copy."""
    parts = zip(torch.split(stored, _ROWS), torch.split(value, _ROWS), strict=True)
    return all(torch.equal(part.float(), other) for part, other in parts)


def tokenizer_of(read: HfModel) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    If a GPT-2 model has GPT-2's vocabulary but no tokenizer files, GPT-2's tokenizer is used.

    Raises:
        InputError: the folder has no readable tokenizer, or the tokenizer has more tokens than the model's vocabulary.
    """
    folder, rows = read.path.parent, read.model.vocab_size
    setting = tokenizer_setting(read) or str(folder)
    tokenizer = make_tokenizer(setting) if setting in NAMES else load_tokenizer(setting)
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} ids, but its model only {rows:,}: they do not "
            "belong together"
        )
    return tokenizer


def _named(
    files: WeightFiles, wanted: Iterable[Target], layout: Layout, model: ModelConfig
) -> tuple[dict[str, str], str | None]:
    """The names of the wanted tensors in the files, and of a tied head's copy of the embedding if the files have one.

    Raises:
        InputError: a tensor is missing, does not belong to the model, or has another shape or an unsupported dtype.
    """
    named: dict[str, str] = {}
    missing = []
    for target in wanted:
        found = next((name for name in layout.names_of(target.name) if name in files.shapes), None)
        if found is None:
            missing.append(target.name)
            continue
        named[target.name] = found
        if files.shapes[found] != target.shape:
            raise InputError(
                f"{files.path}: {found} has the shape {list(files.shapes[found])}, but config.json describes "
                f"{list(target.shape)}"
            )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{files.path}: its weights lack the tensor {missing[0]}{more} of its config.json")
    tied = _copy_of_embedding(files, layout, model)
    used = {*named.values(), *([] if tied is None else [tied])}
    for name in files.shapes:
        if name not in used and not layout.is_ignored(name):
            raise InputError(
                f"{files.path}: its weights have {shown(name)}, which a model of its config.json does not have"
            )
    for name in used:
        if not isinstance(files.dtypes[name], torch.dtype):
            raise InputError(
                f"{files.path}: {name} has the dtype {files.dtypes[name]}, which is not supported; give weights in "
                "fp32, bf16 or fp16"
            )
    return named, tied


def _copy_of_embedding(files: WeightFiles, layout: Layout, model: ModelConfig) -> str | None:
    """The name of a tied head's tensor, if the files hold one; it must have the shape of the embedding."""
    if not model.tie_head:
        return None
    untied = targets(replace(model, tie_head=False, n_layer=1), layout)
    head = next(target for target in untied if target.source == HEAD)
    names = [name for name in layout.names_of(head.name) if files.shapes.get(name) == head.shape]
    return names[0] if names else None
