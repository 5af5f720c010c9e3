"""Muon's update holds to torch's own, alone and with each matrix dealt out over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ranks import run_ranks
from scalegpt.config import TrainConfig
from scalegpt.config.optimizers import MOMENTUM
from scalegpt.optim.factory import optimizer_factory
from scalegpt.optim.muon import Muon, orthogonalise

WORKER = Path(__file__).with_name("muon_worker.py")
SHAPES = [(48, 16), (16, 16), (16, 48), (5, 7), (1, 6)]


def muon(matrices: list[nn.Parameter], precision: str = "fp32", **settings: Any) -> Muon:
    """The trainer's optimizer over matrices of blocks, an embedding and a norm."""
    others = [("wte.weight", nn.Parameter(torch.ones(3, 2))), ("norm.weight", nn.Parameter(torch.ones(2)))]
    named = [*((f"blocks.{i}.fc.weight", matrix) for i, matrix in enumerate(matrices)), *others]
    made = optimizer_factory(TrainConfig(optimizer="muon", precision=precision, **settings))(named)
    assert isinstance(made, Muon)
    return made


def drawn(shape: tuple[int, ...], count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_is_torchs(shape: tuple[int, int]) -> None:
    """Torch computes the iteration in bf16: so far it agrees with ours in bf16, and with fp32."""
    start = drawn(shape, 3, seed=0)
    for precision in ("bf16", "fp32"):
        ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
        optimizers = muon(ours, precision), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
        for step in range(4):
            for mine, its, gradient in zip(ours, theirs, drawn(shape, 3, seed=1 + step), strict=True):
                mine.grad, its.grad = gradient.clone(), gradient.clone()
            for optimizer in optimizers:
                optimizer.step()
        for mine, its, value in zip(ours, theirs, start, strict=True):
            moved = (its.detach() - value).norm()
            assert (mine.detach() - its.detach()).norm() < 0.02 * moved
            assert torch.equal(optimizers[0].state[mine][MOMENTUM], optimizers[1].state[its]["momentum_buffer"])


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        values = torch.linalg.svdvals(orthogonalise(torch.stack(drawn(shape, 2, seed=3)).to(dtype), dtype).float())
        assert values.min() > 0.6, precision
        assert values.max() < 1.3, precision


def reference(x: Tensor) -> Tensor:
    """The iteration as it is written, in fp64."""
    x = x.double() / x.double().norm()
    for _ in range(5):
        r = x @ x.mT
        x = 3.4445 * x + (-4.7750 * r + 2.0315 * r @ r) @ x
    return x


@pytest.mark.parametrize("rank", [1, 3, 24])
def test_the_gram_form_bears_what_is_nearly_singular(rank: int) -> None:
    """Early momenta are: the sum of a few outer products, and noise a million times smaller."""
    left, right, noise = drawn((24, rank), 1, 4)[0], drawn((rank, 96), 1, 5)[0], drawn((24, 96), 1, 6)[0]
    matrix = left @ right + 1e-6 * noise
    expected = reference(matrix)
    for found, wanted in ((matrix, expected), (matrix.mT, expected.mT)):
        result = orthogonalise(found.clone(memory_format=torch.contiguous_format)[None], torch.float32)[0]
        assert (result - wanted).norm() < 2e-3 * expected.norm()


def test_a_matrix_of_zeros_stays() -> None:
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 9), torch.float32), torch.zeros(1, 4, 9))


def test_groups_and_their_rates() -> None:
    matrix = nn.Parameter(torch.ones(4, 4))
    made = muon([matrix], learning_rate=1e-3, muon_lr=0.05, weight_decay=0.2, muon_momentum=0.9)
    first, *others = made.param_groups
    assert (first["params"], first["lr_ratio"], first["momentum"], first["weight_decay"]) == ([matrix], 50.0, 0.9, 0.2)
    assert [(group["weight_decay"], group["fused"], "lr_ratio" in group) for group in others] == [
        (0.2, True, False), (0.0, True, False),
    ]  # fmt: skip


def test_embeddings_are_adamws(tiny_model: Any) -> None:
    model = tiny_model(tie_head=False)
    made = optimizer_factory(TrainConfig(optimizer="muon", precision="fp32", fused=False))(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    for name, parameter in model.named_parameters():
        is_muons = name.startswith("blocks.") and parameter.dim() == 2
        assert set(made.state[parameter]) == ({MOMENTUM} if is_muons else {"step", "exp_avg", "exp_avg_sq"}), name


def test_a_parameter_without_gradient_stays() -> None:
    matrices = [nn.Parameter(torch.ones(4, 8)) for _ in range(2)]
    matrices[1].grad = torch.eye(4, 8)
    muon(matrices).step()
    assert torch.equal(matrices[0].detach(), torch.ones(4, 8))
    assert not torch.equal(matrices[1].detach(), torch.ones(4, 8))


def test_more_matrices_than_a_round_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from scalegpt.planner.memory import newton_schulz

    results = []
    for limit in (newton_schulz.ROUND_ELEMENTS, 1, 2 * 24):
        monkeypatch.setattr(newton_schulz, "ROUND_ELEMENTS", limit)
        matrices = [nn.Parameter(value) for value in drawn((4, 6), 5, seed=7)]
        for matrix, gradient in zip(matrices, drawn((4, 6), 5, seed=8), strict=True):
            matrix.grad = gradient
        muon(matrices).step()
        results.append(torch.stack([matrix.detach() for matrix in matrices]))
    assert torch.allclose(results[0], results[1], atol=1e-6)
    assert torch.allclose(results[0], results[2], atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_the_work_do_what_one_does(tmp_path: Path, ranks: int) -> None:
    """Sharded and whole, five matrices of each shape: uneven rows, fewer rows than ranks, several rounds, unequal shares."""
    for result in run_ranks(WORKER, ranks, {"shapes": [[7, 5], [4, 12], [12, 4], [1, 6]], "count": 5}, tmp_path):
        # Products of another batch may be summed in another order.
        assert result["error"] <= result["tolerance"], result
        assert result["moved"] > 0.01, result
