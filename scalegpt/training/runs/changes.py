"""What of a run's settings may be otherwise when it goes on, what needs a word of the user, and how each is told."""

from collections.abc import Iterable
from typing import Any

from scalegpt.config.optimizers import OWN_SETTINGS
from scalegpt.config.run import SECTIONS
from scalegpt.config.train import LENGTHS, TrainConfig

FREE_TO_CHANGE = frozenset({
    "name", "preset", "backend", "zero_stage", "offload", "ds_config", "micro_batch", "max_iters", "max_tokens",
    "max_minutes", "fused", "recompute", "loss", "loss_chunk", "attention", "compile", "eval_every", "eval_tokens",
    "sample_every", "sample_tokens", "sample_prompt", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
    "keep_best", "async_checkpoint", "log_every", "input_file", "max_skipped_in_a_row", "on_spike", "spike_window",
    "spike_factor", "max_rollbacks", "first_step_timeout", "step_timeout", "on_oom", "as_text", "follow_links",
})  # fmt: skip
"""Settings that a resumed run may have otherwise: they do not change what is computed, or only how long.

The file of the text may have moved, and be read by other rules; that its tokens are the same is checked by themselves."""

UNTOLD = frozenset({"name", "preset", "as_text", "follow_links"})
"""What the settings are called, and how the files were chosen that gave the tokens: a difference alone has no effect."""

SHAPES_THE_WEIGHTS = frozenset({"n_layer", "n_embd", "block_size", "vocab_size", "bias", "tie_head"})
"""Settings that no word of the user can change in a run: its weights would not fit."""


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """The settings that two configurations have otherwise and must not, each as ``old → new``."""
    old, new = _as_resolved(theirs), _flat(ours)
    return {key: text for key, text in _all(old, new).items() if key not in _free(old, new)}


def free_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """The settings that two configurations have otherwise and may, each as ``old → new``, with what follows from it."""
    old, new = _as_resolved(theirs), _flat(ours)
    found = {key: text for key, text in _all(old, new).items() if key in FREE_TO_CHANGE - UNTOLD}
    if new.get("schedule") != "constant":
        for key in found.keys() & LENGTHS:
            found[key] += " (the learning rate's schedule follows)"
    return found


def length_beside(ours: TrainConfig, theirs: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """The length that an earlier process of the run had beside the one that is given now; empty where there is none.

    Earlier releases let the default, or a preset's length, stand beside a given one. A run that began so keeps its length as
    long as the given one is the same.
    """
    same = [key for key in LENGTHS if getattr(ours, key) is not None and theirs.get(key) == getattr(ours, key)]
    beside = [key for key in LENGTHS if getattr(ours, key) is None and key not in given and theirs.get(key) is not None]
    return {key: theirs[key] for key in beside} if same else {}


def ways_out(changes: Iterable[str], allowed: Iterable[str] = ()) -> str:
    """What to do about differences that are not allowed.

    Args:
        changes: the settings that differ.
        allowed: what the user has allowed already, which a flag without it would take back.
    """
    beside = "choose another --model_name, or --fresh to start anew beside it"
    keys = list(changes)
    if SHAPES_THE_WEIGHTS.isdisjoint(keys):
        goes_on = f"{allow_change(keys, allowed)} goes on with {'them' if len(keys) > 1 else 'it'}"
        return f"{goes_on}; or {beside}"
    return beside


def allow_change(keys: Iterable[str], allowed: Iterable[str]) -> str:
    """The flag that allows these keys besides those that the user has allowed already."""
    return f"--allow_change {','.join([*sorted(allowed), *(key for key in keys if key not in set(allowed))])}"


def _all(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    keys = {**old, **new}
    return {key: f"{old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)}


def _free(old: dict[str, Any], new: dict[str, Any]) -> frozenset[str]:
    """What may differ: also the settings of optimizers that the run does not have. A change of the optimizer says it all."""
    before, after = (OWN_SETTINGS.get(str(values.get("optimizer")), frozenset()) for values in (old, new))
    others = frozenset().union(*OWN_SETTINGS.values()) - (before & after)
    return FREE_TO_CHANGE | others


def _as_resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run; one that did not exist when the run began has its default."""
    defaults = {key: field.default for section in SECTIONS.values() for key, field in section.settings().items()}
    return {**defaults, **_flat(values)}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat
