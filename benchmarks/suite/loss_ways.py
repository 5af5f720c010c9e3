"""Ways to compute the head's cross entropy, ours and others', to be timed alone.

Each takes hidden states in the compute dtype and an fp32 master of the head, as our model calls its loss, and gives gradients
of both in these dtypes. Others' want the head in the compute dtype: the cast, forth and back, is part of what they take.
"""

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.suite.children import Values
from scalegpt.errors import InputError
from scalegpt.model.chunk import IGNORED
from scalegpt.model.loss import Loss, full_cross_entropy, make_loss


def loss_of(job: Values, device: torch.device) -> Loss:
    """The loss that a job names by ``way``, ``chunk`` and ``compiled``.

    Raises:
        InputError: this machine has none such.
    """
    way, compiled = job["way"], job["compiled"]
    if way == "chunked":
        return make_loss("chunked", job["chunk"], compiled=compiled)
    if way == "full":
        return torch.compile(full_cross_entropy, dynamic=False) if compiled else full_cross_entropy
    return _torchs() if way.startswith("torch") else _ligers(device)


def _torchs() -> Loss:
    """The chunked loss of torch itself, with the options that it picks itself.

    Raises:
        InputError: this torch has none.
    """
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise InputError(f"torch {torch.__version__} has no linear_cross_entropy with options; 2.13 has")
    chosen = options()

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = function(hidden, head.to(hidden.dtype), targets, ignore_index=IGNORED, options=chosen)
        return result

    return loss


def _ligers(device: torch.device) -> Loss:
    """The fused loss of Liger's kernels.

    Raises:
        InputError: they are not installed, or there is no GPU for them.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise InputError("liger-kernel is not installed; pip install liger-kernel")
    if device.type != "cuda":
        raise InputError("Liger's kernels need a GPU")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = function(head.to(hidden.dtype), hidden, targets)
        return result

    return loss


def gradients(loss: Loss, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the gradients of hidden states and head."""
    of_hidden, of_head = torch.autograd.grad(loss(hidden, head, targets), (hidden, head))
    return of_hidden, of_head


def distance(loss: Loss, hidden: Tensor, head: Tensor, targets: Tensor) -> float:
    """How far the gradients are from those of full logits in fp32: relative, in the Frobenius norm, the worse of the two."""
    exact = gradients(full_cross_entropy, hidden.detach().float().requires_grad_(), head, targets)
    found = gradients(loss, hidden, head, targets)
    return max(float((f.float() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True))
