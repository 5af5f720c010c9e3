"""Checks that refuse settings which cannot work on a machine, before anything is computed.

Each error says what is wrong and what would work. Settings that work on no machine, such as a stage that the backend does
not have, are refused earlier, by :mod:`scalegpt.config`.
"""

from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec

from scalegpt.config import ModelConfig, RunConfig
from scalegpt.config.backends import BACKENDS, BackendSpec
from scalegpt.config.run import optimizer_unfit
from scalegpt.config.shape import TOKENS
from scalegpt.errors import InputError
from scalegpt.hardware.gpus import CPU_CAPABILITY, Card, has_bf16
from scalegpt.planner.attention import unfit

INSTALL = "pip install 'scalegpt[deepspeed]'"
"""The command that installs DeepSpeed, an optional extra of the package."""


def resolve_precision(wanted: str, card: Card | None, capability: str | None = None) -> str:
    """The name of the compute dtype: ``auto`` is bf16 on cards that have it, fp16 on other cards, fp32 on a CPU.

    On a CPU the trainer may still choose bf16, if it measures that bf16 is faster. The plan assumes fp32, which takes more
    memory.

    Args:
        wanted: the precision that was asked for, or ``auto``.
        card: the card; None where it is not in the catalogue.
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
    """Whether this installation can train with a backend; only DeepSpeed, an optional extra, may be missing."""
    return spec.package is None or find_spec(spec.package) is not None


def installed_backends() -> tuple[str, ...]:
    """The names of the backends that this installation can train with."""
    return tuple(name for name, spec in BACKENDS.items() if is_installed(spec))


def check_installed(backend: str) -> None:
    """Refuse to train with a backend whose package is missing here.

    Raises:
        InputError: DeepSpeed is not installed.
    """
    if not is_installed(BACKENDS[backend]):
        raise InputError(f"backend {backend}: the package is not installed here; {INSTALL}, or use --backend fsdp")


def check_ranks(run: RunConfig, ranks: int, *, stage_fixed: bool = False) -> str | None:
    """Refuse a layout that does not work over this number of ranks.

    Args:
        run: the run.
        ranks: data-parallel ranks W.
        stage_fixed: whether the user asked for the stage. A preset's own stage over one rank gives a remark, not an error.

    Returns:
        A remark if the layout works but gains nothing; else None.

    Raises:
        InputError: the backend cannot train on several ranks, or the user asked for sharding over one rank.
    """
    parallel = run.parallel
    parallel.spec.check_mesh(parallel.mesh(ranks))
    if ranks > 1 or parallel.stage == 0 or parallel.offload != "none":
        return None
    if stage_fixed:
        raise InputError(
            f"zero_stage {parallel.stage} shards over ranks, and there is one; give --gpus 2 or more, "
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
    """Refuse an attention kernel that the user asked for and that cannot train the run; ``auto`` is never refused.

    Raises:
        InputError: the kernel does not support the card, the dtype, the head size or the dropout.
    """
    wanted = run.train.attention
    reason = unfit(wanted, replace(run, train=run.train.changed(precision=precision)), card)
    if reason:
        raise InputError(f"attention {wanted} {reason}; use --attention auto")


def with_expected_vocabulary(run: RunConfig, given: Collection[str]) -> RunConfig:
    """The run with the vocabulary size that its data will give it, as far as it is known before the data are read.

    A vocabulary size that the user gives is kept. Without one, the tokenizers ``byte`` and ``char`` replace a preset's size
    by their own. The size for ``char`` is known only from the text; until then that of ``byte`` is assumed.

    Args:
        run: the run; the tokenizer decides a vocabulary size of 0.
        given: names of the settings that a flag or a configuration file gives; those of a preset do not count.
    """
    kind, size = run.data.tokenizer, run.model.vocab_size
    if size and ("vocab_size" in given or kind == "gpt2"):
        return run
    return run.with_vocab(ModelConfig().vocab_size if kind == "gpt2" else TOKENS["byte"])


def vocabulary_remark(run: RunConfig) -> str | None:
    """A remark if the vocabulary is smaller than its tokenizer's, so that the trainer may refuse text; else None."""
    kind, size = run.data.tokenizer, run.model.vocab_size
    tokens = TOKENS.get(kind, 0)
    if size >= tokens:
        return None
    others = "" if kind == "byte" else " or --tokenizer byte"
    return (
        f"the {kind} tokenizer has {tokens:,} tokens and the model {size:,}: the trainer refuses text that needs more; give "
        f"data that were prepared with at most {size:,} tokens, --vocab_size auto{others}"
    )
