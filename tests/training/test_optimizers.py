"""AdamW's groups and forms."""

from typing import Any

import pytest
import torch

from scalegpt.config import TrainConfig
from scalegpt.optim.factory import optimizer_factory


def make(model: Any, **settings: Any) -> torch.optim.Optimizer:
    return optimizer_factory(TrainConfig(weight_decay=0.3, **settings))(model.named_parameters())


def test_matrices_decay_and_vectors_do_not(tiny_model: Any) -> None:
    model = tiny_model(bias=True, tie_head=False)
    matrices, vectors = make(model).param_groups
    assert matrices["weight_decay"] == 0.3
    assert vectors["weight_decay"] == 0.0
    assert {parameter.dim() for parameter in matrices["params"]} == {2}
    assert {parameter.dim() for parameter in vectors["params"]} == {1}
    listed = [id(parameter) for parameter in (*matrices["params"], *vectors["params"])]
    assert sorted(listed) == sorted(id(parameter) for parameter in model.parameters())
    assert any(parameter is model.wte.weight for parameter in matrices["params"])


def test_the_settings_arrive(tiny_model: Any) -> None:
    optimizer = make(tiny_model(), learning_rate=0.5, beta1=0.8, beta2=0.7, adam_eps=1e-3)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-3)


@pytest.mark.parametrize(("fused", "foreach"), [(True, False), (False, True)])
def test_either_the_fused_or_the_foreach_form(tiny_model: Any, fused: bool, foreach: bool) -> None:
    for group in make(tiny_model(), fused=fused).param_groups:
        assert (group["fused"], group["foreach"]) == (fused, foreach)


def test_no_empty_group_is_made() -> None:
    only = [("matrix", torch.nn.Parameter(torch.ones(2, 2)))]
    assert len(optimizer_factory(TrainConfig())(only).param_groups) == 1


def test_decay_shrinks_matrices_only(tiny_model: Any) -> None:
    model = tiny_model(bias=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = make(model, learning_rate=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.3) if value.dim() > 1 else before[name]
        assert torch.allclose(value, expected), name
