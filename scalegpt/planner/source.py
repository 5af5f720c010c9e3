"""The source of a planned run's settings, before flags: a preset, a file, a Hugging Face model, or the defaults."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalegpt.config import ModelConfig, RunConfig
from scalegpt.config.backends import BACKENDS
from scalegpt.config.presets import named_settings, public_names, resolve
from scalegpt.config.settings import coerce
from scalegpt.errors import InputError

if TYPE_CHECKING:
    from scalegpt.interop.families import HfModel

Values = dict[str, Any]

SHAPE = frozenset({"n_layer", "n_embd", "n_head", "block_size", "vocab_size"})
"""The settings that decide the size of a model."""

LONGEST_BLOCK = 8192
"""The longest block, in tokens, with which a Hugging Face model is planned if no block is asked for.

A model that can read 131,072 tokens was mostly trained with shorter blocks, and few cards can train on so long a
sequence.
"""


FREE = ("block_size", "vocab_size", "dropout")
"""Model settings in which a run may differ from the model in ``init_from``: they change the rows of the vocabulary, no
tensor, or the number of positions.
"""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


LAYOUT = frozenset({"zero_stage", "offload", "shard_size"})
"""Settings that not every backend supports."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of settings, before flags.

    Attributes:
        given: the arguments of :func:`~scalegpt.config.presets.resolve` that name the source.
        run: the run as the source defines it.
        words: the words of ``scalegpt plan`` that name the source, for example ``("--preset", "tiny")``; empty: the
            defaults.
        train_words: the words of the trainer's command line that name the source.
        trained: the run that ``train_words`` alone describe; the command names all settings that differ from it.
        stated: the names of the settings that the source gives.
        flags: settings that follow from the source and the flags, as if the user had given them.
        remarks: one-line remarks on the source.
        foreign: the model, if its own tokenizer is not available; else None.
    """

    given: Values
    run: RunConfig
    words: tuple[str, ...]
    train_words: tuple[str, ...]
    trained: RunConfig
    stated: frozenset[str]
    flags: Values = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    foreign: str | None = None

    def resolved(self, flags: Values, given_in: str) -> RunConfig:
        """The run that the source and flags describe.

        If flags give settings of :data:`LAYOUT` that the source's backend does not support, but no backend, the run gets
        another backend, and the planner may choose the backend.

        Raises:
            InputError: no backend supports the flags.
        """
        try:
            return resolve(**self.given, flags=flags, given_in=given_in)
        except InputError:
            if flags.get("backend", "auto") != "auto" or not flags.keys() & LAYOUT:
                raise
            for backend, spec in BACKENDS.items():
                for stage in (flags["zero_stage"],) if "zero_stage" in flags else spec.stages:
                    try:
                        run = resolve(**self.given, flags={**flags, "backend": backend, "zero_stage": stage})
                    except InputError:
                        continue
                    return replace(run, auto=run.auto | ({"backend", "zero_stage"} - (flags.keys() - run.auto)))
            raise

    def notes(self, fixed: Collection[str]) -> Iterator[str]:
        """One-line remarks on the source, for a run in which the user gives the settings ``fixed``."""
        yield from self.remarks
        if self.foreign is not None and "tokenizer" not in fixed:
            yield f"the command trains with GPT-2's tokenizer, not with that of {self.foreign}; --tokenizer FOLDER names it"
        if "block_size" in self.flags:
            yield (
                f"planned for blocks of {self.flags['block_size']:,} tokens, out of the "
                f"{self.run.model.block_size:,} that the "
                "model can read; --block_size sets another length"
            )
        if self.words:
            return
        if SHAPE.isdisjoint(fixed):
            yield "no preset, no file and no shape is given: the model is the trainer's default"
        else:
            rest = ", ".join(sorted(SHAPE.difference(fixed))) or "the rest"
            yield f"no preset is given: the trainer's defaults are used for {rest}"


def source_of(*, preset: str | None, config_file: str | None, hf: str | None = None, flags: Values) -> Source:
    """The source that the arguments name; the defaults if none is given.

    Args:
        preset: the name of a preset.
        config_file: the path of a configuration file.
        hf: the path of a folder with a Hugging Face model, or of its ``config.json``.
        flags: the settings that the user gives over the source. A Hugging Face model is read with their ``block_size``.

    Raises:
        InputError: more than one source is given, a name is unknown, a file cannot be read, or ScaleGPT cannot express
            the model.
    """
    named = {"--preset": preset, "--config_file": config_file, "--hf": hf}
    given = {flag: value for flag, value in named.items() if value is not None}
    if len(given) > 1:
        raise InputError(f"give {' or '.join(f'{flag} {value}' for flag, value in given.items())}, not both")
    if hf is not None:
        return _hugging_face(Path(hf), flags)
    if preset is not None:
        return _preset(preset)
    words = tuple(word for pair in given.items() for word in pair)
    return _source({"config_file": config_file}, words, named_settings(config_file=config_file))


def _source(given: Values, words: tuple[str, ...], stated: frozenset[str]) -> Source:
    run = resolve(**given)
    return Source(given=given, run=run, words=words, train_words=words, trained=run, stated=stated)


def folder_to_start_from(init_from: str) -> str:
    """The Hugging Face folder that ``init_from`` names. The plan uses its shape.

    Raises:
        InputError: it names something else.
    """
    from scalegpt.interop.families.reading import is_hugging_face

    if not is_hugging_face(Path(init_from)):
        raise InputError(
            f"init_from {init_from} is not a Hugging Face folder, from which the plan takes its shape; for a run "
            "give --config_file "
            f"{init_from}/config.yaml"
        )
    return init_from


@lru_cache(maxsize=64)
def _preset(name: str) -> Source:
    """A preset; cached, since tables read presets repeatedly."""
    source = _source({"preset": name}, ("--preset", name), named_settings(name))
    is_foreign = name in public_names() and source.run.model.position != "learned"  # GPT-2 alone has learned positions
    return replace(source, foreign=name) if is_foreign else source


def _hugging_face(path: Path, flags: Values) -> Source:
    from scalegpt.interop.families import read_config  # imported here: presets, the usual source, do not need it

    wanted = flags.get("block_size")
    block = None if wanted is None else coerce(ModelConfig.settings()["block_size"], wanted)
    read = read_config(path, block)
    given: Values = {"base": as_values(read)}
    run, folder = resolve(**given), read.path.parent
    has_weights = any(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    starts_there = has_weights and flags.keys() & ModelConfig.settings().keys() <= set(FREE)
    follows: Values = {}
    if block is None and read.model.block_size > LONGEST_BLOCK:
        follows["block_size"] = LONGEST_BLOCK
    if not starts_there:  # named, since the trainer would choose the vocabulary of the tokenizer, which may be smaller
        follows["vocab_size"] = read.model.vocab_size
    return Source(
        given=given,
        run=run,
        words=("--hf", str(path)),
        train_words=("--init_from", str(folder)) if starts_there else (),
        trained=run if starts_there else resolve(),
        stated=frozenset({*ModelConfig.settings(), *given["base"]["data"]}),
        flags=follows,
        remarks=read.notes,
        foreign=None if given["base"]["data"] else read.name,
    )


def as_values(read: "HfModel") -> Values:
    """A Hugging Face model in the form of a configuration file, with the tokenizer of its folder if there is one."""
    from scalegpt.interop.families.reading import tokenizer_setting

    tokenizer = tokenizer_setting(read)
    data = {} if tokenizer is None else {"tokenizer": tokenizer}
    model = {each.name: getattr(read.model, each.name) for each in fields(read.model)}
    return {"name": read.name, "model": model, "data": data}
