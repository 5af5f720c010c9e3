"""The models that compare_peers times are of the shape that our trainer is given, and compute its loss."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.compare_peers import flags_of
from benchmarks.steps.baseline import PlainGPT, Shape
from benchmarks.steps.peers import PEERS, LlamaShape, make_model, why_missing
from scalegpt.architecture.counting import count_parameters
from scalegpt.config.presets import resolve


def agrees(model: nn.Module, shape: Shape) -> None:
    """As many parameters as ours, and the loss is the targets' mean cross entropy, not shifted once more."""
    flags = flags_of(shape, Path(), "off", "fp32")
    run = resolve(flags={**flags, "input_file": None}, name="compare")
    assert sum(each.numel() for each in model.parameters()) == count_parameters(run.model).total
    tokens, targets = torch.randint(shape.vocab_size, (2, shape.batch, shape.block_size)).unbind()
    logits, loss = model(tokens, targets)
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()), rtol=1e-5)


@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_model_is_ours(one_thread: None, peer: str) -> None:
    if why := why_missing(peer):
        pytest.skip(why)
    shape = LlamaShape(2, 4, 32, 16, 64, batch=2, n_kv_head=2, n_inner=48)
    agrees(make_model(peer, shape, None), shape)


def test_the_plain_model_is_ours(one_thread: None) -> None:
    shape = Shape(2, 2, 16, 8, 30, batch=2)
    model = make_model("the plain loop", shape, None)
    assert isinstance(model, PlainGPT)
    agrees(model, shape)
