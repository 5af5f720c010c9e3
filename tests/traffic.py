"""Counting the bytes that operators read and write, for tests of what the planner says of them."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOUCHED = {"gather": 0, "scatter_add_": 0, "nll_loss_forward": 0, "nll_loss_backward": 1, "_unsafe_view": 0}
"""Operators that touch one number of each row or none → how often they go through their result all the same."""


def tensors_in(values: Any) -> dict[int, int]:
    """Place in memory → bytes, of each tensor once."""
    return {each.data_ptr(): each.nbytes for each in tree_leaves(values) if isinstance(each, torch.Tensor)}


class Traffic(TorchDispatchMode):
    """Bytes that operators move: they read each tensor that they are given, and write each that they return or change."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view and func is not torch.ops.aten.empty_like.default:
            self.kernels += 1
            self.moved += self._moved(func, args, kwargs, result)
        return result

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
        name = func.overloadpacket.__name__
        if name in TOUCHED:
            return TOUCHED[name] * sum(tensors_in(result).values())
        given = {each.name: value for each, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        changed = {each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write}
        changed -= {"grads"}  # the fused update writes them only where they are scaled
        written = tensors_in(result) | tensors_in([given[each] for each in changed])
        only_written = {"out", "grad_input"} | ({"self"} if name == "copy_" else set())
        read = tensors_in([value for each, value in given.items() if each not in only_written])
        return sum(read.values()) + sum(written.values())
