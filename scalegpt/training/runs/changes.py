"""The settings that a resumed run may change freely or with ``--allow_change``, and the effect on its learning rate."""

from collections.abc import Container, Iterable
from typing import Any

from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.architecture.parameters import Shape
from scalegpt.config import ModelConfig
from scalegpt.config.optimizers import OWN_SETTINGS
from scalegpt.config.run import SECTIONS
from scalegpt.config.settings import coerce
from scalegpt.config.tokenizer import same_kind
from scalegpt.config.train import LENGTHS, TrainConfig
from scalegpt.errors import InputError
from scalegpt.training.schedules import decay_start, learning_rate

FREE_TO_CHANGE = frozenset({
    "name", "preset", "backend", "zero_stage", "offload", "shard_size", "ds_config", "micro_batch", "max_iters",
    "max_tokens", "max_minutes", "fused", "recompute", "loss", "loss_chunk", "attention", "compile", "eval_every",
    "eval_tokens", "sample_every", "sample_tokens", "sample_prompt", "checkpoint_every", "checkpoint_dir",
    "checkpoint_minutes",
    "keep_checkpoints", "keep_best", "async_checkpoint", "log_every", "log_to", "profile",
    "profile_ranks", "input_file", "max_skipped_in_a_row", "on_spike", "spike_window",
    "spike_factor", "max_rollbacks", "first_step_timeout", "step_timeout", "on_oom", "text_field",
    "as_text", "include", "exclude", "gitignore", "follow_links", "deduplicate", "shard_tokens", "workers",
})  # fmt: skip
"""Settings that a resumed run may change freely.

They change the speed or the length of the run, not the result of a step.

``input_file`` and the settings by which text is read are among them, since the tokens themselves are compared by their
digest.
"""

UNREPORTED = frozenset({
    "name", "preset", "text_field", "as_text", "include", "exclude", "gitignore", "follow_links",
    "shard_tokens", "workers"})  # fmt: skip
"""Free settings whose change is not reported because it has no effect of its own: names, and how text files are read."""


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The settings that differ between two configurations and need ``--allow_change``, each as ``old → new``."""
    old, new = _as_resolved(earlier), _flat(now)
    return {key: text for key, text in _all(old, new).items() if key not in _free(old, new)}


def differences_of_models(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The settings of the model that differ and on which weights depend, each as ``old → new``.

    These are the only differences that count for a run that has weights and has not been trained.
    """
    free = {"dropout"} if now["model"]["position"] == "learned" else {"dropout", "block_size"}
    found = differences(earlier, now)
    return {key: text for key, text in found.items() if key in ModelConfig.settings() and key not in free}


