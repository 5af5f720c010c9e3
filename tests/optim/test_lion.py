"""Lion's step against its formula, and its forms against each other."""

import pytest
import torch

from scalegpt.optim.lion import Lion


def stepped(*, foreach: bool, steps: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = Lion(groups, lr=0.01, betas=(0.9, 0.99), foreach=foreach)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [each.detach() for each in parameters], [optimizer.state[each]["exp_avg"] for each in parameters]


def by_formula(steps: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    weights = [torch.randn(shape).double() for shape in ((4, 3), (5,))]
    momenta = [torch.zeros_like(weight) for weight in weights]
    for _ in range(steps):
        gradients = [torch.randn(weight.shape).double() for weight in weights]
        for number, decay in enumerate((0.1, 0.0)):
            update = torch.sign(0.9 * momenta[number] + 0.1 * gradients[number])
            weights[number] = (1 - 0.01 * decay) * weights[number] - 0.01 * update
            momenta[number] = 0.99 * momenta[number] + 0.01 * gradients[number]
    return weights, momenta


@pytest.mark.parametrize("foreach", [True, False])
def test_a_step_is_the_formulas(foreach: bool) -> None:
    for ours, exact in zip(stepped(foreach=foreach), by_formula(), strict=True):
        for mine, its in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.double(), its, rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    Lion([{"params": [parameter]}], lr=0.1, betas=(0.9, 0.99), foreach=True).step()
    assert torch.equal(parameter.detach(), torch.ones(3))
