"""The rank of this process, read from environment variables and checked; without torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from scalegpt.errors import InputError

START = "start the ranks with torchrun or deepspeed"

_MOST_DIGITS = 9


@dataclass(frozen=True)
class Ranks:
    """The place of a process among the ranks of its job.

    Attributes:
        rank: from 0 to ``size`` - 1.
        size: the number of ranks.
        local_rank: from 0 to ``local_size`` - 1, among the ranks of this machine.
        local_size: the number of ranks of this machine.
        on_one_machine: whether all ranks are known to be on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    on_one_machine: bool = True


def read_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` (torchrun) or ``LOCAL_SIZE`` (DeepSpeed).

    If ``environment`` is None, they are read from this process's environment variables.

    Raises:
        InputError: a variable is not a number, is missing although others are set, or contradicts another one.
    """
    known = os.environ if environment is None else environment
    size = _number(known, "WORLD_SIZE", 1)
    if size < 1:
        raise InputError(f"WORLD_SIZE is {size}; unset it to train in one process, or {START}")
    if size > 1:
        for name in ("RANK", "LOCAL_RANK"):
            if name not in known:
                raise InputError(
                    f"WORLD_SIZE is {size}, but {name} is not set; unset WORLD_SIZE to train in one process, or {START}"
                )
    stated = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in known), None)
    local_size = size if stated is None else _number(known, stated, size)
    if stated is not None and not 1 <= local_size <= size:
        raise _contradiction(stated, local_size, known)
    rank, local_rank = _number(known, "RANK", 0), _number(known, "LOCAL_RANK", 0)
    if rank >= size:
        raise _contradiction("RANK", rank, known)
    if local_rank >= local_size:
        raise _contradiction("LOCAL_RANK", local_rank, known, stated or "WORLD_SIZE")
    here = size == 1 or (stated is not None and local_size == size) or _is_loopback(known.get("MASTER_ADDR", ""))
    return Ranks(rank, size, local_rank, local_size, here)


def ranks_or_alone(environment: Mapping[str, str] | None = None) -> Ranks:
    """Like :func:`read_ranks`, but without errors: if a variable is invalid, this process counts as the only rank."""
    try:
        return read_ranks(environment)
    except InputError:
        return Ranks()


def _number(known: Mapping[str, str], name: str, default: int) -> int:
    text = known.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        raise InputError(f"{name} is {text[:40]!r}, not a number; unset it to train in one process, or {START}")
    return int(text)


def _contradiction(name: str, value: int, known: Mapping[str, str], limit: str = "WORLD_SIZE") -> InputError:
    other = f"{limit} is {known[limit]}" if limit in known else f"{limit} is not set"
    return InputError(f"{name} is {value}, but {other}; unset both to train in one process, or {START}")


def _is_loopback(address: str) -> bool:
    return address == "localhost" or address.startswith("127.") or address == "::1"
