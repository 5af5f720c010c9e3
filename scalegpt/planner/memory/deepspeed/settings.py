"""DeepSpeed's configuration: the files in ``ds_configs/`` with a value that suits the model for every ``"auto"``.

DeepSpeed's defaults suit models a hundred times larger. Its reduce bucket of 5e8 elements is allocated whatever the model's
size (twice with ``overlap_comm``), and its stage 3 keeps up to 1e9 gathered parameters alive: a model below a billion
parameters stays gathered (deepspeed 0.19, ``runtime/zero/config.py``, ``stage_1_and_2.py: setup_buckets``,
``partitioned_param_coordinator.py``). The values here follow from the model:

- a bucket holds one block's parameters, so messages still have tens of megabytes;
- stage 3 prefetches one block, and may keep two blocks and the embedding alive; nothing is kept for reuse. DeepSpeed's
  limit does not count its flat gather buffers, so up to 1.25 blocks more are live (see ``gather``);
- stage 1 adds each bf16 gradient to its fp32 sum as soon as it is made, which saves 2 bytes a parameter;
- stage 3 keeps norms and biases whole on every rank, since they are too small to be worth a message.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from scalegpt.architecture.counting import count_parameters
from scalegpt.config.presets import bundled
from scalegpt.config.run import ParallelConfig, RunConfig
from scalegpt.errors import InputError, nearest
from scalegpt.planner.memory.deepspeed.keys import AUTO, checked
from scalegpt.planner.memory.tensors import ModelShapes, numel
from scalegpt.storage import read_text
from scalegpt.structured import CONFIG_LIMIT, parse_json
from scalegpt.text import shown

_BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")

Settings = dict[str, Any]


def deepspeed_settings(run: RunConfig, *, grad_accum: int, ranks: int, on_cuda: bool) -> Settings:
    """The complete configuration that the trainer gives DeepSpeed, and that the planner counts with.

    Args:
        run: a run whose precision is resolved and whose backend is ``deepspeed``.
        grad_accum: micro batches per optimizer step.
        ranks: data-parallel ranks W.
        on_cuda: whether the run is on CUDA: a CPU neither needs pinned memory nor overlaps communication.

    Raises:
        InputError: the file is missing or broken, or contradicts the run's settings.
    """
    settings = load_ds_config(run.parallel)
    _fill_batch(settings, run, grad_accum, ranks)
    _fill_precision(settings, run)
    _fill_zero(settings, run, overlap=on_cuda and ranks > 1)
    copy_over = run.parallel.mesh(ranks).copy_over or 1
    _fill(settings["zero_optimization"], "zero_hpz_partition_size", copy_over, "--shard_size")
    _fill_offload(settings["zero_optimization"], run.parallel, pin=on_cuda)
    left = sorted(_autos(settings))
    if left:
        raise InputError(f'ds_config {_name(run.parallel)}: "auto" is not supported for {", ".join(left)}; set a value')
    return settings


def load_ds_config(parallel: ParallelConfig) -> Settings:
    """The settings in the run's DeepSpeed file, without the sections that are refused unless switched off.

    Raises:
        InputError: the file is missing, is not JSON, has keys that are refused, or its stage is not the run's.
    """
    path = _path(parallel)
    try:
        settings = parse_json(_text(path, path.stat().st_mtime_ns), f"ds_config {path}")
    except OSError as error:
        ours = [entry.name for entry in bundled("ds_configs").glob("*.json")]
        raise InputError(f"ds_config {path}: {error.strerror}{nearest(path.name, ours)}") from None
    except UnicodeDecodeError:
        raise InputError(f"ds_config {path} is not a text file; give a JSON file") from None
    if not isinstance(settings, dict):
        raise InputError(f"ds_config {path} must hold an object, as ds_configs/zero{parallel.stage}.json does")
    settings = checked(settings, path)
    zero = _part(settings, "zero_optimization")
    _fill(zero, "stage", parallel.stage)
    stage = zero["stage"]
    if stage != parallel.stage:
        raise InputError(
            f"ds_config {path} is for ZeRO stage {shown(stage)}, but the run is for {parallel.stage}; "
            f"use --zero_stage {shown(stage)} or another --ds_config"
        )
    return settings


def fixes_batch(parallel: ParallelConfig) -> bool:
    """Whether the run's DeepSpeed file fixes a batch size or the accumulation, which may contradict the run's settings.

    Raises:
        InputError: as for :func:`load_ds_config`.
    """
    settings = load_ds_config(parallel)
    return any(settings.get(key, AUTO) != AUTO for key in _BATCH)


@lru_cache(maxsize=64)
def _text(path: Path, _changed: int) -> str:
    """The text of a file, cached by its time of change, since a search asks for it hundreds of times."""
    return read_text(path, CONFIG_LIMIT)


def _part(settings: Settings, key: str) -> Settings:
    """The object under ``key`` of the settings; if there is none, an empty object is added."""
    if settings.get(key) is None:
        settings[key] = {}
    part: Settings = settings[key]
    return part


def _path(parallel: ParallelConfig) -> Path:
    given = Path(_name(parallel))
    if parallel.ds_config is None:  # the bundled file, whatever lies in the current folder
        return bundled("ds_configs") / given
    return given if given.exists() else bundled("ds_configs") / given.name if given.name == str(given) else given


def _name(parallel: ParallelConfig) -> str:
    return parallel.ds_config or f"zero{parallel.stage}.json"


def _fill(settings: Settings, key: str, value: Any, what: str | None = None) -> None:
    """Set an ``auto`` or absent entry to ``value``.

    If ``what`` (the flag behind ``value``) is given, refuse other values.
    """
    fixed = settings.get(key, AUTO)
    if fixed == AUTO:
        settings[key] = value
    elif what is not None and fixed != value:
        raise InputError(f'ds_config fixes {key} at {shown(fixed)}, but {what} sets it to {value}; write "auto" there')


def _fill_batch(settings: Settings, run: RunConfig, grad_accum: int, ranks: int) -> None:
    micro = run.train.micro_batch
    _fill(settings, "train_micro_batch_size_per_gpu", micro, "--micro_batch")
    _fill(settings, "gradient_accumulation_steps", grad_accum, "--tokens_per_step")
    _fill(settings, "train_batch_size", micro * grad_accum * ranks, "--tokens_per_step")
    # At stage 0 the trainer clips, so that it knows the norm (see the backend).
    ours = run.parallel.stage == 0 and run.train.precision != "fp16"
    _fill(settings, "gradient_clipping", 0.0 if ours else run.train.grad_clip, "--grad_clip")


def _fill_precision(settings: Settings, run: RunConfig) -> None:
    precision, stage = run.train.precision, run.parallel.stage
    # At stage 0 the engine stays fp32 and the model computes in bf16 by itself.
    in_bf16 = precision == "bf16" and stage > 0
    _fill(_part(settings, "bf16"), "enabled", in_bf16, "--precision")
    # Without immediate updates, stage 1 would hold all bf16 gradients beside the fp32 ones until the backward pass ends.
    _fill(_part(settings, "bf16"), "immediate_grad_update", in_bf16 and stage == 1)
    # Without this check, stages 1 and 2 would take a step with NaN in its gradients.
    _fill(_part(settings, "bf16"), "check_grad_overflow", True, "the guard against non-finite gradients")
    fp16 = _part(settings, "fp16")
    _fill(fp16, "enabled", precision == "fp16", "--precision")
    for key, value in (("loss_scale", 0), ("initial_scale_power", 16), ("loss_scale_window", 1000), ("hysteresis", 1)):
        _fill(fp16, key, value)
    accumulate = "fp16" if precision == "fp16" and stage == 0 else "fp32"  # the unfused fp16 wrapper knows no other
    _fill(_part(settings, "data_types"), "grad_accum_dtype", accumulate)
    _fill(settings, "communication_data_type", "fp32")


def _fill_zero(settings: Settings, run: RunConfig, *, overlap: bool) -> None:
    zero, model = settings["zero_optimization"], run.model
    block = count_parameters(model).layer.total
    values = {"overlap_comm": overlap, "contiguous_gradients": True, "reduce_bucket_size": block}
    if run.parallel.stage == 3:
        values |= {
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 2 * block + model.vocab_size * model.n_embd,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": max(4 * model.n_embd, *map(numel, ModelShapes.of(model).vectors)),
            "sub_group_size": 1_000_000_000,
        }
    else:
        even = block + block % 2  # DeepSpeed refuses an odd bucket; an odd width would give one
        values |= {"reduce_scatter": True, "allgather_bucket_size": even}
    for key, value in values.items():
        _fill(zero, key, value)
    # DeepSpeed's list of tested optimizers lacks torch's fused AdamW, which is as fast on the CPU as DeepSpeed's own.
    _fill(settings, "zero_allow_untested_optimizer", True)
    _fill(settings, "zero_force_ds_cpu_optimizer", False)


def _fill_offload(zero: Settings, parallel: ParallelConfig, *, pin: bool) -> None:
    wanted = {"offload_optimizer": parallel.offload != "none", "offload_param": parallel.offload == "all"}
    for key, offloaded in wanted.items():
        if offloaded:
            _fill(_part(zero, key), "device", "cpu", "--offload")
            _fill(_part(zero, key), "pin_memory", pin)
        elif zero.get(key) is not None:
            _fill(_part(zero, key), "device", "none", "--offload")


def _autos(settings: Any, prefix: str = "") -> list[str]:
    """Dotted names of all entries that are still ``auto``."""
    if isinstance(settings, dict):
        return [name for key, value in settings.items() for name in _autos(value, f"{prefix}{key}.")]
    return [prefix.rstrip(".")] if settings == AUTO else []
