"""The layouts (backend, ZeRO stage, offload and shard size) among which a question lets the planner choose."""

import itertools
from collections.abc import Iterable
from functools import lru_cache

from scalegpt.config import RunConfig
from scalegpt.config.backends import BACKENDS, OFFLOADS
from scalegpt.config.run import ParallelConfig, optimizer_unfit
from scalegpt.errors import InputError
from scalegpt.planner.search.question import Question

MACHINES = (1, 2, 4)
"""If the planner may choose the shard size, the ranks of N machines are considered, for each N here, beside all ranks."""


def layouts(question: Question) -> tuple[ParallelConfig, ...]:
    """The layouts among which to choose, the simplest first. All of them work and have the values that the user fixed.

    Over one rank sharding saves nothing, so it is considered only with offload, or if the user fixed the stage. On a CPU
    offload is not considered, since the run is in host memory already. On several machines the shard sizes of
    :data:`MACHINES` are considered too.

    Raises:
        InputError: no layout has all the fixed settings.
    """
    own, open_, ranks = question.run.parallel, question.open, question.machine.ranks
    backends = question.backends if "backend" in open_ else (own.backend,)
    found = []
    for backend in backends:
        spec = BACKENDS[backend]
        if spec.one_process and ranks > 1:
            continue
        stages = spec.stages if "zero_stage" in open_ else (own.stage,)
        offloads = (own.offload,) if "offload" not in open_ else OFFLOADS if question.machine.is_gpu else ("none",)
        for stage, offload, size in itertools.product(stages, offloads, _shard_sizes(question)):
            layout = _layout(own, backend, stage, offload, size)
            if layout is None or ranks % (layout.shard_size or 1):
                continue
            if ranks > 1 or _makes_sense_alone(layout, open_):
                found.append(layout)
    if not found:
        raise InputError(
            f"no backend supports this over {ranks} rank{'s' if ranks > 1 else ''}: zero_stage {own.zero_stage}, "
            f"offload {own.offload}, shard_size {own.shard_size or 'none'}, "
            f"backend {own.backend if 'backend' not in open_ else 'auto'}; set one to auto"
        )
    return _with_its_optimizer(question.run, tuple(found))


def _shard_sizes(question: Question) -> tuple[int | None, ...]:
    """The shard sizes to consider, all ranks (None) first; only the run's own if it is fixed."""
    own, machine = question.run.parallel.shard_size, question.machine
    if "shard_size" not in question.open:
        return (own,)
    sizes = [own, *(count * machine.gpus for count in MACHINES if machine.nodes > 1)]
    fitting = sorted({size for size in sizes if size is not None and 1 < size < machine.ranks})
    return (None, *fitting)


def without_other_sizes(found: Iterable[ParallelConfig], size: int | None) -> tuple[ParallelConfig, ...]:
    """Of each backend, stage and offload the layout with this shard size; if there is none, that over all ranks."""
    kept: dict[tuple[str, int, str], ParallelConfig] = {}
    for layout in found:
        place = layout.backend, layout.stage, layout.offload
        if layout.shard_size == size or place not in kept:
            kept[place] = layout
    return tuple(kept.values())


def _with_its_optimizer(run: RunConfig, found: tuple[ParallelConfig, ...]) -> tuple[ParallelConfig, ...]:
    """The layouts under which the run's optimizer works.

    Raises:
        InputError: there is no such layout.
    """
    reasons = {layout: optimizer_unfit(run.train.optimizer, layout) for layout in found}
    possible = tuple(layout for layout, reason in reasons.items() if reason is None)
    if not possible:
        raise InputError(str(reasons[found[0]]))
    return possible


def _layout(own: ParallelConfig, backend: str, stage: int, offload: str, size: int | None) -> ParallelConfig | None:
    """The layout with these settings; None where the backend does not support them.

    If the layout equals ``own``, the layout of the run, it keeps the run's DeepSpeed file.
    """
    same = (backend, stage, offload, size) == (own.backend, own.stage, own.offload, own.shard_size)
    return _made(backend, stage, offload, size, own.ds_config if same else None)


@lru_cache(maxsize=256)
def _made(
    backend: str, stage: int, offload: str, shard_size: int | None, ds_config: str | None
) -> ParallelConfig | None:
    try:
        return ParallelConfig(
            backend=backend, zero_stage=stage, offload=offload, shard_size=shard_size, ds_config=ds_config
        )
    except InputError:  # ParallelConfig refuses settings that do not work together
        return None


def _makes_sense_alone(layout: ParallelConfig, open_: frozenset[str]) -> bool:
    if layout.offload != "none" or "zero_stage" not in open_:
        return True
    return layout.stage == 0 and (layout.spec.one_process or "backend" not in open_)
