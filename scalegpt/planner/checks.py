"""Checks that refuse settings which cannot work on a machine, before anything is computed.

Each error says what is wrong and what would work. :mod:`scalegpt.config` has already refused settings that work on no
machine, for example a stage that the backend does not have.
"""

from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec

from scalegpt.config import RunConfig
from scalegpt.config.backends import BACKENDS, BackendSpec
from scalegpt.config.run import optimizer_unfit
from scalegpt.config.tokenizer import TOKENS, is_file, padded_vocabulary, prepared_with, vocabulary_size
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import CPU_CAPABILITY, Card, has_bf16
from scalegpt.planner.attention import unfit
from scalegpt.text import one_line

INSTALL = "pip install 'scalegpt[deepspeed]'"
"""The command that installs DeepSpeed, an optional extra of the package."""


def resolve_precision(wanted: str, card: Card | None, capability: str | None = None) -> str:
    """The name of the compute dtype for ``wanted``.

    ``auto`` is bf16 on cards that have bf16, fp16 on other cards, and fp32 on a CPU.

    On a CPU whose rates are measured, :func:`~scalegpt.planner.precision.fastest_precision` chooses between fp32 and bf16.

    Args:
        wanted: the precision that the user asked for, or ``auto``.
        card: the card; None if it is not in the catalogue.
        capability: the compute capability of a card that is not in the catalogue; None: unknown, treated as having bf16.

    Raises:
        InputError: bf16 was asked for on a card without it.
    """
    capability = card.capability if card is not None else capability
    native = capability is None or has_bf16(capability)
    if wanted == "bf16" and not native:
        raise InputError(f"precision bf16: {card.name if card else 'this card'} has no bf16; use --precision fp16")
    if wanted != "auto":
        return wanted
    if capability == CPU_CAPABILITY:
        return "fp32"
    return "bf16" if native else "fp16"


def is_installed(spec: BackendSpec) -> bool:
    """Whether the package of a backend is installed. Only DeepSpeed, an optional extra, may be missing."""
    return spec.package is None or find_spec(spec.package) is not None


def installed_backends() -> tuple[str, ...]:
    """The names of the backends whose packages are installed."""
    return tuple(name for name, spec in BACKENDS.items() if is_installed(spec))


def check_installed(backend: str) -> None:
    """Refuse to train with a backend whose package is missing here.

    Raises:
        InputError: DeepSpeed is not installed.
    """
    if not is_installed(BACKENDS[backend]):
        raise InputError(f"backend {backend}: its package is not installed here; run {INSTALL}, or use --backend fsdp")


def check_ranks(run: RunConfig, ranks: int, *, stage_fixed: bool = False) -> str | None:
    """Refuse a layout that does not work over this number of ranks.

    Args:
        run: the run.
        ranks: data-parallel ranks W.
        stage_fixed: whether the user asked for the ZeRO stage. If so, sharding over one rank is an error; if a preset
            asked for it, there is only a remark.

    Returns:
        A remark if the layout shards over one rank, which saves no memory; else None.

    Raises:
        InputError: the backend cannot train on several ranks, or the user asked for sharding over one rank.
    """
    parallel = run.parallel
    parallel.spec.check_mesh(parallel.mesh(ranks))
    if ranks > 1 or parallel.stage == 0 or parallel.offload != "none":
        return None
    if stage_fixed:
        raise InputError(
            f"zero_stage {parallel.stage} shards over ranks, but there is only one rank; give --gpus 2 or more, "
            "or --backend plain (or --zero_stage 0)"
        )
    return f"{parallel.backend} stage {parallel.stage} shards nothing over one rank; --backend plain is simpler there"


def check_optimizer(run: RunConfig) -> None:
    """Refuse a layout under which the run's optimizer does not work.

    Raises:
        InputError: for example Muon with offload, or with DeepSpeed's sharding.
    """
    reason = optimizer_unfit(run.train.optimizer, run.parallel)
    if reason:
        raise InputError(reason)


def check_attention(run: RunConfig, precision: str, card: Card | None) -> None:
    """Refuse an attention kernel that cannot train the run, if the user asked for it; ``auto`` is never refused.

    Raises:
        InputError: the kernel does not support the card, the dtype, the head size or the dropout.
    """
    wanted = run.train.attention
    reason = unfit(wanted, replace(run, train=run.train.changed(precision=precision)), card)
    if reason:
        raise InputError(f"attention {wanted} {reason}; use --attention auto")


def with_prepared_tokenizer(run: RunConfig, given: Collection[str]) -> RunConfig:
    """The run with the tokenizer of its prepared tokens, as the trainer takes it, if they are on this machine.

    Only the sidecar of ScaleGPT's own tokens is read. A tokenizer that the user gives is kept.

    Args:
        run: the run.
        given: names of the settings that a flag or a configuration file gives.
    """
    if "tokenizer" in given:
        return run
    found = next((made for source in run.data.sources if (made := prepared_with(source.text)) is not None), None)
    return run if found is None else replace(run, data=run.data.changed(tokenizer=found.setting))


def with_expected_vocabulary(run: RunConfig, given: Collection[str]) -> RunConfig:
    """The run with the vocabulary size that it will probably have when its data are read.

    A vocabulary size that the user gives is kept. Otherwise every tokenizer except ``gpt2`` replaces the preset's size.
    For ``char`` the size depends on the text: it is that of prepared tokens, if they are here, else the size of ``byte`` is
    assumed.

    Args:
        run: the run; a vocabulary size of 0 means that the tokenizer decides.
        given: names of the settings that a flag or a configuration file gives; settings from a preset do not count.

    Raises:
        InputError: the tokenizer is a file that cannot be read, or that has more ids than the vocabulary that is given.
    """
    kind, size = run.data.tokenizer, run.model.vocab_size
    keeps = bool(size) and ("vocab_size" in given or kind == "gpt2")
    if is_file(kind):
        tokens = vocabulary_size(kind)
        if keeps and size < tokens:
            raise InputError(
                f"tokenizer {one_line(kind)} has {tokens:,} ids, more than vocab_size {size:,}; give --vocab_size auto, or "
                f"another --tokenizer"
            )
        return run if keeps else run.with_vocab(padded_vocabulary(tokens))
    if keeps:
        return run
    if kind == "gpt2":
        return run.with_vocab(padded_vocabulary(TOKENS["gpt2"]))
    made = [found for source in run.data.sources if (found := prepared_with(source.text)) and found.setting == kind]
    return run.with_vocab(made[0].size if made else TOKENS["byte"])


def vocabulary_remark(run: RunConfig) -> str | None:
    """A remark if the model's vocabulary is smaller than the tokenizer's, since training may then refuse text; else None.

    A file with more ids than a given vocabulary is refused by :func:`with_expected_vocabulary`, even if no text needs them.
    """
    kind, size = run.data.tokenizer, run.model.vocab_size
    tokens = TOKENS.get(kind, 0)
    if size >= tokens:
        return None
    others = "" if kind == "byte" else " or --tokenizer byte"
    return (
        f"the {kind} tokenizer has {tokens:,} tokens and the model {size:,}: the trainer refuses text that needs more; give "
        f"data that were prepared with at most {size:,} tokens, --vocab_size auto{others}"
    )
