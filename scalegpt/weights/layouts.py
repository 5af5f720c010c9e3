"""How other programs store the weights of a decoder: names, shapes and order of their tensors, compared with ours.

A :class:`Layout` is data: for each of our modules, it names the modules of the other program whose tensors hold the
same numbers. :func:`targets` makes the list of all tensors of the other program from a layout and a model's shape.
Reading, checking and writing all follow that list.

- **Conv1D**: GPT-2 stores the matrices of its blocks transposed, [in, out].
- **By head**: GPT-NeoX stores, for one head after another, the rows of its query, its key and its value. We store all
  queries, then all keys, then all values.
- **In pairs**: for Llama, ``llama.cpp`` rotates neighbouring rows of a head together. We and Hugging Face rotate row i
  with row i + D/2. The rows of queries and keys therefore have another order in ``llama.cpp``.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from scalegpt.architecture.decoder import BLOCKS, parameter_shapes
from scalegpt.config import ModelConfig

Reorder = Callable[[Tensor, ModelConfig], Tensor]


@dataclass(frozen=True)
class Form:
    """How a tensor of the other program differs from our rows with the same numbers.

    Attributes:
        theirs: a function from our rows and the model's shape to the other program's tensor.
        ours: the inverse of ``theirs``.
    """

    theirs: Reorder
    ours: Reorder


def _same(value: Tensor, _model: ModelConfig) -> Tensor:
    return value


def _transposed(value: Tensor, _model: ModelConfig) -> Tensor:
    return value.t() if value.dim() == 2 else value


def _by_head(value: Tensor, model: ModelConfig) -> Tensor:
    """[3 · a · D, …] → [a · 3 · D, …]."""
    return value.reshape(3, model.n_head, model.head_width, *value.shape[1:]).transpose(0, 1).reshape(value.shape)


def _by_kind(value: Tensor, model: ModelConfig) -> Tensor:
    """[a · 3 · D, …] → [3 · a · D, …]."""
    return value.reshape(model.n_head, 3, model.head_width, *value.shape[1:]).transpose(0, 1).reshape(value.shape)


def _in_pairs(value: Tensor, model: ModelConfig) -> Tensor:
    """[heads · 2 · D/2, …] → [heads · D/2 · 2, …]."""
    return value.reshape(-1, 2, model.head_width // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _in_halves(value: Tensor, model: ModelConfig) -> Tensor:
    """[heads · D/2 · 2, …] → [heads · 2 · D/2, …]."""
    return value.reshape(-1, model.head_width // 2, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


SAME = Form(_same, _same)
CONV1D = Form(_transposed, _transposed)
BY_HEAD = Form(_by_head, _by_kind)
IN_PAIRS = Form(_in_pairs, _in_halves)


@dataclass(frozen=True)
class Place:
    """The modules of the other program that hold one of our modules.

    Attributes:
        modules: their names, with ``{n}`` for the block. Their rows, one after another, are our rows.
        form: how their tensors differ from our rows: one form for all, or one for each module.
    """

    modules: tuple[str, ...]
    form: Form | tuple[Form, ...] = SAME

    def form_of(self, index: int) -> Form:
        """The form of the module with this index."""
        return self.form[index] if isinstance(self.form, tuple) else self.form


@dataclass(frozen=True)
class Layout:
    """The names and forms of all tensors of a family of models in another program.

    Attributes:
        places: our module, with ``{n}`` for the block, → its place. A module that a model lacks, for example ``wpe``,
            is ignored.
        biased: our modules that always have a bias in the other program; if ours has none, zeros are written.
        base: a prefix of their names that is missing in files of the bare decoder.
        aliases: their name → another name of the same tensor in files.
        ignored: regular expression for names of tensors that are not weights, for example masks in older files.
    """

    places: Mapping[str, Place]
    biased: frozenset[str] = frozenset()
    base: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: str = r"(?!)"

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor in a file is not a weight of the model."""
        return re.fullmatch(self.ignored, name) is not None

    def names_of(self, name: str) -> tuple[str, ...]:
        """The names that a tensor may have in a file, the usual one first."""
        other = [name.removeprefix(self.base)] if self.base and name.startswith(self.base) else []
        return name, *other, *([self.aliases[name]] if name in self.aliases else [])


