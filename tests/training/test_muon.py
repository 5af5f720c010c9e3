"""Muon needs fewer steps than AdamW: the same small model, text, steps and schedule, with either."""

import argparse
from pathlib import Path

import pytest
import torch

from scalegpt.backends import World, build_model, make_backend
from scalegpt.config.presets import resolve
from scalegpt.optim.factory import optimizer_factory
from scalegpt.training.schedules import learning_rate

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
STEPS, BATCH, BLOCK = 120, 16, 32
TEXT = Path(argparse.__file__)
"""Some 100 KB of text that every installation has."""


def held_out_loss(optimizer: str) -> float:
    """After so many steps on all of a text but its end, whose loss this is."""
    tokens = torch.tensor(list(TEXT.read_bytes())).clamp(max=127)
    training, held_out = tokens[: -4 * BLOCK * BATCH], tokens[-4 * BLOCK * BATCH - 1 :]
    flags = {
        "n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": BLOCK, "vocab_size": 128, "micro_batch": BATCH,
        "precision": "fp32", "learning_rate": 1e-2, "warmup_steps": 10, "max_iters": STEPS, "optimizer": optimizer,
    }  # fmt: skip
    run = resolve(flags=flags)
    backend = make_backend(run, ALONE, 1, build_model(run, compiled=False), optimizer_factory(run.train))
    backend.load_weights(backend.model.initial_weights(run.train.seed))
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        starts = torch.randint(len(training) - BLOCK - 1, (BATCH,), generator=generator)
        rows = torch.stack([training[start : start + BLOCK + 1] for start in starts])
        backend.micro_step(rows[:, :-1], rows[:, 1:], last=True)
        backend.step(learning_rate(run.train, step, STEPS))
    windows = held_out.unfold(0, BLOCK + 1, BLOCK)
    return backend.evaluate(windows[:, :-1], windows[:, 1:]).item()


@pytest.mark.usefixtures("one_thread")
def test_muon_is_ahead_of_adamw_after_as_many_steps() -> None:
    adamw, muon = held_out_loss("adamw"), held_out_loss("muon")
    assert muon < adamw - 0.05
    assert adamw < 3.5, "AdamW has learnt nothing: to be ahead of it says little"
