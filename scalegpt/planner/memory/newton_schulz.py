"""Muon's orthogonalisation in numbers, without torch: its rounds, its FLOPs, and the bytes that it allocates.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982) replaces the momentum of a
matrix by a matrix whose singular values are all near one, found by five steps of a Newton-Schulz iteration. For a matrix X
of s rows and l columns, s ≤ l (a tall one is transposed)::

    X ← X / |X|;   five times:   R = X·Xᵀ,   Z = a·I + b·R + c·R²,   X ← Z·X

Two forms compute it. In the *direct* form each step takes 4·s²·l + 2·s³ FLOPs. All Z are polynomials of the first R.
The *Gram* form therefore multiplies all Z with each other first, and with X once: from Q = I, R ← Z·R·Z, Q ← Q·Z, and X
← Q·X at the end. All five steps then take 4·s²·l + 34·s³ FLOPs, fewer than the direct form if l > 1.5·s. The condition
number of the first R is the square of X's, which needs fp32. The Gram form is therefore used only in fp32.

Matrices of one shape are orthogonalised together, in rounds. Over several ranks the matrices of a round are assigned to the
ranks in turn, and a matrix's owner holds it whole (:mod:`scalegpt.optim.muon` is the code that is counted here). If ranks are
replicas (stage 0), each orthogonalises the matrices that it owns, and all gather the results. If ranks are shards (FSDP2's
stages 2 and 3), each sends its rows of a matrix to the owner, and gets these rows of the result back. Replicas of several
shards each do this by themselves, so nothing crosses the links between replicas.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.config.backends import Mesh
from scalegpt.planner.memory.timeline import Timeline
from scalegpt.units import BYTES

STEPS = 5
"""Steps of the iteration, as in torch's Muon."""

ROUND_ELEMENTS = 1 << 24
"""The most elements that a rank orthogonalises in one round, unless a single matrix has more. One kernel serves many small
matrices; a large matrix fills a card by itself."""

Shape = tuple[int, ...]

_X = "matrices"


def uses_gram_form(shape: Shape, width: int) -> bool:
    """Whether the Gram form is used for this shape; ``width`` is the bytes of an element in the compute dtype."""
    short, long = sorted(shape)
    return width == 4 and 2 * long > 3 * short


def flops(shape: Shape, width: int) -> int:
    """FLOPs that orthogonalise one matrix. A multiplication and an addition count as two FLOPs."""
    short, long = sorted(shape)
    if uses_gram_form(shape, width):
        return 4 * short**2 * long + 2 * (4 * STEPS - 3) * short**3
    return STEPS * (4 * short**2 * long + 2 * short**3)


def outputs(shape: Shape, width: int) -> int:
    """Elements that the matmuls of :func:`flops` write."""
    short, long = sorted(shape)
    if uses_gram_form(shape, width):
        return (1 + 4 * STEPS - 3) * short**2 + short * long
    return STEPS * (2 * short**2 + short * long)


def wire(precision: str) -> str:
    """The dtype in which matrices are gathered and normalised.

    In fp16 runs it is fp32, since fp16 lacks the range of gradients.
    """
    return "fp32" if precision == "fp16" else precision