@dataclass(frozen=True)
class Target:
    """One tensor of the other program.

    Attributes:
        name: its name in the other program.
        shape: its shape in the other program.
        source: the name of our parameter; None: our model has no such bias, and the tensor is zeros.
        start: the first row of our parameter that it holds.
        rows: how many rows.
        form: how it differs from these rows.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None
    start: int
    rows: int
    form: Form


def targets(model: ModelConfig, layout: Layout) -> list[Target]:
    """All tensors of the other program for a model of this shape, in the order of our parameters.

    The shapes follow from ours. A tied head has no tensor.

    Raises:
        KeyError: the layout has no place for a parameter, because no model of that family has this shape.
    """
    found: list[Target] = []
    shapes = parameter_shapes(model)
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        found += _placed(model, layout, module, kind, shape, name)
        bias = f"{module}.bias"
        if kind == "weight" and bias not in shapes and _pattern(module)[0] in layout.biased:
            found += _placed(model, layout, module, "bias", shape[:1], None)
    return found


def _placed(
    model: ModelConfig, layout: Layout, module: str, kind: str, shape: tuple[int, ...], source: str | None
) -> Iterator[Target]:
    pattern, block = _pattern(module)
    place, start = layout.places[pattern], 0
    for index, (theirs, rows) in enumerate(zip(place.modules, _rows(model, place, shape[0]), strict=True)):
        form = place.form_of(index)
        shaped = tuple(reversed((rows, *shape[1:]))) if form is CONV1D else (rows, *shape[1:])
        yield Target(f"{theirs.format(n=block)}.{kind}", shaped, source, start, rows, form)
        start += rows


def _pattern(module: str) -> tuple[str, str]:
    """A module's name with ``{n}`` for its block, and the block's number; empty outside of the blocks."""
    if not module.startswith(BLOCKS):
        return module, ""
    number, _, rest = module.removeprefix(BLOCKS).partition(".")
    return f"{BLOCKS}{{n}}.{rest}", number


def _rows(model: ModelConfig, place: Place, rows: int) -> list[int]:
    """How our module's rows are divided among their modules: by kinds of heads, or into a gate and a value of equal size."""
    if len(place.modules) == 3:
        return [heads * model.head_width for heads in (model.n_head, model.kv_heads, model.kv_heads)]
    return [rows // len(place.modules)] * len(place.modules)


def from_theirs(
    read: Callable[[str], Tensor], wanted: Iterable[Target], model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield each of our parameters, its name and its fp32 value, one at a time.

    Args:
        read: reads the other program's tensor of this name.
        wanted: from :func:`targets`.
        model: the shape.
    """
    for source, parts in groupby(wanted, key=lambda target: target.source):
        if source is None:  # a bias that ours has not
            continue
        yield source, _joined(list(parts), read, model)


def _joined(parts: Sequence[Target], read: Callable[[str], Tensor], model: ModelConfig) -> Tensor:
    """The fp32 rows of all parts. Memory holds them, and one part as it is read."""
    if len(parts) == 1:
        whole: Tensor = parts[0].form.ours(read(parts[0].name), model)
        return whole.float().contiguous()
    rows, first = torch.empty(0), 0
    for part in parts:
        value = part.form.ours(read(part.name), model)
        if not first:
            rows = torch.empty(sum(each.rows for each in parts), *value.shape[1:])
        rows[first : first + part.rows].copy_(value)
        first += part.rows
        del value  # before the next part is read
    return rows


def to_theirs(read: Callable[[str], Tensor], wanted: Iterable[Target], model: ModelConfig) -> Iterator[Tensor]:
    """Yield the other program's tensors, in the order of ``wanted``, one at a time.

    Args:
        read: reads our parameter of this name. It is called once for each parameter, and only one parameter is held at
            a time.
        wanted: from :func:`targets`.
        model: the shape.
    """
    for source, parts in groupby(wanted, key=lambda target: target.source):
        value = torch.empty(0) if source is None else read(source)
        for part in parts:
            if source is None:
                yield torch.zeros(part.shape)
            else:
                yield part.form.theirs(value[part.start : part.start + part.rows], model)
