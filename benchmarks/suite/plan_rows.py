"""The configurations that ``gpu_suite.py plan`` measures."""

from collections.abc import Iterator
from typing import Any

from benchmarks.suite.configuration import Configuration

COMPILED = "compiled: for its blocks the prediction is an upper bound"
MATH = "math attention: the prediction counts flash attention's tensors"
"""Why docs/MEMORY.md promises less of a configuration; such are summed up apart."""

FAKE_RANKS = 8

LARGE = ("150M", "150M_1024", "200M", "200M_1024", "250M", "250M_1024", "350M_1024", "500M_1024")


def torch_rows() -> list[Configuration]:
    """Plain and FSDP2, in the order in which the driver's figure is least disturbed.

    Whatever a process loads stays loaded. So those without a communicator come first: plain, and the fake groups; then FSDP2
    with NCCL, and compiled blocks last, which take longest.
    """
    return [*_plain(), *_fake_group(), *_one_rank(), *_compiled()]


def _plain() -> Iterator[Configuration]:
    for preset in ("tiny", "small"):
        yield Configuration(preset=preset)
    for preset in LARGE:
        yield Configuration(preset=preset)
        if preset == "150M_1024":
            yield from _settings_of_plain(preset)
        elif preset == "350M_1024":
            for flags in ({"micro_batch": 4}, {"micro_batch": 32}, {"recompute": "selective"}):
                yield Configuration(preset=preset, flags=flags)
            yield Configuration(preset=preset, flags={"recompute": "full", "loss": "full"})
    for recompute in ("selective", "full"):
        yield Configuration(preset="500M_1024", flags={"recompute": recompute})
    yield Configuration(preset="500M_1024", grad_accum=2, flags={"micro_batch": 2})


def _settings_of_plain(preset: str) -> Iterator[Configuration]:
    """Each setting that moves memory, one at a time."""
    settings: tuple[dict[str, Any], ...] = (
        {"micro_batch": 1},
        {"micro_batch": 8},
        {"micro_batch": 96},
        {"recompute": "selective"},
        {"recompute": "full"},
        {"loss": "full"},
        {"loss_chunk": 2048},
        {"fused": False},
        {"residual_dtype": "fp32"},
        {"dropout": 0.1},
        {"dropout": 0.1, "recompute": "selective"},
        {"tie_head": False},
        {"bias": True},
        {"precision": "fp16"},
        {"precision": "fp32", "micro_batch": 8},
        {"block_size": 4096, "micro_batch": 6},
        {"attention": "mem_efficient"},
        {"attention": "cudnn"},
    )
    yield Configuration(preset=preset, grad_accum=2)
    for flags in settings:
        yield Configuration(preset=preset, flags=flags)
    yield Configuration(preset=preset, apart=MATH, flags={"attention": "math", "micro_batch": 4})


def _fake_group() -> Iterator[Configuration]:
    for preset in ("500M_1024", "350M_1024", "150M_1024"):
        for stage in (0, 2, 3):
            yield Configuration(preset=preset, backend="fsdp", zero_stage=stage, ranks=FAKE_RANKS)
    for stage, grad_accum, flags in (
        (0, 2, {"fused": False}),
        (2, 2, {}),
        (3, 2, {}),
        (2, 1, {"loss": "full"}),
        (3, 1, {"recompute": "selective"}),
        (3, 1, {"recompute": "full"}),
        (3, 1, {"offload": "all"}),
    ):
        yield Configuration(
            preset="150M_1024", backend="fsdp", zero_stage=stage, ranks=FAKE_RANKS, grad_accum=grad_accum, flags=flags
        )


def _one_rank() -> Iterator[Configuration]:
    for stage in (0, 2, 3):
        yield Configuration(preset="150M_1024", backend="fsdp", zero_stage=stage)
    yield Configuration(preset="350M_1024", backend="fsdp", zero_stage=2, grad_accum=2)
    yield Configuration(preset="500M_1024", backend="fsdp", zero_stage=3)


def _compiled() -> Iterator[Configuration]:
    yield Configuration(preset="150M_1024", compiled=True, apart=COMPILED)
    yield Configuration(preset="350M_1024", compiled=True, apart=COMPILED, flags={"recompute": "selective"})


def deepspeed_rows() -> list[Configuration]:
    """DeepSpeed over one rank: the stages, and what changes their buffers."""
    rows = [Configuration(preset="150M_1024", backend="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)]
    for stage, grad_accum, flags in (
        (1, 1, {"loss": "full"}),
        (1, 2, {}),
        (2, 1, {"recompute": "selective"}),
        (2, 1, {"offload": "optimizer"}),
        (3, 2, {"recompute": "full"}),
    ):
        rows.append(
            Configuration(
                preset="150M_1024", backend="deepspeed", zero_stage=stage, grad_accum=grad_accum, flags=dict(flags)
            )
        )
    rows.append(Configuration(preset="350M_1024", backend="deepspeed", zero_stage=2, grad_accum=2))
    return rows + [Configuration(preset="500M_1024", backend="deepspeed", zero_stage=stage) for stage in (1, 2, 3)]
