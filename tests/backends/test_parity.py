"""All backends and stages compute the same, from the same state, on the same batches."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks
from scalegpt.backends.capabilities import cpu_has_fp16

WORKER = Path(__file__).with_name("parity_worker.py")
STEPS = 20
# Odd sizes: neither the width nor the vocabulary divides by the ranks, so that padded shards are met.
SHAPE = {"n_layer": 2, "n_embd": 45, "n_head": 3, "block_size": 16, "vocab_size": 67, "learning_rate": 3e-3}
PLAIN = {"backend": "plain"}
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"fsdp-{stage}": {"backend": "fsdp", "zero_stage": stage} for stage in (0, 2, 3)},
    **{f"deepspeed-{stage}": {"backend": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "full logits": {"loss": "full"},
    "fp32 residual": {"residual_dtype": "fp32"},
}


def run(layouts: dict[str, list[dict[str, Any]]], folder: Path, ranks: int, **shared: Any) -> Any:
    grad_accum = shared.pop("grad_accum", 2)
    task = {"layouts": layouts, "shared": {**SHAPE, **shared}, "steps": STEPS, "grad_accum": grad_accum}
    folder.mkdir(exist_ok=True)
    return run_ranks(WORKER, ranks, task, folder)


def worst(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def assert_equal_runs(found: Any, expected: Any, tolerance: float) -> None:
    assert worst(found["losses"], expected["losses"]) <= tolerance
    assert worst([found["held_out"]], [expected["held_out"]]) <= tolerance
    assert expected["losses"][-1] < 0.95 * expected["losses"][0], "nothing was learnt: the comparison would say nothing"


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_every_stage_follows_one_plain_process(tmp_path: Path, precision: str, tolerance: float) -> None:
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision=precision, grad_accum=1)["plain"]
    results = run({name: [flags] for name, flags in LAYOUTS.items()}, tmp_path / "two", 2, precision=precision)
    for name in LAYOUTS:
        assert_equal_runs(results[name], plain, tolerance)
        assert worst(results[name]["norms"], plain["norms"]) <= 10 * tolerance, name


MODERN = {
    "n_head": 6, "n_kv_head": 3, "head_size": 10, "position": "rope", "qk_norm": True, "norm": "rmsnorm", "bias": "qkv",
}  # fmt: skip


@pytest.mark.slow
def test_rotary_positions_and_grouped_queries_are_the_same_under_every_layout(tmp_path: Path) -> None:
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp32", grad_accum=1, **MODERN)["plain"]
    layouts = {name: [flags] for name, flags in LAYOUTS.items()}
    assert_equal_to(plain, run(layouts, tmp_path / "two", 2, precision="fp32", **MODERN))


@pytest.mark.slow
def test_rotary_positions_and_grouped_queries_recompute_and_move_to_the_same(tmp_path: Path) -> None:
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp32", grad_accum=1, **MODERN)["plain"]
    layouts: dict[str, list[dict[str, Any]]] = {"moved": [LAYOUTS["deepspeed-3"], LAYOUTS["fsdp-2"]]}
    layouts["compiled"] = [{**LAYOUTS["fsdp-3"], "compile": "on", "recompute": "selective"}]
    layouts["recomputed"] = [{**LAYOUTS["deepspeed-3"], "recompute": "selective"}]
    layouts["offloaded"] = [{**LAYOUTS["fsdp-3"], "offload": "all", "recompute": "full"}]
    assert_equal_to(plain, run(layouts, tmp_path / "two", 2, precision="fp32", **MODERN))


def assert_equal_to(plain: Any, results: Any) -> None:
    for name, result in results.items():
        assert_equal_runs(result, plain, 1e-4)
        assert worst(result["sizes"], plain["sizes"]) <= 1e-3, name


GATED = {"norm": "rmsnorm", "norm_eps": 1e-6, "activation": "swiglu", "n_inner": 50, "bias": "qkv"}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
@pytest.mark.slow
def test_a_gated_model_with_rms_norms_follows_one_plain_process(
    tmp_path: Path, precision: str, tolerance: float
) -> None:
    """And its state moves, from each layout to the next."""
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision=precision, grad_accum=1, **GATED)["plain"]
    layouts = {name: [flags] for name, flags in LAYOUTS.items()}
    layouts |= {f"{a} to {b}": [LAYOUTS[a], LAYOUTS[b]] for a, b in pairwise((*LAYOUTS, "fsdp-0"))}
    results = run(layouts, tmp_path / "two", 2, precision=precision, **GATED)
    for name in layouts:
        assert_equal_runs(results[name], plain, tolerance)
    for name in LAYOUTS:
        assert worst(results[name]["norms"], plain["norms"]) <= 10 * tolerance, name


@pytest.mark.slow
def test_a_gated_model_recomputes_and_compiles_to_the_same(tmp_path: Path) -> None:
    compiled = {"compile": {**PLAIN, "compile": "on", "recompute": "selective"}}
    variants = {variant: {**PLAIN, **flags} for variant, flags in VARIANTS.items()} | compiled
    results = run(
        {"plain": [PLAIN], **{name: [flags] for name, flags in variants.items()}},
        tmp_path / "one",
        1,
        precision="fp32",
        **GATED,
    )
    for name, result in results.items():
        assert worst(result["losses"], results["plain"]["losses"]) <= 1e-5, name


PACKED = {"packing": "documents", "vocab_size": 11, "position": "rope", "n_head": 3, "head_size": 10, "n_kv_head": 1}


@pytest.mark.slow
def test_packed_documents_are_the_same_under_every_layout(tmp_path: Path) -> None:
    """Though the number of targets that count differs between micro batches."""
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp32", grad_accum=1, **PACKED)["plain"]
    layouts = {name: [flags] for name, flags in LAYOUTS.items()}
    layouts["recomputed"] = [{**LAYOUTS["deepspeed-3"], "recompute": "selective"}]
    layouts["compiled"] = [{**LAYOUTS["fsdp-3"], "compile": "on", "recompute": "full"}]
    for name, result in run(layouts, tmp_path / "two", 2, precision="fp32", **PACKED).items():
        assert_equal_runs(result, plain, 1e-4)
        assert worst(result["sizes"], plain["sizes"]) <= 1e-3, name


MUON = {"optimizer": "muon", "muon_lr": 0.02}
MUONS = ("fsdp-0", "fsdp-2", "fsdp-3", "deepspeed-0")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
@pytest.mark.slow
def test_muon_orthogonalises_whole_matrices_on_any_ranks(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Of 45 rows a rank has 23 and 22; matrices of one shape, two in number, go to different ranks."""
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision=precision, grad_accum=1, **MUON)["plain"]
    results = run({name: [LAYOUTS[name]] for name in MUONS}, tmp_path / "two", 2, precision=precision, **MUON)
    for name in MUONS:
        assert_equal_runs(results[name], plain, tolerance)
        assert worst(results[name]["norms"], plain["norms"]) <= 10 * tolerance, name


