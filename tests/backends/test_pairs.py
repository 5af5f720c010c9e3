"""Half a run under one layout, half under another, through a checkpoint on the disk: twenty pairs drawn from all."""

import random
from pathlib import Path
from typing import Any

import pytest

from backends.test_canonical import LAYOUTS
from ranks import run_ranks

WORKER = Path(__file__).with_name("pairs_worker.py")
SHAPE = {
    "n_layer": 2, "n_embd": 45, "n_head": 3, "block_size": 16, "vocab_size": 67, "learning_rate": 3e-3, "precision": "fp32",
}  # fmt: skip
RANKS, HALF, PAIRS = (1, 2, 3), 10, 20
TOLERANCE = 1e-5
ALL = [(layout, ranks) for layout in LAYOUTS if layout != "deepspeed-0" for ranks in RANKS]


def run(folder: Path, ranks: int, steps: tuple[int, int], legs: dict[str, Any]) -> Any:
    folder.mkdir()
    return run_ranks(WORKER, ranks, {"shape": SHAPE, "steps": steps, "legs": legs}, folder, timeout=600)


@pytest.mark.slow
def test_twenty_pairs_of_layouts_train_one_run(tmp_path: Path) -> None:
    assert len(ALL) == 18
    pairs = random.Random(1).sample([(a, b) for a in ALL for b in ALL if a != b], PAIRS)
    undisturbed = run(tmp_path / "whole", 1, (0, 2 * HALF), {"plain": {"flags": {"backend": "plain"}}})["plain"][
        "losses"
    ]
    first: dict[tuple[str, int], Any] = {}
    for ranks in RANKS:
        names = sorted({layout for (layout, size), _ in pairs if size == ranks})
        legs = {name: {"flags": LAYOUTS[name], "save": str(tmp_path / f"{name} on {ranks}")} for name in names}
        found = run(tmp_path / f"first{ranks}", ranks, (0, HALF), legs) if legs else {}
        first |= {(name, ranks): result for name, result in found.items()}
    tried = 0
    for ranks in RANKS:
        legs = {}
        for (layout, size), (into, target) in pairs:
            if target == ranks:
                source = tmp_path / f"{layout} on {size}" / f"step_{HALF:08d}"
                legs[f"{layout}:{size}:{into}"] = {"flags": LAYOUTS[into], "load": str(source)}
        found = run(tmp_path / f"second{ranks}", ranks, (HALF, 2 * HALF), legs) if legs else {}
        for name, result in found.items():
            layout, size, _ = name.split(":")
            begun = first[layout, int(size)]
            assert result["loaded"] == begun["saved"], name
            together = begun["losses"] + result["losses"]
            worst = max(abs(a - b) / b for a, b in zip(together, undisturbed, strict=True))
            assert worst <= TOLERANCE, (name, ranks, worst)
            tried += 1
    assert tried == PAIRS
    assert undisturbed[-1] < 0.9 * undisturbed[0], "nothing was learnt: the comparison would say nothing"
