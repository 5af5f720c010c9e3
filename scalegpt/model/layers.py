"""Layers that cast their weights to the dtype of the computation when they use them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalegpt.config import ModelConfig
from scalegpt.model.cpu import rms_norm as on_cpu

__all__ = ["LayerNorm", "Linear", "RMSNorm", "norm_of"]


def _cast(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)


class Linear(nn.Linear):
    """A linear layer that casts its weights to the input's dtype when it uses them."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in x's dtype."""
        weight, bias = self.weight.to(x.dtype), _cast(self.bias, x)
        if bias is None:
            return F.linear(x, weight)
        # As rows: for more dimensions DeepSpeed's stage 3, which replaces F.linear, adds the bias in place to the matmul's
        # result. Selective recompute has kept this result then, and would add the bias a second time.
        return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of an input of any dtype, with fp32 statistics inside torch's kernel."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., H] → [..., H], in ``dtype`` or x's own."""
        y = F.layer_norm(x, self.normalized_shape, _cast(self.weight, x), _cast(self.bias, x), self.eps)
        return y if dtype is None else y.to(dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) of an input of any dtype, with fp32 arithmetic inside.

    Args:
        width: H, the width of the last dimension, over which rows are normalised.
        eps: added to the mean square.
    """

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.added = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., H] → [..., H], in ``dtype`` or x's own."""
        weight = self.weight.to(x.dtype)
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y: Tensor = on_cpu.rms_norm(x, weight, self.added)[0]
        else:
            y = F.rms_norm(x, self.weight.shape, weight, self.added)
        return y if dtype is None else y.to(dtype)


def norm_of(config: ModelConfig) -> LayerNorm | RMSNorm:
    """A norm over the residual stream, of the kind that the model's configuration names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.has_bias)
