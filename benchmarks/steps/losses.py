"""Implementations of head and cross entropy, ours and those of other libraries, for timing them separately.

Each has the interface of our model's loss: hidden states in the compute dtype and the head's fp32 weights, with gradients in
the same dtypes. The other libraries need the head in the compute dtype, so their time includes the cast.
"""

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from scalegpt.errors import InputError
from scalegpt.model.chunk import IGNORED
from scalegpt.model.loss import Loss, full_cross_entropy, make_loss

COMPARED_TOKENS = 4096
"""The largest number of tokens over which a loss's gradients are compared with the gradients of full logits in fp32."""

MOST_ERROR = 0.2
"""The largest relative error of a correct loss's gradients. Rounding to the compute dtype causes a fortieth of this."""


def inputs(n: int, H: int, V: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states [n, H] in the compute dtype, head [V, H] in fp32, and targets [n]."""
    generator = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(n, H, device=device, generator=generator).to(dtype).requires_grad_()
    head = (0.02 * torch.randn(V, H, device=device, generator=generator)).requires_grad_()
    return hidden, head, torch.randint(V, (n,), device=device, generator=generator)


def loss_of(way: str, *, chunk: int = 1024, compiled: bool = False) -> Loss:
    """The loss of this name: our ``full`` or ``chunked``, torch's ``torch`` or ``torch chunked``, or ``liger``.

    Raises:
        InputError: the installed torch or liger-kernel does not have this loss.
    """
    if way == "chunked":
        return make_loss("chunked", chunk, compiled=compiled)
    if way == "full":
        return torch.compile(full_cross_entropy, dynamic=False) if compiled else full_cross_entropy
    if way in {"torch", "torch chunked"}:
        if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise InputError(f"torch {torch.__version__} has no linear_cross_entropy with options; 2.13 has")
        options = torch.nn.LinearCrossEntropyOptions() if way == "torch chunked" else None
        return lambda hidden, head, targets: F.linear_cross_entropy(
            hidden, head.to(hidden.dtype), targets, ignore_index=IGNORED, options=options
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise InputError("liger-kernel is not installed; pip install liger-kernel")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    liger = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
    return lambda hidden, head, targets: liger(head.to(hidden.dtype), hidden, targets)


def gradients(loss: Loss, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The gradients of hidden states and head, by one forward and one backward pass."""
    return torch.autograd.grad(loss(hidden, head, targets), (hidden, head))


def relative_error(loss: Loss, hidden: Tensor, head: Tensor, targets: Tensor) -> float:
    """The relative error of a loss's gradients against full logits in fp32, in the Frobenius norm.

    It is the larger error of the two gradients, of hidden states and of the head.

    Raises:
        RuntimeError: the error exceeds :data:`MOST_ERROR`, so the loss computes something else.
    """
    some, targets = hidden[:COMPARED_TOKENS].detach().requires_grad_(), targets[:COMPARED_TOKENS]
    exact = gradients(full_cross_entropy, some.detach().float().requires_grad_(), head, targets)
    found = gradients(loss, some, head, targets)
    error = max(float((f.float() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True))
    if not error <= MOST_ERROR:
        raise RuntimeError(f"its gradients are {error:.1%} off: it is another loss")
    return error
