"""Which weights ZeRO-3 holds gathered at each moment of a micro step: DeepSpeed's coordinator, simulated without torch.

Follows deepspeed 0.19, ``partitioned_param_coordinator.py`` (``fetch_sub_module``, ``release_sub_module``) and
``partition_parameters.py`` (``all_gather_coalesced``), in the steady state, when the order of the modules is known:

- A module's weights are gathered before its forward pass and before its backward pass. The next weights in the order of
  modules are prefetched, one by one until their elements reach the prefetch bucket's size. This may reach into the block
  after the next.
- Weights that are gathered together arrive in one flat buffer, and are copied out of it when a module first needs one of
  them. The buffer lives until each of them has been needed. A single tensor needs no copy.
- A module's weights are released after its pass, unless the prefetch has reached their next use. The last block's
  weights therefore stay for its backward pass.
- With second copies (``zero_hpz_partition_size``) a weight's copy is made when the weight is first released after an update,
  and lives until the next update. Meanwhile the weight is gathered from it, among fewer ranks. Weights with and without a
  copy are not gathered together.
- The model itself counts as a module with the head's matrix as its weight, since it uses this matrix outside the head's
  module. The head's matrix stays gathered during the whole forward pass, and during the whole backward pass.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from scalegpt.config import RunConfig
from scalegpt.planner.memory.deepspeed.settings import Settings
from scalegpt.planner.memory.deepspeed.sharded import offloaded
from scalegpt.planner.memory.tensors import ModelShapes, numel
from scalegpt.planner.memory.timeline import rounded
from scalegpt.units import BYTES

_AWAY, _COMING, _HERE = range(3)


@dataclass(frozen=True)
class Gathering:
    """The settings and sizes that decide when each weight is gathered.

    Attributes:
        blocks: L, the number of blocks.
        matrices: the elements of each tensor of a block that is cut over the ranks, in the module's order.
        head: elements of the token embedding; 0 if it is kept whole.
        positions: elements of the position embedding; 0 if it is kept whole; None: positions are not learned.
        tied: whether the head is the token embedding.
        shards: W, the number of ranks over which each tensor is cut.
        copy_over: the number of ranks over which a second copy of each tensor is cut; 0: there is none.
        width: bytes of an element of a weight.
        on_host: whether a rank's parts lie in host memory, and are copied to the device to be gathered.
        prefetch: ``stage3_prefetch_bucket_size``, in elements.
        live: ``stage3_max_live_parameters``, in elements.
        reuse: ``stage3_max_reuse_distance``, in elements.
    """

    blocks: int
    matrices: tuple[int, ...]
    head: int
    positions: int | None
    tied: bool
    shards: int
    copy_over: int
    width: int
    on_host: bool
    prefetch: int
    live: int
    reuse: int


class Visit(NamedTuple):
    """Bytes of gathered weights around one pass through a module.

    Attributes:
        fetching: the most while the module's weights are fetched.
        during: while the module computes.
        releasing: the most while the weights are released.
        after: when the module's weights have been released.
    """

    fetching: int
    during: int
    releasing: int
    after: int


@dataclass(frozen=True)
class Schedule:
    """The visits to all modules in one micro step.

    Attributes:
        start: the model itself, which uses the head's matrix, before its forward pass; it is released in ``end``.
        embeddings: token embedding, then position embedding if there is one, in the forward pass.
        blocks: the blocks in the forward pass, the first block first.
        norm: the final norm in the forward pass.
        end: the release of the model itself, when the forward pass is over.
        back: the model itself, before its backward pass.
        norm_back: the final norm in the backward pass.
        blocks_back: the blocks in the backward pass, listed with the first block first.
        embeddings_back: position embedding if there is one, then token embedding, in the backward pass.
        fetched: the elements, including padding, that are gathered over all ranks in the forward and in the backward pass.
        fetched_near: the same for the elements that are gathered from second copies.
        copies: bytes of the second copies that live when the micro step is over.
    """

    start: Visit
    embeddings: tuple[Visit, ...]
    blocks: tuple[Visit, ...]
    norm: Visit
    end: Visit
    back: Visit
    norm_back: Visit
    blocks_back: tuple[Visit, ...]
    embeddings_back: tuple[Visit, ...]
    fetched: tuple[int, int]
    fetched_near: tuple[int, int]
    copies: int


def gathering(run: RunConfig, shards: int, settings: Settings) -> Gathering:
    """Collect what stage 3 gathers and prefetches in a run; ``settings`` is DeepSpeed's complete configuration."""
    zero, model = settings["zero_optimization"], run.model
    threshold, parameters = int(zero["stage3_param_persistence_threshold"]), ModelShapes.of(model)
    head, copy_over = model.vocab_size * model.n_embd, int(zero["zero_hpz_partition_size"])
    positions = None if parameters.positions is None else numel(parameters.positions)
    return Gathering(
        blocks=model.n_layer,
        matrices=tuple(numel(shape) for shape in parameters.block if numel(shape) > threshold),
        head=head if head > threshold else 0,
        positions=0 if positions is not None and positions <= threshold else positions,
        tied=model.tie_head,
        shards=shards,
        copy_over=copy_over if copy_over > 1 else 0,
        width=BYTES[run.train.precision],
        on_host=offloaded(zero, "param"),
        prefetch=int(zero["stage3_prefetch_bucket_size"]),
        live=int(zero["stage3_max_live_parameters"]),
        reuse=int(zero["stage3_max_reuse_distance"]),
    )


