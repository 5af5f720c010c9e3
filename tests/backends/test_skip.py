"""A refused step: every rank skips it, and later steps are as if it had not been tried."""

from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("skip_worker.py")
SHAPE = {"n_layer": 2, "n_embd": 45, "n_head": 3, "block_size": 16, "vocab_size": 67, "learning_rate": 3e-3}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"fsdp-{stage}": {"backend": "fsdp", "zero_stage": stage} for stage in (0, 2, 3)},
    **{f"deepspeed-{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
}
OFFLOADED = {
    "fsdp-3, offload": {"backend": "fsdp", "zero_stage": 3, "offload": "all"},
    **{
        f"deepspeed-{stage}, offload": {"backend": "deepspeed", "zero_stage": stage, "offload": "optimizer"}
        for stage in (1, 2, 3)
    },
}
KINDS = ["loss and gradient", "gradient", "loss alone"]


def check(folder: Path, ranks: int, layouts: dict[str, Any], kinds: list[str], **shared: Any) -> None:
    task = {"layouts": layouts, "kinds": kinds, "shared": {**SHAPE, **shared}}
    results = run_ranks(WORKER, ranks, task, folder)
    assert len(results) == len(layouts) * len(kinds)
    for name, result in results.items():
        left_out = sorted({2, *result["also skipped without"]})
        assert result["skipped"] == [left_out] * ranks, name
        assert result["unchanged"], f"{name}: the bad step changed weights, moments or the loss scale"
        assert result["losses"], f"{name}: the losses after the bad step are not those without it"
        assert result["state"], f"{name}: the last state is not that of a run without the bad step"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_alone_makes_all_leave_the_step_out(tmp_path: Path, precision: str) -> None:
    check(tmp_path, 2, LAYOUTS, KINDS, precision=precision)


@pytest.mark.slow
def test_offloaded_gradients_are_forgotten_too(tmp_path: Path) -> None:
    check(tmp_path, 2, OFFLOADED, KINDS, precision="bf16")


@pytest.mark.slow
def test_replicas_and_second_copies_leave_it_out_too(tmp_path: Path) -> None:
    """A replica's partial sums of gradients are forgotten, and second copies of weights still hold."""
    layouts = {f"fsdp-{stage}, 2 x 2": {**LAYOUTS[f"fsdp-{stage}"], "shard_size": 2} for stage in (2, 3)}
    layouts["deepspeed-3, second copy"] = {**LAYOUTS["deepspeed-3"], "shard_size": 2}
    check(tmp_path, 4, layouts, KINDS, precision="bf16")


@pytest.mark.slow
def test_a_bad_loss_does_not_move_the_loss_scale(tmp_path: Path) -> None:
    on_cpu = {name: flags for name, flags in LAYOUTS.items() if flags["backend"] == "fsdp"}  # DeepSpeed: on CUDA only
    check(tmp_path, 2, on_cpu, ["loss alone"], precision="fp16")


def test_a_process_alone_leaves_it_out(tmp_path: Path) -> None:
    check(tmp_path, 1, {"plain": {"backend": "plain"}}, KINDS, precision="bf16")
