"""Muon's orthogonalisation, as arithmetic: its rounds, its operations, and what it allocates.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv 2502.16982) replaces the momentum of a
matrix by a matrix whose singular values are all near one, which five steps of a Newton-Schulz iteration find. Let a matrix X
have s rows and l columns, s ≤ l, or else take its transpose. The iteration is::

    X ← X / |X|;   five times:   R = X·Xᵀ,   Z = a·I + b·R + c·R²,   X ← Z·X

Two forms compute it. In the *direct* form each step takes 4·s²·l + 2·s³ operations. But all Z are polynomials of the first R,
and so the *Gram* form multiplies them first, and X once: R ← Z·R·Z, Q ← Q·Z, and X ← Q·X at the end. That is
4·s²·l + 34·s³ operations in all, fewer where l > 1.5·s. The first R squares X's condition, which fp32 bears and bf16 does
not: only fp32 takes this form.

Matrices of one shape are orthogonalised together, in rounds. Over several ranks the matrices of a round are assigned to them
in turn, and each is whole on its owner (:mod:`scalegpt.optim.muon` does what is counted here). Where ranks are replicas
(stage 0), each orthogonalises its own and all gather the results. Where they are shards (FSDP2's stages 2 and 3), they send
the rows that they hold of each matrix to its owner, and get the rows of the result back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.config.backends import Mesh
from scalegpt.planner.memory.timeline import Timeline
from scalegpt.units import BYTES

STEPS = 5
"""Of the iteration, as in torch's Muon."""

ROUND_ELEMENTS = 1 << 24
"""A round has no more elements on a rank, but at least one matrix: one kernel serves many small matrices, and large ones fill
a card by themselves."""

Shape = tuple[int, ...]

_X = "matrices"


def uses_gram_form(shape: Shape, width: int) -> bool:
    """Whether the Gram form computes matrices of this shape; ``width`` is that of the compute dtype in bytes."""
    short, long = sorted(shape)
    return width == 4 and 2 * long > 3 * short


def flops(shape: Shape, width: int) -> int:
    """Operations that orthogonalise one matrix, a multiplication and an addition being two."""
    short, long = sorted(shape)
    if uses_gram_form(shape, width):
        return 4 * short**2 * long + 2 * (4 * STEPS - 3) * short**3
    return STEPS * (4 * short**2 * long + 2 * short**3)


def wire(precision: str) -> str:
    """The dtype that matrices are gathered and normalised in: fp16 has no room for gradients as they come."""
    return "fp32" if precision == "fp16" else precision


@dataclass(frozen=True)
class Exchange:
    """Who holds the matrices of a run, and what their orthogonalisation takes.

    Attributes:
        mesh: the ranks, as replicas or as shards of the matrices.
        precision: of the computation.
    """

    mesh: Mesh
    precision: str

    @property
    def ranks(self) -> int:
        """W, among which the matrices of a round are divided."""
        return self.mesh.ranks

    @property
    def gathers_results(self) -> bool:
        """Whether each rank holds whole matrices and so needs all results."""
        return self.mesh.replicas > 1

    def rounds(self, shape: Shape, count: int) -> Iterator[int]:
        """How many matrices of one shape each round takes, of so many in all."""
        fitting = max(1, ROUND_ELEMENTS // (shape[0] * shape[1]))
        # Where results are gathered, each rank holds those of the whole round.
        most = max(self.ranks, fitting) if self.gathers_results else fitting * self.ranks
        while count > 0:
            yield min(count, most)
            count -= most

    def peak_bytes(self, shape: Shape, count: int) -> int:
        """The most that the update of so many matrices allocates at once, on the rank that has most of them."""
        return max(_peak(self, shape, some) for some in set(self.rounds(shape, count)))

    def largest_share(self, shape: Shape, count: int) -> int:
        """Matrices that the rank with most of them orthogonalises."""
        return sum(-(-some // self.ranks) for some in self.rounds(shape, count))


@lru_cache(maxsize=1024)
def _peak(exchange: Exchange, shape: Shape, count: int) -> int:
    """The fullest moment of a round, played in the order in which it allocates and frees."""
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
    """The results are put in order, where they are of tall matrices, and gathered."""
    mine = -(-count // exchange.ranks)
    _alone(t, exchange, shape, mine)
    whole = BYTES[exchange.precision] * mine * shape[0] * shape[1]
    if shape[0] > shape[1]:
        t.take(_X, whole)
        t.give(_X, whole)
    t.take(_X, exchange.ranks * whole)


def _sharded(t: Timeline, exchange: Exchange, shape: Shape, count: int) -> None:
    """Rows are sent to the matrices' owners and put together; the results are cut into rows, padded, and sent back."""
    rows, columns = shape
    ranks, width, sent = exchange.ranks, BYTES[exchange.precision], BYTES[wire(exchange.precision)]
    mine, part = -(-count // ranks), -(-rows // ranks)
    padded = mine * ranks * part * columns
    t.take(_X, sent * count * part * columns)
    t.take(_X, sent * padded)
    t.give(_X, sent * count * part * columns)
    if mine > 1:  # one matrix is in order as it comes
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
    """The iteration over so many whole matrices, which begins with them gathered; returns the bytes of its result."""
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
        t.take(_X, matrix)  # the first step's; later ones free as much as they take
    t.give(_X, gathered, square)
    return matrix
