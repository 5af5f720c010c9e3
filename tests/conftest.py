"""Fixtures that several folders share."""

from collections.abc import Callable
from typing import Any

import pytest

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "vocab_size": 61}


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """A factory of small GPTs with their initial weights; keywords change the shape, the loss and the seed."""

    def make(*, seed: int = 0, loss: Any = None, **shape: Any) -> Any:
        import torch

        from scalegpt.config import ModelConfig
        from scalegpt.model.gpt import GPT
        from scalegpt.model.loss import full_cross_entropy

        model = GPT(ModelConfig(**{**TINY, **shape}), loss or full_cross_entropy)
        with torch.no_grad():
            for name, value in model.initial_weights(seed):
                model.get_parameter(name).copy_(value)
        return model

    return make
