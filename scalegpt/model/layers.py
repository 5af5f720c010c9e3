"""Layers whose weights are cast to the dtype that they compute in, where they are used."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LayerNorm", "Linear"]


def _cast(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)


class Linear(nn.Linear):
    """A linear layer whose weights are cast to the input's dtype where they are used."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype), _cast(self.bias, x))


class LayerNorm(nn.LayerNorm):
    """LayerNorm of an input of any dtype; the statistics are fp32 inside torch's kernel."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., H] → [..., H], in ``dtype`` or x's own."""
        y = F.layer_norm(x, self.normalized_shape, _cast(self.weight, x), _cast(self.bias, x), self.eps)
        return y if dtype is None else y.to(dtype)
