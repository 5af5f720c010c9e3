"""Runs on packed documents: targets that do not count, losses that do not depend on the micro batch, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scalegpt
from scalegpt.backends import World
from scalegpt.data.windows.mixture import MixedTokens
from scalegpt.model.chunk import IGNORED
from scalegpt.planner.batches import BatchPlan
from scalegpt.training.batches import HeldOutBatches, TrainingBatches

END = 5
ALONE = World(0, 1, 0, 1, torch.device("cpu"))
SMALL: dict[str, Any] = {
    "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 32, "tokens_per_step": 256, "max_iters": 3, "warmup_steps": 1,
    "device": "cpu", "precision": "fp32", "eval_tokens": 64, "sample_tokens": 0, "log_every": 1, "tokenizer": "byte",
    "vocab_size": "auto", "packing": "documents", "backend": "plain",
}  # fmt: skip


def test_a_target_that_begins_a_document_is_ignored() -> None:
    tokens = np.random.default_rng(0).integers(0, 8, 400).astype(np.uint16)
    plan = BatchPlan(2, 2, 1, 16)
    alone = MixedTokens.alone(tokens)
    loader = TrainingBatches(alone, plan, ALONE, seed=1, document_end=END)
    batches = [
        *loader.step(0),
        *((batch.inputs, batch.targets) for batch in HeldOutBatches(alone, plan, ALONE, 200, END)),
    ]
    loader.close()
    for inputs, targets in batches:
        assert torch.equal(targets == IGNORED, inputs == END) or (targets[-1] == IGNORED).all()
    for inputs, targets, count, _ in HeldOutBatches(alone, plan, ALONE, 200, END):
        assert count == int((targets != IGNORED).sum()) < inputs.numel()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number:02}.txt").write_text(f"text {number} " * (number % 5 + 1))
    return texts


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_losses_do_not_depend_on_the_micro_batch(folder: Path) -> None:
    runs = [scalegpt.train(input_file=folder, model_name=f"b{b}", micro_batch=b, **SMALL) for b in (1, 8)]
    first, second = map(losses, runs)
    assert first == pytest.approx(second, rel=1e-5)
    other = scalegpt.train(input_file=folder, model_name="c", micro_batch=8, **{**SMALL, "packing": "contiguous"})
    assert losses(other)[0] != pytest.approx(first[0], rel=1e-5)
    assert losses(other)[0] == pytest.approx(first[0], rel=0.05), "the mean over the targets that count"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tokenizer": "char"},
            "packing documents needs a token that ends a document, which the char tokenizer does not",
        ),
        ({"attention": "flash"}, "packing documents needs a mask, which attention flash does not take"),
    ],
)
def test_what_cannot_pack_documents_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(scalegpt.InputError, match=message):
        scalegpt.train(input_file=folder, model_name="refused", micro_batch=8, **{**SMALL, **settings})
    assert not Path("runs/refused/config.yaml").exists()