@lru_cache(maxsize=256)
def schedule(given: Gathering, *, first: bool = True) -> Schedule:
    """Simulate one micro step; ``first`` says that it is the first after an update, so that there are no second copies yet.

    The result is cached: it does not depend on the micro batch size.
    """
    play = _Coordinator(given, copied=bool(given.copy_over) and not first)
    start = play.enter(0)
    embeddings = tuple(map(play.visit, play.embeddings))
    forward = tuple(map(play.visit, play.blocks))
    norm = play.visit(play.norm)
    end = play.leave(0, play.norm + 1)
    (far, near), play.fetched = play.fetched, [0, 0]
    back = play.enter(0)
    norm_back = play.visit(play.norm)
    backward = tuple(map(play.visit, reversed(play.blocks)))
    tail = tuple(map(play.enter, reversed(play.embeddings)))
    far_back, near_back = play.fetched
    fetched, fetched_near = (far, far_back), (near, near_back)
    copies = sum(map(play.copy, range(len(play.numel))))
    passes = start, embeddings, forward, norm, end, back, norm_back, backward[::-1], tail
    return Schedule(*passes, fetched, fetched_near, copies)


class _Coordinator:
    """DeepSpeed's coordinator. Modules have numbers: 0 the model, then the embeddings, then blocks, then final norm."""

    def __init__(self, given: Gathering, *, copied: bool) -> None:
        self.given = given
        per_block = len(given.matrices)
        tables = [given.head] if given.positions is None else [given.head, given.positions]
        first = len(tables)
        self.embeddings = range(1, 1 + first)
        self.blocks = range(1 + first, 1 + first + given.blocks)
        self.norm = self.blocks.stop
        self.numel = [*tables, *given.matrices * given.blocks]
        root = 0
        if not given.tied:
            self.numel.append(given.head)
            root = len(self.numel) - 1
        starts = range(first, first + given.blocks * per_block, per_block) if per_block else [first] * given.blocks
        inner = [tuple(range(start, start + per_block)) for start in starts]
        outer = [(p,) if self.numel[p] else () for p in (root, *range(first))]
        self.modules: list[tuple[int, ...]] = [*outer, *inner, ()]
        self.order = [*range(self.norm + 1), 0, *reversed(range(1, self.norm + 1))]
        self.queue = [(p, step) for step, module in enumerate(self.order) for p in self.modules[module]]
        self.next = self.step = 0
        self.state = [_AWAY] * len(self.numel)
        self.reached = [-1] * len(self.numel)
        self.users = Counter[int]()
        self.group: dict[int, int] = {}
        self.groups: dict[int, list[int]] = {}
        self.waiting: dict[int, int] = {}
        self.available = self.highest = 0
        self.fetched = [0, 0]  # elements gathered over all ranks, and from second copies
        self.copied = [copied] * len(self.numel)
        self.bytes = sum(map(self.copy, range(len(self.numel)))) if copied else 0

    def visit(self, module: int) -> Visit:
        entered = self.enter(module)
        left = self.leave(module, self.step)
        return left._replace(fetching=entered.fetching)

    def leave(self, module: int, step: int) -> Visit:
        """Release a module's weights after its pass."""
        during = self.highest = self.bytes
        self._release(module, step)
        return Visit(during, during, self.highest, self.bytes)

    def enter(self, module: int) -> Visit:
        """Fetch a module's weights, then prefetch the next ones."""
        self.highest = self.bytes
        needed = self.modules[module]
        self._gather([p for p in needed if self.state[p] == _AWAY])
        for p in needed:
            self.users[p] += 1
            self._wait(p)
        self._prefetch(needed)
        self.step += 1
        return Visit(self.highest, self.bytes, self.bytes, self.bytes)

    def _release(self, module: int, step: int) -> None:
        kept = self._used_soon(step)
        for p in self.modules[module]:
            self.users[p] -= 1
            if self.reached[p] <= step and p not in kept and self.state[p] == _HERE and not self.users[p]:
                if self.given.copy_over and not self.copied[p]:
                    self.copied[p] = True
                    self._hold(self.copy(p))
                self.state[p] = _AWAY
                self.available -= self.numel[p]
                self.bytes -= self._whole(p)

    def _used_soon(self, step: int) -> set[int]:
        """The parameters that stay gathered, because modules use them within the next ``reuse`` elements from ``step`` on."""
        soon, passed = set[int](), 0
        for module in self.order[step:] if self.given.reuse else ():
            if passed >= self.given.reuse:
                break
            for p in self.modules[module]:
                soon.add(p)
                passed += self.numel[p]
        return soon

    def _whole(self, p: int) -> int:
        """Bytes that gathering adds for a parameter; 0 on a single rank without offload, which holds it whole."""
        return 0 if self.given.shards == 1 and not self.given.on_host else rounded(self.given.width * self.numel[p])

    def copy(self, p: int) -> int:
        """Bytes of this rank's part of the second copy of a parameter; 0 if there are no second copies."""
        over = self.given.copy_over
        return rounded(self.given.width * self._part(p) * self.given.shards // over) if over else 0

    def _part(self, p: int) -> int:
        return -(-self.numel[p] // self.given.shards)

    def _buffer(self, wanted: Sequence[int]) -> int:
        """Bytes of the buffer into which these parameters are gathered."""
        if self.given.shards == 1:
            return sum(map(self._whole, wanted))
        return rounded(self.given.width * self.given.shards * sum(map(self._part, wanted)))

    def _gather(self, wanted: Sequence[int]) -> None:
        """Start to gather parameters: into one buffer those with second copies, and into another one those without."""
        for near in (True, False):
            if some := [p for p in wanted if self.copied[p] == near]:
                self._gather_together(some, near=near)

    def _gather_together(self, wanted: Sequence[int], *, near: bool) -> None:
        key = wanted[0]
        for p in wanted:
            self.state[p] = _COMING
            self.group[p] = key
            self.available += self.numel[p]
            self.fetched[near] += self.given.shards * self._part(p)
        self.groups[key], self.waiting[key] = list(wanted), len(wanted)
        away = self.given.on_host and self.given.shards > 1
        copies = sum(rounded(self.given.width * self._part(p)) for p in wanted) if away else 0
        self._hold(self._buffer(wanted) + copies)
        self.bytes -= copies

    def _wait(self, p: int) -> None:
        """Wait for a parameter: copy it out of its group's buffer, and free the buffer after the group's last parameter."""
        key = self.group.pop(p, None)
        if key is None:
            return
        wanted = self.groups[key]
        copied = len(wanted) > 1 and self.given.shards > 1
        if self.state[p] == _COMING:
            for other in wanted:
                self.state[other] = _HERE
            if copied:
                self._hold(sum(map(self._whole, wanted)))
        self.waiting[key] -= 1
        if not self.waiting[key]:
            self.bytes -= self._buffer(wanted) - (0 if copied else sum(map(self._whole, wanted)))

    def _hold(self, size: int) -> None:
        self.bytes += size
        self.highest = max(self.highest, self.bytes)

    def _prefetch(self, needed: Sequence[int]) -> None:
        missing = sum(self.reached[p] < self.step for p in needed)
        for p, step in self.queue[self.next : self.next + missing]:
            self.reached[p] = step
        self.next += missing
        most = min(self.given.live - self.available, self.given.prefetch) if self.given.prefetch > 0 else 0
        chosen, size = [], 0
        while self.next < len(self.queue) and size < most:
            p, step = self.queue[self.next]
            self.next += 1
            if self.state[p] == _AWAY and p not in chosen:
                chosen.append(p)
                size += self.numel[p]
            self.reached[p] = max(self.reached[p], step)
        self._gather(sorted(chosen))
