"""Muon for the blocks' matrices, AdamW for everything else, as one optimizer.

The update is that of ``torch.optim.Muon``; tests compare the two. For a matrix W of m rows and n columns with gradient
G and momentum M, decay of the momentum μ, learning rate γ, weight decay λ and the Newton-Schulz iteration NS it is::

    M ← μ·M + (1 - μ)·G,   U = NS(μ·M + (1 - μ)·G),   W ← (1 - γ·λ)·W - γ·√max(1, m/n)·U

There are three differences from torch's Muon. Matrices of one shape are orthogonalised together, in rounds of a limited
number of matrices. The iteration runs in the run's compute dtype (torch's runs in bf16, for which many processors have
no instructions). With several ranks, one rank orthogonalises a matrix and sends the result to the others.
:mod:`scalegpt.planner.memory.newton_schulz` describes the iteration, the rounds, and what they cost in memory and time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from scalegpt.backends.base import DTYPES, local
from scalegpt.config.backends import Mesh
from scalegpt.config.optimizers import MOMENTUM
from scalegpt.optim.lion import momentum_of
from scalegpt.planner.memory.newton_schulz import STEPS, Exchange, uses_gram_form, wire

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of the iteration, which make its slope at zero large (Jordan et al. 2024)."""

EPSILON = 1e-7
"""Before the iteration a matrix is divided by its norm, or by this number if its norm is smaller."""

_ALL_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Torch's all-gather into one tensor, under its new name if torch has it, since torch 2.13 warns about the old name."""

Groups = list[dict[str, Any]]
Shape = tuple[int, ...]


