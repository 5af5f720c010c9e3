"""Every layout on one, two and three ranks holds the same canonical state: taken in and given out bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks

WORKER = Path(__file__).with_name("canonical_worker.py")
# Nothing divides by two or three: widths, vocabulary, the elements of a tensor, those of a whole group.
SHAPE = {"n_layer": 1, "n_embd": 257, "n_head": 1, "block_size": 7, "vocab_size": 67, "bias": True, "tie_head": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"fsdp-{stage}": {"backend": "fsdp", "zero_stage": stage} for stage in (0, 2, 3)},
    **{f"deepspeed-{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
}
OFFLOADED: dict[str, dict[str, Any]] = {
    "fsdp-3 offloaded": {**LAYOUTS["fsdp-3"], "offload": "all"},
    **{
        f"deepspeed-{stage} offloaded": {**LAYOUTS[f"deepspeed-{stage}"], "offload": "optimizer"} for stage in (1, 2, 3)
    },
    "deepspeed-3 all offloaded": {**LAYOUTS["deepspeed-3"], "offload": "all"},
}


def probe(layouts: dict[str, Any], folder: Path, ranks: int, **shared: Any) -> Any:
    folder.mkdir(exist_ok=True)
    return run_ranks(WORKER, ranks, {"layouts": layouts, "shared": {**SHAPE, **shared}}, folder)


def assert_exact(results: Any, tolerance: float) -> None:
    losses = [loss for result in results.values() for loss in result["losses"]]
    for layout, result in results.items():
        assert set(result["found"]) == {result["expected"]}, layout
        assert result["initial"] not in {result["expected"], result["stepped"]}, layout
        assert result["stepped"] != result["expected"], layout
    assert max(losses) - min(losses) <= tolerance * min(losses)
    assert len({result["initial"] for result in results.values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_layout_takes_in_and_gives_out_the_same_state(tmp_path: Path, ranks: int) -> None:
    plain = {"plain": {"backend": "plain"}} if ranks == 1 else {}
    results = probe({**plain, **LAYOUTS}, tmp_path, ranks, precision="fp32")
    assert_exact(results, 1e-6)
    for layout, result in results.items():
        if layout not in {"fsdp-2", "fsdp-3"}:  # even shares except for padding; FSDP2 shares whole rows
            assert abs(result["pieces"] - result["total"] / ranks) <= 3 * 64, layout


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_muons_state_is_one_moment_of_matrices(tmp_path: Path, ranks: int) -> None:
    plain = {"plain": {"backend": "plain"}} if ranks == 1 else {}
    layouts = {name: LAYOUTS[name] for name in ("fsdp-0", "fsdp-2", "fsdp-3", "deepspeed-0")}
    results = probe({**plain, **layouts}, tmp_path, ranks, precision="fp32", optimizer="muon")
    assert_exact(results, 1e-6)
    # 12 H² elements of a block have two tensors, all others three.
    total = {result["total"] for result in results.values()}
    parameters = (67 + 7 + 67) * 257 + 12 * 257**2 + 13 * 257 + 2 * 257
    assert total == {3 * parameters - 12 * 257**2}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_copies_follow_exact_masters(tmp_path: Path, precision: str) -> None:
    layouts = {**LAYOUTS, **(OFFLOADED if precision == "bf16" else {})}
    assert_exact(probe(layouts, tmp_path, 2, precision=precision), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fewer_shards_than_ranks_hold_the_same_state(tmp_path: Path, precision: str) -> None:
    """Two replicas of two shards; and second copies of weights, which must not outlive the weights."""
    sized = {
        name: {**{**LAYOUTS, **OFFLOADED}[name], "shard_size": 2}
        for name in ("fsdp-2", "fsdp-3", "fsdp-3 offloaded", "deepspeed-3", "deepspeed-3 offloaded")
    }
    whole = {"whole": LAYOUTS["fsdp-3"]}
    results = probe({**sized, **whole}, tmp_path, 4, precision=precision)
    assert_exact(results, 1e-6 if precision == "fp32" else 1e-2)
    assert len({result["expected"] for result in results.values()}) == 1