def free_differences(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """The freely changeable settings that differ between two configurations and are reported, each as ``old → new``."""
    old, new = _as_resolved(earlier), _flat(now)
    found = {key: text for key, text in _all(old, new).items() if key in FREE_TO_CHANGE - UNREPORTED}
    if new.get("schedule") != "constant":
        for key in found.keys() & LENGTHS:
            found[key] += " (the learning rate's schedule follows)"
    return found


def other_length(train: TrainConfig, earlier: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Return {name: value} of the second length limit, if a run began with both ``max_iters`` and ``max_tokens``.

    In earlier releases ``max_iters`` from the default or the preset stayed in force beside a given ``max_tokens``, and
    vice versa. A run that began with such a release keeps both limits.

    Args:
        train: the training settings now, in which one of the limits may be None.
        earlier: the training settings that the run began with.
        given: names of the settings that the user gave now.

    Returns:
        Empty where the run began with one limit, the user now gives both, or the limit in ``train`` is not the earlier one.
    """
    same = [key for key in LENGTHS if getattr(train, key) is not None and earlier.get(key) == getattr(train, key)]
    other = [
        key for key in LENGTHS if getattr(train, key) is None and key not in given and earlier.get(key) is not None
    ]
    return {key: earlier[key] for key in other} if same else {}


def reshaping(earlier: dict[str, Any], now: dict[str, Any]) -> frozenset[str]:
    """The settings whose change gives the weights other shapes. Even ``--allow_change`` cannot change them in a run.

    Args:
        earlier: the configuration of the run so far, as ``config.yaml`` has it.
        now: the configuration to resume with, in the same form.

    Raises:
        InputError: one of the configurations does not describe a valid model.
    """
    old, new = (
        _known_vocabulary(ModelConfig.from_mapping(values.get("model", {}), "config.yaml")) for values in (earlier, now)
    )
    shapes = parameter_shapes(new)
    if parameter_shapes(old) == shapes:
        return frozenset()
    changed = [key for key in ModelConfig.settings() if getattr(old, key) != getattr(new, key)]
    alone = [key for key in changed if _shapes_with(new, key, getattr(old, key)) != shapes]
    return frozenset(alone or changed)


def _known_vocabulary(model: ModelConfig) -> ModelConfig:
    return model.changed(vocab_size=model.vocab_size or 1)


def _shapes_with(model: ModelConfig, key: str, value: Any) -> dict[str, Shape] | None:
    """The shapes of a model's weights with another value of one setting; None if the value is not valid beside the others."""
    try:
        return parameter_shapes(model.changed(**{key: value}))
    except InputError:
        return None


def ways_out(changes: Iterable[str], allowed: Iterable[str] = (), reshaped: Container[str] = ()) -> str:
    """A sentence on what to do about changes that are not allowed.

    Args:
        changes: names of the changed settings that are not allowed.
        allowed: names that ``--allow_change`` has already; the suggested flag repeats them.
        reshaped: names of the settings from :func:`reshaping`.
    """
    beside = "choose another --model_name, or --fresh to start a new run beside it"
    keys = list(changes)
    if not any(key in reshaped for key in keys):
        accept = f"{allow_change(keys, allowed)} resumes with {'them' if len(keys) > 1 else 'it'}"
        return f"{accept}; or {beside}"
    return beside


def allow_change(keys: Iterable[str], allowed: Iterable[str]) -> str:
    """The ``--allow_change`` flag that allows the settings ``keys`` besides those already ``allowed``."""
    return f"--allow_change {','.join([*sorted(allowed), *(key for key in keys if key not in set(allowed))])}"


def _all(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    keys = {**old, **new}
    changes = {key: f"{old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)}
    if same_kind(old.get("tokenizer"), new.get("tokenizer")):  # checkpoints tell whether two files give the same ids
        changes.pop("tokenizer", None)
    return changes


def _free(old: dict[str, Any], new: dict[str, Any]) -> frozenset[str]:
    """Names of the settings that may differ freely between two configurations.

    Besides :data:`FREE_TO_CHANGE`, a setting that only some optimizers have may differ, unless the optimizers of both
    configurations have it. A change of the optimizer therefore counts as one change.
    """
    before, after = (OWN_SETTINGS.get(str(values.get("optimizer")), frozenset()) for values in (old, new))
    others = frozenset().union(*OWN_SETTINGS.values()) - (before & after)
    return FREE_TO_CHANGE | others


def _as_resolved(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run by name, with the default for each setting that did not exist when the run began."""
    defaults = {key: field.default for section in SECTIONS.values() for key, field in section.settings().items()}
    return {**defaults, **_flat(values)}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Setting → value over all sections; a setting that is an object, such as ``rope_scaling``, in its checked form."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= value if isinstance(value, dict) else {key: value}
    fields = {key: field for section in SECTIONS.values() for key, field in section.settings().items()}
    objects = {
        key: coerce(fields[key], value) for key, value in flat.items() if isinstance(value, dict) and key in fields
    }
    return flat | objects


# --- the learning rate -------------------------------------------------------------------------------------------------

SCHEDULE = ("schedule", "learning_rate", "min_lr_ratio", "warmup_steps", "decay_fraction")
"""These settings and the total number of steps decide the learning rate of a step."""

NOTABLE = 0.01
"""A change of the learning rate by at most this share is not reported."""


def rate_change(
    earlier: dict[str, Any] | None, plan: dict[str, Any] | None, train: TrainConfig, step: int, total: int
) -> list[str]:
    """Report how the learning rate of the next step differs from the rate under the run's earlier settings.

    Args:
        earlier: the configuration of the run so far, as ``config.yaml`` has it; None where it is not known.
        plan: the content of ``plan.json``, with the earlier total number of steps; None where it is not known.
        train: the settings that the run resumes with.
        step: number of steps taken.
        total: total number of steps under the new settings.

    Returns:
        A list of one line; empty where the rate stays about the same, the run has taken no step or all of its steps, or
        an argument is None.
    """
    steps_before = (plan or {}).get("steps")
    if not 0 < step < total or earlier is None or type(steps_before) is not int:
        return []
    try:
        known = {key: earlier["train"][key] for key in SCHEDULE if key in earlier["train"]}
        read = TrainConfig.from_mapping({**known, "max_iters": steps_before}, "config.yaml")
    except InputError:  # settings of another release; the differences are reported setting by setting
        return []
    before = train.changed(**{key: getattr(read, key) for key in known})
    expected, rate = learning_rate(before, step, steps_before), learning_rate(train, step, total)
    if abs(rate - expected) <= NOTABLE * expected:
        return []
    last = learning_rate(before, step - 1, steps_before)
    line = (
        f"the learning rate goes from {last:.2e} in step {step:,} to {rate:.2e} in step {step + 1:,}, and is "
        f"{learning_rate(train, total - 1, total):.2e} in step {total:,}, where the {train.schedule} schedule ends now"
    )
    if before != train:  # the user has changed the schedule itself
        return [line]
    return [f"warning: {line}{_ways_to_keep(train, last, step, total)}"]


def keeping(rate: float) -> str:
    """The flags with which a run resumes at the constant learning rate ``rate``."""
    return f"--allow_change schedule,learning_rate --schedule constant --learning_rate {rate:.6g}"


def _ways_to_keep(train: TrainConfig, rate: float, step: int, total: int) -> str:
    if step < train.warmup_steps or rate <= 0:
        return ""
    ways = f"; to stay at {rate:.2e}, add {keeping(rate)}"
    held = train.changed(schedule="wsd", learning_rate=rate)
    if learning_rate(held, step, total) == rate and learning_rate(held, total - 1, total) < rate:
        last_at_peak = decay_start(held, total) + 1  # messages count steps from 1
        ways += f"; with --schedule wsd instead of constant it stays until step {last_at_peak:,} and then falls"
    return ways


def nothing_left_line(step: int, total: int, rate: float, schedule: str) -> str:
    """The line that a run prints if it is started again after its last step.

    Args:
        step: number of steps taken.
        total: number of steps of the run.
        rate: learning rate of the last step; 0: there was none.
        schedule: form of the learning rate's schedule.
    """
    rises = ""
    if rate > 0 and schedule != "constant":
        rises = (
            f" (the learning rate, now {rate:.2e}, then follows the longer schedule; to keep it, add {keeping(rate)})"
        )
    return (
        f"nothing left to do: {step} of {total} steps are taken; a higher --max_iters (or --max_tokens) continues the "
        f"training{rises}; --fresh starts a new run beside this one"
    )
