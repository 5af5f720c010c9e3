"""Plan, trace and trainer read what moves memory from one place: each setting is changed in turn, and all three follow.

What the trainer uses is read off the backend that it builds: from the model, the optimizer and FSDP2's own state, and for
DeepSpeed off the configuration that it is started with. That DeepSpeed then does what it says, real steps show
(``test_deepspeed_memory.py``), with the settings of the planner.
"""

import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from scalegpt.backends import Backend, World, build_model, make_backend
from scalegpt.backends.deepspeed import engine as deepspeed_backend
from scalegpt.config import RunConfig
from scalegpt.config.presets import bundled, resolve
from scalegpt.optim.factory import optimizer_factory
from scalegpt.planner.batches import plan_batches
from scalegpt.planner.memory import fsdp as fsdp_memory
from scalegpt.planner.memory.deepspeed.settings import deepspeed_settings
from scalegpt.planner.memory.predict import predict
from scalegpt.planner.memory.step import Prediction
from scalegpt.tracing import trace
from scalegpt.training.setup import prepare

MODEL = {
    "n_layer": 3, "n_embd": 128, "n_head": 4, "block_size": 256, "vocab_size": 2000, "micro_batch": 4, "precision": "bf16",
    "loss_chunk": 128, "backend": "fsdp", "zero_stage": 3,
}  # fmt: skip
RANKS = 8
CPU = World(rank=0, size=RANKS, local_rank=0, local_size=RANKS, device=torch.device("cpu"))


def configure(**flags: Any) -> RunConfig:
    return resolve(flags={**MODEL, **flags})


def built(run: RunConfig) -> Backend:
    """The trainer's backend, on ranks of which only the first exists."""
    with trace.fake_process_group(RANKS):
        model = build_model(run, compiled=False)
        return make_backend(run, CPU, 1, model, optimizer_factory(run.train))


def recompute(backend: Any) -> str:
    how = backend.model.layers[0].recompute
    return "none" if how is None else "selective" if "context_fn" in how.keywords else "full"


def chunk(backend: Any) -> Any:
    """What the loss closes over; the loss over full logits has no chunk."""
    return inspect.getclosurevars(backend.model.loss).nonlocals.get("chunk")


def group(backend: Any) -> Any:
    return backend.model.blocks[0]._get_fsdp_state()._fsdp_param_group


def shard_of_the_head(backend: Any) -> tuple[int, bool]:
    """Rows of the embedding on a rank, and whether a block's weights are given back after its forward pass."""
    reshards = group(backend).post_forward_mesh_info is not None
    return backend.model.wte.weight.to_local().shape[0], reshards


CHANGES: dict[str, tuple[str, Any, Callable[[Any], Any], Any, Any]] = {
    # setting: what it becomes, how the trainer shows it, and what it shows before and after
    "compute dtype": ("precision", "fp32", lambda b: b.model.compute_dtype, torch.bfloat16, torch.float32),
    "what FSDP2 casts to": ("precision", "fp32", lambda b: group(b).mp_policy.param_dtype, torch.bfloat16, torch.float32),
    "residual dtype": ("residual_dtype", "fp32", lambda b: b.model.residual_dtype, torch.bfloat16, torch.float32),
    "selective recompute": ("recompute", "selective", recompute, "none", "selective"),
    "full recompute": ("recompute", "full", recompute, "none", "full"),
    "loss": ("loss", "full", chunk, 128, None),
    "loss chunk": ("loss_chunk", 1024, chunk, 128, 1024),
    "optimizer's form": ("fused", False, lambda b: b.optimizer.defaults["fused"], True, False),
    "optimizer": ("optimizer", "muon", lambda b: type(b.optimizer).__name__, "AdamW", "Muon"),
    "stage 0": ("zero_stage", 0, shard_of_the_head, (250, True), (2000, False)),
    "stage 2": ("zero_stage", 2, shard_of_the_head, (250, True), (250, False)),
    "offload": ("offload", "all", lambda b: group(b).fsdp_params[0].offload_to_cpu, False, True),
    "math": ("attention", "math", lambda b: b.model.layers[0].attn.backend, None, SDPBackend.MATH),
    "mem_efficient": (
        "attention", "mem_efficient", lambda b: b.model.layers[0].attn.backend, None, SDPBackend.EFFICIENT_ATTENTION,
    ),
    "dropout": ("dropout", 0.1, lambda b: b.model.layers[0].dropout, 0.0, 0.1),
}  # fmt: skip


def traced(run: RunConfig) -> dict[str, int]:
    return trace.trace_step(run, ranks=RANKS, grad_accum=2).phases


def planned(run: RunConfig) -> dict[str, int]:
    return predict(run, ranks=RANKS, grad_accum=2).phases


