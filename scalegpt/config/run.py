"""The whole configuration of a run: model, training, parallel layout and data."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from scalegpt.config.backends import BACKENDS, DEEPSPEED, OFFLOADS, PLAIN, BackendSpec, Mesh, backend_help, stage_help
from scalegpt.config.optimizers import OPTIMIZERS
from scalegpt.config.settings import Section, setting
from scalegpt.config.shape import ModelConfig
from scalegpt.config.tokenizer import check_tokenizer, is_file
from scalegpt.config.train import TrainConfig
from scalegpt.errors import InputError
from scalegpt.inputs import WeightedInput, as_text, sources_of

AUTO = "auto"
PLANNED = frozenset({"backend", "zero_stage", "offload", "shard_size", "micro_batch", "recompute", "loss"})
"""The settings that may be ``auto``: the planner chooses them."""

PLANNED_BY_DEFAULT = frozenset({"micro_batch", "recompute"})
"""The settings that are ``auto`` in training unless the user sets them.

A micro batch in a preset or file is only a hint.
"""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """The backend, what it shards, and what it keeps in host memory.

    Raises:
        InputError: the backend does not have the stage, or does not have the offload or ``shard_size`` at that stage.
    """

    backend: str = setting(PLAIN.name, backend_help(), choices=tuple(BACKENDS))
    zero_stage: int | None = setting(None, stage_help(), minimum=0, maximum=3)
    offload: str = setting(
        "none",
        "what to keep in host memory: optimizer: the optimizer's state; all: also the parameters; auto: only what is "
        "needed to fit",
        choices=OFFLOADS,
    )
    shard_size: int | None = setting(
        None,
        "ranks among which the states are cut; more ranks are replicas of them; none: all ranks (deepspeed 3: ranks of a "
        "second copy of the weights)",
        minimum=2,
        maximum=1 << 20,
    )
    ds_config: str | None = setting(
        None, "DeepSpeed configuration: a file in ds_configs/ or a path; none: the stage's own", is_path=True
    )

    def check(self) -> None:
        """Refuse a stage, an offload, a shard size or a DeepSpeed file that the backend does not have."""
        if self.stage not in self.spec.stages:
            offered = ", ".join(map(str, self.spec.stages))
            raise InputError(f"zero_stage {self.stage} does not exist for backend {self.backend}; it has {offered}")
        self.spec.check_offload(self.offload, self.stage)
        self.spec.check_shard_size(self.shard_size, self.stage, self.offload)
        if self.ds_config is not None and self.spec is not DEEPSPEED:
            raise InputError(f"ds_config {self.ds_config!r} needs backend deepspeed, not {self.backend}")

    @property
    def spec(self) -> BackendSpec:
        """The specification of the backend."""
        return BACKENDS[self.backend]

    @property
    def stage(self) -> int:
        """The ZeRO stage: ``zero_stage``, or the backend's default stage if it is not set."""
        return self.spec.default_stage if self.zero_stage is None else self.zero_stage

    def mesh(self, ranks: int) -> Mesh:
        """The mesh of replicas and shards over this number of data-parallel ranks.

        Raises:
            InputError: the number of ranks is not a multiple of ``shard_size``.
        """
        return self.spec.mesh(self.stage, ranks, self.shard_size)

    def label(self, before_stage: str = "stage ") -> str:
        """Backend, stage and shard size in words, for example ``fsdp stage 2``.

        ``before_stage`` is the text before the stage's number.
        """
        if not self.spec.has_stages:
            return self.backend
        size = "" if self.shard_size is None else f", shard size {self.shard_size}"
        return f"{self.backend} {before_stage}{self.stage}{size}"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The data settings: which text is read, and how it becomes tokens.

    Raises:
        InputError: ``tokenizer`` is neither a name nor a path; ``end_of_text`` is given for a tokenizer with a name; or the
            weights of ``input_file`` cannot be used (:func:`scalegpt.inputs.sources_of`).
    """

    input_file: str | None = setting(
        None,
        "text or code, a folder of it, or token files made by `scalegpt data prepare` or another program; several are one "
        "text, or with weights (a=0.7 b=0.3) a mixture",
        is_path=True,
        as_text=as_text,
    )
    tokenizer: str = setting(
        "gpt2", "gpt2 BPE, byte or char level, or the path of a tokenizer.json or of its folder", is_path=True
    )
    end_of_text: str | None = setting(None, "the token of a tokenizer.json that ends a document; none: its eos_token")
    text_field: str | None = setting(
        None, "field of records (JSON Lines, CSV, Parquet ...) that holds the text; none: text, else content"
    )
    encoding: str = setting("utf-8", "encoding of the text files; auto detects it")
    val_fraction: float | None = setting(
        None, "share of the text that is held out; none: a tenth, at most about 8 MB", above=0, below=1
    )
    deduplicate: bool = setting(False, "leave out documents whose text an earlier document has")
    shard_tokens: int = setting(
        1 << 30, "most tokens in a token file; a split of more has several files", minimum=1000, maximum=1 << 40
    )
    workers: int | None = setting(
        None, "threads that tokenise text; none: the usable cores; the tokens are the same", minimum=1, maximum=1024
    )
    as_text: bool = setting(
        False, "read records, HTML and the like as they are written, and folders that are mostly such data"
    )
    include: str | None = setting(
        None, "patterns of the files of folders that are read, as in .gitignore, with commas; none: all"
    )
    exclude: str | None = setting(
        None, "patterns of files and folders that are not read, as in .gitignore, with commas"
    )
    gitignore: bool = setting(True, "skip what .gitignore files in folders name")
    follow_links: bool = setting(False, "follow symbolic links that leave an input folder")

    def check(self) -> None:
        """Refuse a tokenizer that cannot be one, and an end-of-text token for a tokenizer that has its own."""
        check_tokenizer(self.tokenizer)
        if self.input_file is not None:
            sources_of(self.input_file)
        if self.end_of_text is not None and not is_file(self.tokenizer):
            raise InputError(
                f"end_of_text names a token of a tokenizer.json, and tokenizer is {self.tokenizer}; omit --end_of_text"
            )

    @property
    def sources(self) -> tuple[WeightedInput, ...]:
        """The sources that ``input_file`` names, one unless it is a mixture; empty if it is not set."""
        return () if self.input_file is None else sources_of(self.input_file)


READING = ("text_field", "encoding", "as_text", "include", "exclude", "gitignore", "follow_links")
"""The data settings that say how text is read for training, for evaluation, and for training a tokenizer."""

DATA = "data"
"""The word that stands for the tokens in ``allow_change``, beside the names of settings."""


def optimizer_unfit(optimizer: str, parallel: ParallelConfig) -> str | None:
    """Why an optimizer does not work with a layout, and what to use instead; None if it works."""
    return OPTIMIZERS[optimizer][True].unfit(parallel.spec, parallel.stage, parallel.offload)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "train": TrainConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes. Made by :func:`scalegpt.config.presets.resolve`.

    Attributes:
        auto: the settings of :data:`PLANNED` that the planner has yet to choose; until then they have provisional
            values, from the preset or the defaults.
    """

    name: str
    preset: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    auto: frozenset[str] = frozenset()

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain values for JSON or YAML; settings in ``auto`` have their provisional values."""
        values = asdict(self)
        del values["auto"]
        return values

    def with_vocab(self, vocab_size: int) -> "RunConfig":
        """The same configuration with this vocabulary size."""
        return replace(self, model=self.model.changed(vocab_size=vocab_size))