@dataclass(frozen=True)
class Exchange:
    """How a run's ranks share the orthogonalisation of the matrices, and the memory that this takes.

    Attributes:
        mesh: the ranks, which are replicas or hold shards of the matrices.
        precision: the compute dtype.
    """

    mesh: Mesh
    precision: str

    @property
    def ranks(self) -> int:
        """The number of ranks among which the matrices of a round are divided: a replica's shards, or all replicas."""
        return self.mesh.shards if self.mesh.shards > 1 else self.mesh.replicas

    @property
    def gathers_results(self) -> bool:
        """Whether each rank holds whole matrices, and so needs the results of all of them."""
        return self.mesh.replicas > 1 and self.mesh.shards == 1

    def rounds(self, shape: Shape, count: int) -> Iterator[int]:
        """Yield the number of matrices in each round, for ``count`` matrices of one shape."""
        fitting = max(1, ROUND_ELEMENTS // (shape[0] * shape[1]))
        # If results are gathered, each rank holds all results of the round.
        most = max(self.ranks, fitting) if self.gathers_results else fitting * self.ranks
        while count > 0:
            yield min(count, most)
            count -= most

    def peak_bytes(self, shape: Shape, count: int) -> int:
        """The most bytes that orthogonalising ``count`` matrices takes at once, on the rank that owns most of them."""
        return max(_peak(self, shape, some) for some in set(self.rounds(shape, count)))

    def largest_share(self, shape: Shape, count: int) -> int:
        """How many of ``count`` matrices of one shape belong to the rank that owns most of them."""
        return sum(-(-some // self.ranks) for some in self.rounds(shape, count))


@lru_cache(maxsize=1024)
def _peak(exchange: Exchange, shape: Shape, count: int) -> int:
    """The most bytes live at once in a round of ``count`` matrices, from simulating its allocations and frees in order."""
    t = Timeline()
    t.enter("round")
    play = _sharded if exchange.mesh.shards > 1 else _replicated if exchange.gathers_results else _alone
    play(t, exchange, shape, count)
    return t.peak()[1].total


def _alone(t: Timeline, exchange: Exchange, shape: Shape, count: int) -> None:
    gathered = BYTES[wire(exchange.precision)] * count * shape[0] * shape[1]
    t.take(_X, gathered)
    _orthogonalise(t, exchange.precision, shape, count, gathered)


def _replicated(t: Timeline, exchange: Exchange, shape: Shape, count: int) -> None:
    """Simulate a round on replicas: each rank orthogonalises its matrices, then all gather the results.

    The results of tall matrices, which were transposed, are first copied back into row order.
    """
    mine = -(-count // exchange.ranks)
    _alone(t, exchange, shape, mine)
    whole = BYTES[exchange.precision] * mine * shape[0] * shape[1]
    if shape[0] > shape[1]:
        t.take(_X, whole)
        t.give(_X, whole)
    t.take(_X, exchange.ranks * whole)


def _sharded(t: Timeline, exchange: Exchange, shape: Shape, count: int) -> None:
    """Simulate a round on shards: ranks send their rows to each matrix's owner, and get padded rows of the result back."""
    rows, columns = shape
    ranks, width, sent = exchange.ranks, BYTES[exchange.precision], BYTES[wire(exchange.precision)]
    mine, part = -(-count // ranks), -(-rows // ranks)
    padded = mine * ranks * part * columns
    t.take(_X, sent * count * part * columns)
    t.take(_X, sent * padded)
    t.give(_X, sent * count * part * columns)
    if mine > 1:  # a single matrix arrives in row order
        t.take(_X, sent * padded)
        t.give(_X, sent * padded)
    result = _orthogonalise(t, exchange.precision, shape, mine, sent * padded)
    in_order = mine == 1 and rows <= columns
    if rows % ranks:
        t.take(_X, width * padded)
        t.give(_X, result)
        result, in_order = width * padded, mine == 1
    if not in_order:
        t.take(_X, width * padded)
        t.give(_X, result)
    t.take(_X, width * count * part * columns)


def _orthogonalise(t: Timeline, precision: str, shape: Shape, count: int, gathered: int) -> int:
    """Simulate the iteration over ``count`` whole matrices of ``gathered`` bytes in all; return the bytes of the result."""
    short, long = sorted(shape)
    width = BYTES[precision]
    matrix, square = width * count * short * long, width * count * short**2
    if precision != wire(precision):
        t.take(_X, matrix)
        t.give(_X, gathered)
        gathered = matrix
    if uses_gram_form(shape, width):
        t.touch(_X, square, square, square, square)
        t.take(_X, square, matrix)
    else:
        t.take(_X, square)
        t.touch(_X, square)
        t.take(_X, matrix)  # Z·X of the first step; later steps free as much as they allocate
    t.give(_X, gathered, square)
    return matrix
