"""Which weights ZeRO-3 holds gathered at each moment of a micro step: DeepSpeed's coordinator, played without torch.

Follows deepspeed 0.19, ``partitioned_param_coordinator.py`` (``fetch_sub_module``, ``release_sub_module``) and
``partition_parameters.py`` (``all_gather_coalesced``), in the steady state, when the order of the modules is known:

- A module's weights are gathered before its forward pass and before its backward pass. What lies next in the order is
  prefetched: parameters are added until they reach the bucket, which may therefore reach into the block after the next.
- Weights that are gathered together arrive in one flat buffer and are copied out of it when the first module needs them; the
  buffer lives until the last of them has been asked for. A single tensor needs no copy.
- A module's weights are let go after it, unless the prefetch has met them again already: the last block's stay for its
  backward pass.
- The model itself counts as a module whose weights are those it uses outside of their own module: the head's matrix. It stays
  for the whole of the forward pass and again of the backward pass.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.config import RunConfig
from scalegpt.planner.memory.deepspeed.sharded import Settings, offloaded
from scalegpt.planner.memory.tensors import Tensors, numel
from scalegpt.planner.memory.timeline import rounded
from scalegpt.units import BYTES

_AWAY, _COMING, _HERE = range(3)


@dataclass(frozen=True)
class Gathering:
    """The settings and sizes that decide what is gathered when.

    Attributes:
        matrices: elements of each of a block's tensors that are sharded for good, in the module's order.
        head: elements of the token embedding; 0 where it is kept whole.
        positions: elements of the position embedding; 0 where it is kept whole.
        tied: whether the head is the token embedding.
        width: bytes of a weight.
        on_host: whether the parts lie in host memory and are copied to the device to be gathered.
        prefetch: ``stage3_prefetch_bucket_size``.
        live: ``stage3_max_live_parameters``.
        reuse: ``stage3_max_reuse_distance``.
    """

    blocks: int
    matrices: tuple[int, ...]
    head: int
    positions: int
    tied: bool
    shards: int
    width: int
    on_host: bool
    prefetch: int
    live: int
    reuse: int


@dataclass(frozen=True)
class Visit:
    """Bytes of gathered weights around one pass through a module.

    Attributes:
        fetching: at most, while they are fetched.
        during: while the module computes.
        after: when its weights have been let go.
    """

    fetching: int
    during: int
    after: int


@dataclass(frozen=True)
class Schedule:
    """A micro step: the visits of the modules in their order.

    Attributes:
        start: the model itself, before its forward pass; its ``after`` is of no meaning.
        embeddings: token embedding, then position embedding.
        blocks: forward, the first block first.
        norm: the last norm, forward.
        end: bytes when the forward pass is over.
        back: the model itself, before its backward pass.
        norm_back: the last norm, backward.
        blocks_back: backward, in the order of the blocks, the first block first.
        embeddings_back: position embedding, then token embedding.
        fetched: elements that are gathered on the way forward, and on the way back, with what fills their parts.
    """

    start: Visit
    embeddings: tuple[Visit, Visit]
    blocks: tuple[Visit, ...]
    norm: Visit
    end: int
    back: Visit
    norm_back: Visit
    blocks_back: tuple[Visit, ...]
    embeddings_back: tuple[Visit, Visit]
    fetched: tuple[int, int]


def gathering(run: RunConfig, shards: int, settings: Settings) -> Gathering:
    """What decides in a run what is gathered when.

    Args:
        run: a run of stage 3.
        shards: over how many ranks each tensor is cut.
        settings: DeepSpeed's complete configuration.
    """
    zero, model = settings["zero_optimization"], run.model
    threshold, parameters = int(zero["stage3_param_persistence_threshold"]), Tensors.of(model)
    head, positions = model.vocab_size * model.n_embd, model.block_size * model.n_embd
    return Gathering(
        blocks=model.n_layer,
        matrices=tuple(numel(shape) for shape in parameters.block if numel(shape) > threshold),
        head=head if head > threshold else 0,
        positions=positions if positions > threshold else 0,
        tied=model.tie_head,
        shards=shards,
        width=BYTES[run.train.precision],
        on_host=offloaded(zero, "param"),
        prefetch=int(zero["stage3_prefetch_bucket_size"]),
        live=int(zero["stage3_max_live_parameters"]),
        reuse=int(zero["stage3_max_reuse_distance"]),
    )


@lru_cache(maxsize=256)
def schedule(given: Gathering) -> Schedule:
    """Play one micro step. Remembered, because it does not depend on the micro batch."""
    play, blocks = _Coordinator(given), given.blocks
    start = play.enter(0)
    embeddings = play.visit(1), play.visit(2)
    forward = tuple(play.visit(3 + i) for i in range(blocks))
    norm = play.visit(3 + blocks)
    play.release(0, 4 + blocks)
    end, fetched = play.bytes, play.fetched
    back = play.enter(0)
    norm_back = play.visit(3 + blocks)
    backward = tuple(play.visit(3 + i) for i in reversed(range(blocks)))
    tail = play.enter(2), play.enter(1)
    back_again = play.fetched - fetched
    return Schedule(start, embeddings, forward, norm, end, back, norm_back, backward[::-1], tail, (fetched, back_again))


class _Coordinator:
    """The state of the gathering. Modules: 0 the model, 1 and 2 the embeddings, then the blocks and the last norm."""

    def __init__(self, given: Gathering) -> None:
        self.given = given
        per_block, blocks = len(given.matrices), given.blocks
        self.numel = [given.head, given.positions, *given.matrices * blocks]
        root = 0
        if not given.tied:
            self.numel.append(given.head)
            root = len(self.numel) - 1
        inner = [tuple(range(2 + i * per_block, 2 + (i + 1) * per_block)) for i in range(blocks)]
        outer = [(p,) if self.numel[p] else () for p in (root, 0, 1)]
        self.modules: list[tuple[int, ...]] = [*outer, *inner, ()]
        last = 3 + blocks
        self.order = [*range(last + 1), 0, last, *reversed(range(3, last)), 2, 1]
        self.queue = [(p, step) for step, module in enumerate(self.order) for p in self.modules[module]]
        self.next = self.step = 0
        self.state = [_AWAY] * len(self.numel)
        self.met = [-1] * len(self.numel)
        self.users = Counter[int]()
        self.group: dict[int, int] = {}
        self.groups: dict[int, list[int]] = {}
        self.waiting: dict[int, int] = {}
        self.available = self.bytes = self.highest = self.fetched = 0

    def visit(self, module: int) -> Visit:
        entered = self.enter(module)
        self.release(module, self.step)
        return Visit(entered.fetching, entered.during, self.bytes)

    def enter(self, module: int) -> Visit:
        """Fetch a module's weights, then prefetch."""
        self.highest = self.bytes
        needed = self.modules[module]
        self._gather([p for p in needed if self.state[p] == _AWAY])
        for p in needed:
            self.users[p] += 1
            self._wait(p)
        self._prefetch(needed)
        self.step += 1
        return Visit(self.highest, self.bytes, self.bytes)

    def release(self, module: int, step: int) -> None:
        kept = self._used_soon(step)
        for p in self.modules[module]:
            self.users[p] -= 1
            if self.met[p] <= step and p not in kept and self.state[p] == _HERE and not self.users[p]:
                self.state[p] = _AWAY
                self.available -= self.numel[p]
                self.bytes -= self._whole(p)

    def _used_soon(self, step: int) -> set[int]:
        """Parameters that come again within the reuse distance."""
        soon, passed = set[int](), 0
        for module in self.order[step:] if self.given.reuse else ():
            if passed >= self.given.reuse:
                break
            for p in self.modules[module]:
                soon.add(p)
                passed += self.numel[p]
        return soon

    def _whole(self, p: int) -> int:
        """Bytes of a gathered parameter; a single rank looks into the part that it holds, which is the whole."""
        return 0 if self.given.shards == 1 and not self.given.on_host else rounded(self.given.width * self.numel[p])

    def _part(self, p: int) -> int:
        return -(-self.numel[p] // self.given.shards)

    def _buffer(self, wanted: Sequence[int]) -> int:
        """Bytes of what parameters are gathered into."""
        if self.given.shards == 1:
            return sum(map(self._whole, wanted))
        return rounded(self.given.width * self.given.shards * sum(map(self._part, wanted)))

    def _gather(self, wanted: Sequence[int]) -> None:
        """Start to gather parameters into one buffer."""
        if not wanted:
            return
        key = wanted[0]
        for p in wanted:
            self.state[p] = _COMING
            self.group[p] = key
            self.available += self.numel[p]
            self.fetched += self.given.shards * self._part(p)
        self.groups[key], self.waiting[key] = list(wanted), len(wanted)
        away = self.given.on_host and self.given.shards > 1
        copies = sum(rounded(self.given.width * self._part(p)) for p in wanted) if away else 0
        self._hold(self._buffer(wanted) + copies)
        self.bytes -= copies

    def _wait(self, p: int) -> None:
        """A module needs a parameter: its group is copied out, and the buffer goes with the last of the group."""
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
        missing = sum(self.met[p] < self.step for p in needed)
        for p, step in self.queue[self.next : self.next + missing]:
            self.met[p] = step
        self.next += missing
        most = min(self.given.live - self.available, self.given.prefetch) if self.given.prefetch > 0 else 0
        chosen, size = [], 0
        while self.next < len(self.queue) and size < most:
            p, step = self.queue[self.next]
            self.next += 1
            if self.state[p] == _AWAY and p not in chosen:
                chosen.append(p)
                size += self.numel[p]
            self.met[p] = max(self.met[p], step)
        self._gather(sorted(chosen))