class Muon(Optimizer):
    """Muon over one group of matrices, and torch's AdamW over the other groups.

    A step overwrites the matrices' gradients with the input of the orthogonalisation.

    Args:
        muon: Muon's group: two-dimensional ``params``, whole or sharded by rows, with ``lr``, ``lr_ratio``,
            ``momentum`` and ``weight_decay``.
        others: AdamW's groups.
        precision: the name of the dtype of the iteration, for example ``bf16``.
        adamw: AdamW's options.
    """

    def __init__(self, muon: dict[str, Any], others: Groups, *, precision: str, adamw: dict[str, Any]) -> None:
        self._adamw = AdamW(others, **adamw)
        super().__init__([muon, *self._adamw.param_groups], {"fused": adamw["fused"]})
        self._adamw.param_groups = self.param_groups[1:]
        self._adamw.state = self.state
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; all ranks must call it together."""
        loss = closure() if closure is not None else None
        self._update_matrices(self.param_groups[0])
        self._adamw.step()
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        weights = [local(parameter) for parameter in parameters]
        updates = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        momenta = [local(momentum_of(self, parameter, MOMENTUM)) for parameter in parameters]
        torch._foreach_lerp_(momenta, updates, 1 - group["momentum"])
        torch._foreach_lerp_(updates, momenta, group["momentum"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, parameter in enumerate(parameters):
            alike[tuple(parameter.shape)].append(number)
        exchange, group_of_ranks = exchange_of(parameters[0], self.precision)
        for shape, numbers in alike.items():
            rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
            waiting = iter(numbers)
            for count in exchange.rounds(shape, len(numbers)):
                some = list(islice(waiting, count))
                whole = orthogonalised(exchange, [updates[number] for number in some], shape, group_of_ranks)
                for number, part in zip(some, whole, strict=True):
                    weights[number].add_(part, alpha=-rate)
                del whole, part


def exchange_of(parameter: Tensor, precision: str) -> tuple[Exchange, ProcessGroup | None]:
    """Find out from one of the matrices how the ranks share them: whole on every rank, or cut over a replica's ranks.

    The second result is the group of the ranks that exchange matrices; None: all ranks.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for dimension, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard) and (shards := mesh.size(dimension)) > 1:
                return Exchange(Mesh(ranks // shards, shards), precision), mesh.get_group(dimension)
    return Exchange(Mesh(ranks, 1), precision), None


# --- rounds ----------------------------------------------------------------------------------------------------------
# Tensors are passed on without a variable here: a caller's variable would keep their memory until the callee returns.


def orthogonalised(
    exchange: Exchange, parts: list[Tensor], shape: Shape, group: ProcessGroup | None = None
) -> Sequence[Tensor]:
    """Orthogonalise the matrices of one round.

    Args:
        exchange: how the ranks share the matrices.
        parts: this rank's part of each matrix in fp32: the whole matrix, or some of its rows.
        shape: the shape of each whole matrix.
        group: the ranks that exchange them; None: all.

    Returns:
        This rank's part of each result, in the dtype of the computation.
    """
    if exchange.ranks == 1:
        return _whole(exchange, parts, shape).unbind(0)
    if exchange.gathers_results:
        return _gathered(exchange, parts, shape)
    return _redistributed(exchange, parts, shape, group)


def _whole(exchange: Exchange, matrices: list[Tensor], shape: Shape) -> Tensor:
    """Orthogonalise k matrices that this rank holds whole, and return them, [k, m, n]."""
    return orthogonalise(_stacked(matrices, (len(matrices), *shape), _wire(exchange)), DTYPES[exchange.precision])


def _gathered(exchange: Exchange, matrices: list[Tensor], shape: Shape) -> Sequence[Tensor]:
    """Orthogonalise matrices that are whole on every rank: matrix i on rank i mod W; all ranks gather the results."""
    ranks, share = exchange.ranks, -(-len(matrices) // exchange.ranks)
    mine = matrices[dist.get_rank() :: ranks]
    if len(mine) == share:
        results = _whole(exchange, mine, shape).contiguous()
    else:
        results = matrices[0].new_empty(share, *shape, dtype=DTYPES[exchange.precision])
        if mine:
            results[: len(mine)] = _whole(exchange, mine, shape)
    everyones = results.new_empty(ranks * share, *shape)
    _ALL_GATHER(everyones, results)
    return [everyones[number % ranks * share + number // ranks] for number in range(len(matrices))]


def _redistributed(
    exchange: Exchange, parts: list[Tensor], shape: Shape, group: ProcessGroup | None
) -> Sequence[Tensor]:
    """Orthogonalise matrices of which each of a group's S ranks holds at most ⌈m / S⌉ rows.

    Rank i mod S, the owner of matrix i, receives the matrix's rows, orthogonalises the matrix, and sends each rank its
    rows of the result.
    """
    ranks = exchange.ranks
    order = sorted(range(len(parts)), key=lambda number: (number % ranks, number // ranks))
    shares = [len(range(owner, len(parts), ranks)) for owner in range(ranks)]
    results = _sent_back(
        orthogonalise(
            _received(exchange, [parts[number] for number in order], shape, shares, group), DTYPES[exchange.precision]
        ),
        shares,
        group,
    )
    place = {number: position for position, number in enumerate(order)}
    return [results[place[number], : len(part)] for number, part in enumerate(parts)]


def _received(
    exchange: Exchange, parts: list[Tensor], shape: Shape, shares: list[int], group: ProcessGroup | None
) -> Tensor:
    """The k matrices [k, m, n] that this rank orthogonalises, with the rows received from all ranks.

    ``parts`` has this rank's rows of all matrices, sorted by owner (the rank that orthogonalises the matrix).
    ``shares`` has the number of matrices of each owner.
    """
    ranks, mine = exchange.ranks, shares[dist.get_rank(group)]
    rows, columns = -(-shape[0] // ranks), shape[1]
    sent = _stacked(parts, (len(parts), rows, columns), _wire(exchange))
    received = sent.new_empty(ranks, mine, rows, columns)
    size = rows * columns
    parts_sent = [share * size for share in shares]
    dist.all_to_all_single(received.view(-1), sent.view(-1), [mine * size] * ranks, parts_sent, group=group)
    del sent
    return received.transpose(0, 1).reshape(mine, ranks * rows, columns)[:, : shape[0]]


def _sent_back(whole: Tensor, shares: list[int], group: ProcessGroup | None) -> Tensor:
    """This rank's rows [count, ⌈m / S⌉, n] of all results, sorted by owner (the rank that orthogonalised the matrix).

    ``whole`` has the results made on this rank. ``shares`` has the number of matrices of each owner.
    """
    ranks, (mine, height, columns) = len(shares), whole.shape
    rows = -(-height // ranks)
    if height % ranks:
        whole = functional.pad(whole, (0, 0, 0, ranks * rows - height))
    whole = torch.unflatten(whole, 1, (ranks, rows)).transpose(0, 1).contiguous()
    results = whole.new_empty(sum(shares), rows, columns)
    size = rows * columns
    parts_received = [share * size for share in shares]
    dist.all_to_all_single(results.view(-1), whole.view(-1), parts_received, [mine * size] * ranks, group=group)
    return results


def _wire(exchange: Exchange) -> torch.dtype:
    return DTYPES[wire(exchange.precision)]


def _stacked(parts: Sequence[Tensor], shape: Shape, dtype: torch.dtype) -> Tensor:
    """One new tensor of this shape with a copy of each part.

    If a part has fewer rows, the other rows stay uninitialised.
    """
    stack = parts[0].new_empty(shape, dtype=dtype)
    torch._foreach_copy_(
        [whole.narrow(0, 0, len(part)) for whole, part in zip(stack.unbind(0), parts, strict=True)], list(parts)
    )
    return stack


# --- the iteration ---------------------------------------------------------------------------------------------------


def orthogonalise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthogonalise matrices: keep the singular vectors, and bring the singular values to between about 0.7 and 1.2.

    Args:
        x: the matrices [k, m, n]; they are overwritten.
        dtype: the dtype of the computation.

    Returns:
        The results [k, m, n] in ``dtype``, not always contiguous.
    """
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = x.div_(norms.clamp_(min=EPSILON)).to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    if uses_gram_form(x.shape[1:], dtype.itemsize):
        x = _gram_factor(x) @ x
    else:
        for _ in range(STEPS):
            factor = x @ x.mT
            factor = torch.baddbmm(factor, factor, factor, beta=B, alpha=C)
            x = torch.baddbmm(x, factor, x, beta=A)
            del factor
    return x.mT if is_tall else x


def _gram_factor(x: Tensor) -> Tensor:
    """The product [k, s, s] of the iteration's factors over all steps; the product times X [k, s, l] is the final result."""
    gram, product = x @ x.mT, None
    for step in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=1, dim2=2).add_(A)
        product = factor if product is None else product @ factor
        if step < STEPS - 1:
            gram = gram @ factor
            gram = gram @ factor
    assert product is not None
    return product
