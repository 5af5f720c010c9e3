"""The keys that a user's DeepSpeed file may have: the plan counts their effect, or they have none on it.

Read from deepspeed 0.19 (``runtime/config.py``, ``runtime/constants.py``, ``runtime/zero/config.py``,
``runtime/precision_config.py``, ``monitor/config.py``). DeepSpeed ignores unknown keys at the top level. Many known
keys make it write files outside the run's folder, hold memory that the plan does not count, or change the training.
Such a key is refused by name, unless it is switched off.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from scalegpt.errors import InputError, nearest
from scalegpt.text import visible

AUTO = "auto"

Check = Callable[[Any], str | None]
"""A check of a value: it returns None if the value is allowed, else words that say what the value must be."""

_LARGEST = 2**62


def whole(least: int = 0, *, multiple: int = 1) -> Check:
    """Make a check that a value is a whole number (also 5e8), at least ``least`` and a multiple of ``multiple``."""
    words = f"a whole number of at least {least}" + (f", a multiple of {multiple}" if multiple > 1 else "")

    def check(value: Any) -> str | None:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        fits = number and value == int(value) and least <= value <= _LARGEST and int(value) % multiple == 0
        return None if fits else words

    return check


def number(value: Any) -> str | None:
    """Check that a key's value is a number and not negative."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return None if fits else "a number of at least 0"


def flag(value: Any) -> str | None:
    """Check that a key's value is true or false."""
    return None if isinstance(value, bool) else "true or false"


def one_of(*allowed: Any) -> Check:
    """Make a check that a key's value equals one of ``allowed`` and has the same type."""

    def check(value: Any) -> str | None:
        fits = any(value == each and type(value) is type(each) for each in allowed)
        return None if fits else " or ".join(_as_json(each) for each in dict.fromkeys(allowed))

    return check


_DTYPE = one_of("fp32", "bf16", "fp16")

_OFFLOAD: Mapping[str, Any] = {
    "device": one_of("cpu", "none", "nvme"),  # compared with --offload afterwards
    "nvme_path": one_of(None),
    "ratio": one_of(1, 1.0),
    "pin_memory": flag,
    **dict.fromkeys(("buffer_count", "buffer_size", "max_in_cpu"), whole()),  # without effect: they concern NVMe only
    **dict.fromkeys(("pipeline_read", "pipeline_write", "fast_init", "super_offload"), one_of(False)),
}

ALLOWED: Mapping[str, Any] = {
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), whole(1)
    ),
    **dict.fromkeys(("zero_allow_untested_optimizer", "managed_gradient_accumulation"), one_of(True)),
    **dict.fromkeys(
        ("zero_force_ds_cpu_optimizer", "prescale_gradients", "sparse_gradients", "disable_allgather",
         "disable_python_gc"),
        one_of(False),
    ),
    **dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), flag),
    "gradient_clipping": number,
    "communication_data_type": _DTYPE,
    "gradient_predivide_factor": one_of(1, 1.0),
    "gradient_allreduce_op": one_of("mean"),
    "steps_per_print": lambda value: None if value is None else whole(1)(value),
    "bf16": {
        **dict.fromkeys(("enabled", "immediate_grad_update", "check_grad_overflow"), flag),
        **dict.fromkeys(("bf16_master_weights_and_grads", "bf16_optimizer_states"), one_of(False)),
    },
    "fp16": {
        **dict.fromkeys(("enabled", "consecutive_hysteresis"), flag),
        **dict.fromkeys(("auto_cast", "fp16_master_weights_and_grads"), one_of(False)),
        **dict.fromkeys(("loss_scale_window", "hysteresis", "min_loss_scale"), whole(1)),
        "loss_scale": one_of(0, 0.0),
        "initial_scale_power": whole(),
    },
    "data_types": {"grad_accum_dtype": _DTYPE},
    "comms_logger": dict.fromkeys(("enabled", "verbose", "prof_all", "debug"), flag),
    "zero_optimization": {
        "stage": one_of(0, 1, 2, 3),
        "allgather_bucket_size": whole(2, multiple=2),
        **dict.fromkeys(("reduce_bucket_size", "sub_group_size", "zero_hpz_partition_size"), whole(1)),
        **dict.fromkeys(
            ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters",
             "stage3_max_reuse_distance"),
            whole(),
        ),
        **dict.fromkeys(("overlap_comm", "ignore_unused_parameters", "load_from_fp32_weights"), flag),
        **dict.fromkeys(  # DeepSpeed's own checkpoints are never written
            ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"), flag
        ),
        **dict.fromkeys(
            ("contiguous_gradients", "reduce_scatter", "allgather_partitions", "use_multi_rank_bucket_allreduce",
             "memory_efficient_linear", "compute_grad_norm", "override_module_apply"),
            one_of(True),
        ),
        **dict.fromkeys(
            ("round_robin_gradients", "elastic_checkpoint", "legacy_stage1", "zero_quantized_weights",
             "zero_quantized_gradients", "zero_quantized_nontrainable_weights"),
            one_of(False),
        ),
        **dict.fromkeys(("offload_optimizer", "offload_param"), _OFFLOAD),
    },
}  # fmt: skip
"""Key → the check of its value or, if the value is an object, a mapping of the object's keys.

Some keys allow a single value, because the plan does not count the effect of others.
"""