def follow_alike(before: tuple[dict[str, int], ...], after: tuple[dict[str, int], ...]) -> None:
    """Plan and trace change by the same in every phase, and in one by something."""
    changes = [
        {phase: late[phase] - early[phase] for phase in early} for early, late in zip(before, after, strict=True)
    ]
    for phase, change in changes[1].items():
        assert changes[0][phase] == pytest.approx(change, abs=0.003 * before[1][phase] + 8192), phase
    assert max(abs(change) / before[1][phase] for phase, change in changes[1].items()) > 0.005


@cache
def unchanged(*narrow: tuple[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    run = configure(**dict(narrow))
    return planned(run), traced(run)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.slow
def test_plan_trace_and_trainer_follow(name: str) -> None:
    setting, value, shows, before, after = CHANGES[name]
    # The fused kernels keep the same tensors. What they need for themselves shows where heads are narrow.
    shape = (("n_head", 16),) if value == "mem_efficient" else ()
    run = configure(**dict(shape), **{setting: value})
    follow_alike(unchanged(*shape), (planned(run), traced(run)))
    assert (shows(built(configure())), shows(built(run))) == (before, after)


def test_the_dtype_of_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no setting, but it is defined in one place."""
    assert group(built(configure())).mp_policy.reduce_dtype == torch.float32
    before = unchanged()
    monkeypatch.setattr(fsdp_memory, "REDUCE_DTYPE", "bf16")
    follow_alike(before, (planned(configure()), traced(configure())))
    assert group(built(configure())).mp_policy.reduce_dtype == torch.bfloat16


# --- DeepSpeed -------------------------------------------------------------------------------------------------------

ZERO = "zero_optimization"
DEEPSPEED: list[tuple[int, str, str, Any, str]] = [
    (1, "bf16", "immediate_grad_update", False, "none"),
    (2, ZERO, "reduce_bucket_size", 1_000_000, "none"),
    (2, ZERO, "overlap_comm", False, "none"),
    (2, "data_types", "grad_accum_dtype", "bf16", "none"),
    (3, "data_types", "grad_accum_dtype", "bf16", "none"),
    (3, "", "communication_data_type", "bf16", "none"),
    (3, ZERO, "reduce_bucket_size", 1_000_000, "none"),
    (3, ZERO, "stage3_prefetch_bucket_size", 10_000, "none"),
    (3, ZERO, "stage3_max_live_parameters", 10_000_000, "none"),
    (3, ZERO, "stage3_max_reuse_distance", 10_000_000, "none"),
    (3, ZERO, "stage3_param_persistence_threshold", 100_000, "none"),
    (3, ZERO, "sub_group_size", 50_000, "none"),
    (2, ZERO, "offload_optimizer", {"device": "cpu", "pin_memory": False}, "optimizer"),
]


def ours(stage: int, offload: str = "none", **flags: Any) -> RunConfig:
    return configure(backend="deepspeed", zero_stage=stage, offload=offload, n_layer=6, **flags)


def changed_file(folder: Path, stage: int, part: str, key: str, value: Any) -> Path:
    """The stage's own file with one entry changed."""
    settings = json.loads((bundled("ds_configs") / f"zero{stage}.json").read_text())
    (settings[part] if part else settings)[key] = value
    path = folder / "changed.json"
    path.write_text(json.dumps(settings))
    return path


class StartedError(Exception):
    """Raised where DeepSpeed would begin, with the configuration that it was given."""


def started_with(run: RunConfig, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configuration that the trainer starts DeepSpeed with."""

    def initialize(*, config: dict[str, Any], **_: Any) -> None:
        raise StartedError(config)

    utils = SimpleNamespace(set_z3_leaf_modules=lambda *_: None, groups=SimpleNamespace())
    patch.setattr(deepspeed_backend, "_import_deepspeed", lambda _: SimpleNamespace(initialize=initialize, utils=utils))
    patch.setattr(deepspeed_backend, "shard", lambda *_: None)
    settings = prepare._deepspeed_settings(run, plan_batches(run, RANKS, micro_fixed=True), CPU)
    with trace.fake_process_group(RANKS), pytest.raises(StartedError) as started:
        make_backend(run, CPU, 1, build_model(run, compiled=False), optimizer_factory(run.train), settings)
    given: dict[str, Any] = started.value.args[0]
    return given


def figures(prediction: Prediction) -> tuple[dict[str, int], int]:
    return prediction.phases, prediction.host_bytes


@pytest.mark.parametrize(("stage", "part", "key", "value", "offload"), DEEPSPEED)
def test_deepspeed_gets_the_settings_of_the_plan(
    stage: int, part: str, key: str, value: Any, offload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ours(stage, offload, ds_config=str(changed_file(tmp_path, stage, part, key, value)))
    assert figures(predict(run, ranks=RANKS)) != figures(predict(ours(stage, offload), ranks=RANKS))
    given = started_with(run, monkeypatch)
    assert given == deepspeed_settings(run, grad_accum=1, ranks=RANKS, on_cuda=False)
    planned = deepspeed_settings(run, grad_accum=1, ranks=RANKS, on_cuda=True)
    for settings in (given, planned):
        assert (settings[part] if part else settings)[key] == value