def test_muons_state_moves_between_layouts(tmp_path: Path) -> None:
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp32", grad_accum=1, **MUON)["plain"]
    pairs = list(pairwise((*MUONS, MUONS[0])))
    layouts = {f"{a} to {b}": [LAYOUTS[a], LAYOUTS[b]] for a, b in pairs}
    for name, result in run(layouts, tmp_path / "two", 2, precision="fp32", **MUON).items():
        assert_equal_runs(result, plain, 1e-4)
        assert worst(result["sizes"], plain["sizes"]) <= 1e-3, name


REPLICATED: dict[str, dict[str, Any]] = {
    f"2 x 2 at stage {stage}": {"backend": "fsdp", "zero_stage": stage, "shard_size": 2} for stage in (2, 3)
}
"""Two replicas of two shards each (HSDP)."""


SECOND_COPY = {"backend": "deepspeed", "zero_stage": 3, "shard_size": 2}
"""States cut over all ranks, and a second copy of the weights over every two (ZeRO++'s hpZ)."""


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
@pytest.mark.slow
def test_second_copies_of_weights_change_nothing(tmp_path: Path, precision: str, tolerance: float) -> None:
    """Also after weights are loaded over those from which the copies were made."""
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision=precision, grad_accum=1)["plain"]
    layouts = {
        "copies": [SECOND_COPY],
        "offloaded": [{**SECOND_COPY, "offload": "optimizer", "recompute": "full"}],
        "from fsdp": [REPLICATED["2 x 2 at stage 3"], SECOND_COPY],
        "and back": [SECOND_COPY, LAYOUTS["deepspeed-3"]],
    }
    for name, result in run(layouts, tmp_path / "four", 4, precision=precision).items():
        assert_equal_runs(result, plain, tolerance)
        assert worst(result["norms"], plain["norms"]) <= 10 * tolerance, name
        assert worst(result["sizes"], plain["sizes"]) <= 10 * tolerance, name


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2), ("fp16", 1e-2)])
@pytest.mark.slow
def test_replicas_of_shards_follow_one_plain_process(tmp_path: Path, precision: str, tolerance: float) -> None:
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision=precision, grad_accum=1)["plain"]
    offloaded = {**REPLICATED["2 x 2 at stage 3"], "offload": "all"}
    layouts = {**REPLICATED, "offloaded": offloaded, "one replica": LAYOUTS["fsdp-3"]}
    results = run({name: [flags] for name, flags in layouts.items()}, tmp_path / "four", 4, precision=precision)
    for name in layouts:
        assert_equal_runs(results[name], plain, tolerance)
        assert worst(results[name]["norms"], plain["norms"]) <= 10 * tolerance, name


