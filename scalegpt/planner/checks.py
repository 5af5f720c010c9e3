"""What cannot work on a machine, refused before anything is computed: what is wrong, and what would work.

What cannot work on any machine, such as a stage that the backend does not have, the configuration itself refuses.
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
"""How DeepSpeed, an extra of the package, is installed."""


def resolve_precision(wanted: str, card: Card | None, capability: str | None = None) -> str:
    """The compute dtype's name on a card; ``auto`` is bf16 where the card has it, else fp16, and fp32 on a processor.

    On a processor the trainer measures whether bf16 pays; the plan counts the larger of the two.

    Args:
        wanted: what was asked for.
        card: the card, if it is in the catalogue.
        capability: that of a card that is not; None: not known, it counts as one that has bf16.

    Raises:
        InputError: bf16 on a card that has none.
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
    """Whether this installation can train with a backend: DeepSpeed is an extra of the package."""
    return spec.package is None or find_spec(spec.package) is not None


def installed_backends() -> tuple[str, ...]:
    """The backends that this installation can train with."""
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
        stage_fixed: whether the user asked for the stage; a preset's own stage over one rank is only remarked on.

    Returns:
        A remark on a layout that works and gains nothing, if it is one.

    Raises:
        InputError: several ranks without a backend for them, or sharding over one.
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
    """Refuse a layout that would take another optimizer's step than the one asked for.

    Raises:
        InputError: Muon with offload, or under DeepSpeed's sharding, and the like.
    """
    reason = optimizer_unfit(run.train.optimizer, run.parallel)
    if reason:
        raise InputError(reason)


def check_attention(run: RunConfig, precision: str, card: Card | None) -> None:
    """Refuse an attention kernel that was asked for and that the card has not; ``auto`` takes one that it has.

    Raises:
        InputError: the card, dtype, head size or dropout is not one that the kernel serves.
    """
    wanted = run.train.attention
    reason = unfit(wanted, replace(run, train=run.train.changed(precision=precision)), card)
    if reason:
        raise InputError(f"attention {wanted} {reason}; use --attention auto")


def with_expected_vocabulary(run: RunConfig, given: Collection[str]) -> RunConfig:
    """The run with the vocabulary that its data will give it, as far as that is known before they are read.

    Of bytes and characters the tokenizer decides, unless the user does. Characters bring a vocabulary that only the text
    knows; until then it is taken to be as large as that of bytes.

    Args:
        run: the run; a vocabulary of 0 is left to the tokenizer.
        given: the settings that a flag or a configuration file gives; a preset's do not count.
    """
    kind, size = run.data.tokenizer, run.model.vocab_size
    if size and ("vocab_size" in given or kind == "gpt2"):
        return run
    return run.with_vocab(ModelConfig().vocab_size if kind == "gpt2" else TOKENS["byte"])


def vocabulary_remark(run: RunConfig) -> str | None:
    """What to say of a vocabulary that is too small for its tokenizer: the trainer refuses text then. None: it is not."""
    kind, size = run.data.tokenizer, run.model.vocab_size
    tokens = TOKENS.get(kind, 0)
    if size >= tokens:
        return None
    others = "" if kind == "byte" else " or --tokenizer byte"
    return (
        f"the {kind} tokenizer has {tokens:,} tokens and the model {size:,}: the trainer refuses text that needs more; give "
        f"data that were prepared with at most {size:,} tokens, --vocab_size auto{others}"
    )