_BY_FLAGS = "the run's own flags set it"
_FILES = "it writes files outside of the run's folder; metrics.jsonl has the run's figures"
_CHECKPOINTS = "the trainer writes its own checkpoints, in the run's folder"
_COUNTED = "the plan does not model its effect"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("optimizer", "scheduler", "vocabulary_size"), _BY_FLAGS),
    **dict.fromkeys(("csv_monitor", "tensorboard", "wandb", "comet", "flops_profiler", "autotuning"), _FILES),
    **dict.fromkeys(("checkpoint", "nebula", "datastates_ckpt", "data_states", "veloc"), _CHECKPOINTS),
    **dict.fromkeys(("amp", "torch_autocast", "bfloat16"), "use --precision"),
    **dict.fromkeys(("activation_checkpointing",), "use --recompute"),
    **dict.fromkeys(("compile",), "use --compile"),
    **dict.fromkeys(("data_efficiency", "curriculum_learning", "dataloader_drop_last"), "the trainer orders its data itself"),
    **dict.fromkeys(
        (
            "aio", "compression_training", "weight_quantization", "quantize_training", "progressive_layer_drop", "eigenvalue",
            "sparse_attention", "hybrid_engine", "pipeline", "tensor_parallel", "expert_parallel",
            "sequence_parallel_size", "seq_parallel_communication_data_type", "use_data_before_expert_parallelism",
            "elasticity", "timers", "log_level", "curriculum_seqlen", "zenflow", "leaf_module",
            "parameter_alignment",
            "stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
            "stage3_model_persistence_threshold", "pipeline_loading_checkpoint",
            "log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory", "param_dtype",
            "buffer_dtype", "keep_in_fp32_modules", "cpuadam_cores_perc",
        ),
        _COUNTED,
    ),
    **dict.fromkeys(
        ("mics_shard_size", "mics_hierarchical_params_gather"), "DeepSpeed 0.19 has no MiCS; use --backend fsdp --shard_size"
    ),
    **dict.fromkeys(("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory"), "use --offload"),
}  # fmt: skip
"""Key of DeepSpeed that is refused → the reason."""


def checked(settings: Mapping[str, Any], file: object) -> dict[str, Any]:
    """Check a file's settings, and return them without the sections that are refused unless switched off.

    Args:
        settings: the settings in the file.
        file: the file's name, for messages.

    Raises:
        InputError: a key is unknown or refused, or a key's value is not allowed.
    """
    return _checked(settings, ALLOWED, f"ds_config {file}", "")


def _checked(settings: Mapping[str, Any], allowed: Mapping[str, Any], file: str, prefix: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        name = visible(f"{prefix}{key[:60]}")
        if key not in allowed:
            if key in REFUSED and _is_off(value):
                continue
            raise InputError(f"{file}: {name} {_refusal(key, allowed)}")
        rule = allowed[key]
        if isinstance(rule, Mapping):
            if value is not None and not isinstance(value, dict):
                raise InputError(f"{file}: {name} must be an object of settings, not {_as_json(value)}")
            kept[key] = None if value is None else _checked(value, rule, file, f"{prefix}{key}.")
            continue
        wanted = None if value == AUTO else rule(value)
        if wanted is not None:
            raise InputError(f"{file}: {name} must be {wanted}, not {_as_json(value)}")
        kept[key] = int(value) if isinstance(value, float) and value == int(value) else value
    return kept


def _refusal(key: str, allowed: Mapping[str, Any]) -> str:
    if key in REFUSED:
        return f"is not accepted: {REFUSED[key]}; remove it"
    hint = nearest(key[:60], allowed)
    return f"is unknown{hint if 'did you mean' in hint else '; remove it'}"


def _is_off(value: Any) -> bool:
    """Whether a section of the file is off: null, false, empty, or with ``"enabled": false``."""
    return value in (None, False, {}) or (isinstance(value, dict) and value.get("enabled") is False)


def _as_json(value: Any) -> str:
    """A value as JSON, shortened for messages."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return visible(reprlib.repr(value))
