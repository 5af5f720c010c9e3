"""ZeRO-3: makes a model's weights a block at a time in the ranks' parts, so that no rank ever holds all of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from scalegpt.model.gpt import GPT


def place_stand_ins(model: GPT, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the parameters of a model on ``meta`` by parameters of the same shapes that take no memory.

    An optimizer can be made of them. Each is a view of a single element.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            view = torch.zeros(1, dtype=dtype, device=device).expand(parameter.shape)
            setattr(module, name, nn.Parameter(view))


def shard(deepspeed: Any, model: GPT, settings: dict[str, Any]) -> None:
    """Give the stand-ins their memory, filled with zeros, and shard them over the ranks, a block at a time.

    DeepSpeed would shard the model in the same way and order when it makes its engine, but all of it would have to exist.
    """
    # Wraps torch's group. Without it zero.Init would read the settings as those of one rank.
    deepspeed.init_distributed(verbose=False)
    sharded: Any = None  # a parameter with DeepSpeed's methods
    for part in _parts(model):
        parameters = list(part.parameters())
        for parameter in parameters:
            parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        if sharded is not None:
            sharded.convert_to_zero_parameters(param_list=parameters)
        elif parameters:
            deepspeed.zero.Init(module=part, config_dict_or_path=settings, dtype=parameters[0].dtype)
            sharded = parameters[0]


def _parts(model: GPT) -> Iterator[nn.Module]:
    """The blocks and the modules around them, in the order of the model's parameters."""
    for child in model.children():
        yield from child.children() if child is model.blocks else (child,)