@pytest.mark.slow
def test_replicas_of_shards_read_every_layouts_state_and_are_read(tmp_path: Path) -> None:
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp32", grad_accum=1)["plain"]
    way = ("2 x 2 at stage 2", "fsdp-3", "2 x 2 at stage 3", "deepspeed-3", "2 x 2 at stage 2", "deepspeed-1")
    known = LAYOUTS | REPLICATED
    layouts = {f"{a} to {b}": [known[a], known[b]] for a, b in pairwise((*way, "2 x 2 at stage 3", "fsdp-0"))}
    for name, result in run(layouts, tmp_path / "four", 4, precision="fp32").items():
        assert_equal_runs(result, plain, 1e-5)
        assert worst(result["sizes"], plain["sizes"]) <= 1e-3, name


@pytest.mark.slow
def test_muon_orthogonalises_in_each_replica(tmp_path: Path) -> None:
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp32", grad_accum=1, **MUON)["plain"]
    known = LAYOUTS | REPLICATED
    layouts = {name: [flags] for name, flags in REPLICATED.items()}
    layouts |= {f"{a} to {b}": [known[a], known[b]] for a, b in pairwise(("fsdp-0", *REPLICATED, "fsdp-3"))}
    for name, result in run(layouts, tmp_path / "four", 4, precision="fp32", **MUON).items():
        assert_equal_runs(result, plain, 1e-4)
        assert worst(result["sizes"], plain["sizes"]) <= 1e-3, name


LION = {"optimizer": "lion", "learning_rate": 1e-3}


@pytest.mark.slow
def test_lion_is_the_same_under_every_layout_and_its_state_moves(tmp_path: Path) -> None:
    """The sign of a momentum near zero may fall either way by rounding, so losses agree less closely than AdamW's."""
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp32", grad_accum=1, **LION)["plain"]
    names = ("fsdp-2", "fsdp-3", "deepspeed-1", "deepspeed-3")
    layouts = {name: [LAYOUTS[name]] for name in names}
    layouts |= {f"{a} to {b}": [LAYOUTS[a], LAYOUTS[b]] for a, b in pairwise((*names, names[0]))}
    for name, result in run(layouts, tmp_path / "two", 2, precision="fp32", **LION).items():
        assert worst(result["losses"], plain["losses"]) <= 1e-3, name
        assert worst([result["held_out"]], [plain["held_out"]]) <= 1e-3, name


@pytest.mark.slow
def test_recompute_and_loss_change_nothing(tmp_path: Path) -> None:
    layouts = {
        f"{name}, {variant}": [{**LAYOUTS[name], **flags}]
        for name in ("fsdp-2", "fsdp-3", "deepspeed-1", "deepspeed-3")
        for variant, flags in VARIANTS.items()
    }
    plain_layouts = {variant: [{**PLAIN, **flags}] for variant, flags in VARIANTS.items()} | {"plain": [PLAIN]}
    plain = run(plain_layouts, tmp_path / "one", 1, precision="fp32")
    results = run(layouts, tmp_path / "two", 2, precision="fp32")
    for name, result in {**results, **plain}.items():
        assert worst(result["losses"], plain["plain"]["losses"]) <= 1e-5, name


@pytest.mark.slow
def test_compile_changes_nothing(tmp_path: Path) -> None:
    compiled = {"compile": "on", "recompute": "selective"}
    plain = run({"plain": [PLAIN], "compiled": [{**PLAIN, **compiled}]}, tmp_path / "one", 1, precision="fp32")
    layouts = {name: [{**LAYOUTS[name], **compiled}] for name in ("fsdp-3", "deepspeed-2")}
    results = run(layouts, tmp_path / "two", 2, precision="fp32")
    for result in (plain["compiled"], *results.values()):
        assert worst(result["losses"], plain["plain"]["losses"]) <= 1e-5


def test_state_moves_between_backends(tmp_path: Path) -> None:
    """Half the steps under one layout, half under another: weights, moments and counts all travel."""
    pairs = [
        ("deepspeed-2", "fsdp-3"),
        ("fsdp-3", "deepspeed-3"),
        ("deepspeed-3", "deepspeed-1"),
        ("fsdp-0", "deepspeed-0"),
        ("deepspeed-0", "fsdp-2"),
        ("fsdp-2", "deepspeed-2"),
    ]
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp32", grad_accum=1)["plain"]
    layouts = {f"{a} to {b}": [LAYOUTS[a], LAYOUTS[b]] for a, b in pairs}
    results = run(layouts, tmp_path / "two", 2, precision="fp32")
    for name, result in results.items():
        assert_equal_runs(result, plain, 1e-5)
        assert worst(result["sizes"], plain["sizes"]) <= 1e-3, name


@pytest.mark.slow
def test_offload_changes_where_not_what(tmp_path: Path) -> None:
    layouts = {
        "fsdp": [{**LAYOUTS["fsdp-3"], "offload": "all"}],
        "zero-1": [{**LAYOUTS["deepspeed-1"], "offload": "optimizer"}],
        "zero-2": [{**LAYOUTS["deepspeed-2"], "offload": "optimizer"}],
        "zero-3": [{**LAYOUTS["deepspeed-3"], "offload": "optimizer"}],
        "zero-3, parameters too": [{**LAYOUTS["deepspeed-3"], "offload": "all"}],
    }
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="bf16", grad_accum=1)["plain"]
    results = run(layouts, tmp_path / "two", 2, precision="bf16")
    for result in results.values():
        assert_equal_runs(result, plain, 1e-2)


def test_fp16_scales_its_loss_alike(tmp_path: Path) -> None:
    deepspeed = ("deepspeed-0", "deepspeed-1", "deepspeed-2", "deepspeed-3") if cpu_has_fp16() else ()
    layouts = {name: [LAYOUTS[name]] for name in ("fsdp-2", *deepspeed)}
    plain = run({"plain": [PLAIN]}, tmp_path / "one", 1, precision="fp16", grad_accum=1)["plain"]
    results = run(layouts, tmp_path / "two", 2, precision="fp16")
    for result in results.values():
        assert_equal_runs(result, plain, 1e-2)
    if not deepspeed:
        pytest.skip("fsdp agrees with plain; DeepSpeed takes no fp16 on this processor")
