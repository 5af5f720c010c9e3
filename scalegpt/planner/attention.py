"""The attention kernel that torch chooses on CUDA; used to plan memory, to trace a step, and to check ``--attention``.

Torch tries its kernels in a fixed order and takes the first that supports the inputs (``sdp_utils.cpp:
select_sdp_backend``, torch 2.13). The order is flash, the memory-efficient kernel, and math, which supports all inputs. On
Hopper and data-centre Blackwell cuDNN's kernel comes before these three. With a cuDNN older than 9.15.1, torch tries flash
before cuDNN's kernel there too. This does not change a plan: flash and cuDNN's kernel keep the same tensors for the backward
pass and, by our estimate, need the same temporary memory.
"""

from scalegpt.config import RunConfig
from scalegpt.hardware.gpus import Card

FLASH_LARGEST_HEAD = 256
"""Largest head size of torch's FlashAttention-2 (``sdp_utils.cpp: check_head_dim_size_flash``)."""

CUDNN_LARGEST_HEAD = 128
"""Largest head size of cuDNN's kernel. Cards in :data:`_PREFERS_CUDNN` also take a head size of exactly 256
(``check_cudnn_d256_bprop_head_dim``)."""

_SMALL_SHARED_MEMORY = frozenset({"8.6", "8.7", "8.9", "12.0", "12.1"})
"""Compute capabilities on which flash cannot train head sizes in (192, 224], nor in (224, 256] with dropout (torch,
``sdp_utils.cpp: check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120``)."""

_PREFERS_CUDNN = frozenset({"9.0", "10.0", "10.3"})
"""Compute capabilities on which torch tries cuDNN's kernel first (``check_prefer_cudnn_attention``)."""


def attention_kernel(run: RunConfig, card: Card | None = None) -> str:
    """The kernel that computes the run's attention on CUDA: ``flash``, ``mem_efficient``, ``cudnn`` or ``math``.

    Args:
        run: a run whose precision is resolved.
        card: the card that the run uses; None: any card of compute capability 8.0 or later that prefers flash.
    """
    if run.train.attention != "auto":
        return run.train.attention
    if run.train.packs_documents:  # flash takes no mask, and cuDNN's kernel is not planned with one
        return "math" if unfit("mem_efficient", run, card) else "mem_efficient"
    order = ["flash", "mem_efficient"]
    if card is not None and card.capability in _PREFERS_CUDNN:
        order.insert(0, "cudnn")
    return next((kernel for kernel in order if unfit(kernel, run, card) is None), "math")


def counted_as(kernel: str) -> str:
    """The kernel whose memory and work a plan counts for ``kernel``: flash for ``cudnn``, else ``kernel`` itself."""
    return "flash" if kernel == "cudnn" else kernel


def unfit(kernel: str, run: RunConfig, card: Card | None = None) -> str | None:
    """Why a kernel cannot train the run, in words that continue "attention KERNEL"; None if it can train the run.

    Args:
        kernel: ``flash``, ``mem_efficient``, ``cudnn`` or ``math``.
        run: a run whose precision is resolved.
        card: the card that the run uses; None: any card of compute capability 8.0 or later.
    """
    if kernel == "flash":
        return _unfit_for_tensor_cores(run, card) or _unfit_for_flash(run, card)
    if kernel == "cudnn":
        return _unfit_for_tensor_cores(run, card) or _unfit_for_cudnn(run, card)
    if kernel == "mem_efficient":
        return _unfit_for_mem_efficient(run, card)
    return None


def _unfit_for_tensor_cores(run: RunConfig, card: Card | None) -> str | None:
    if run.train.precision == "fp32":
        return "computes in bf16 or fp16, not fp32"
    if card is not None and not card.has_flash:
        return f"does not run on {card.name}; use --attention mem_efficient there"
    return None


def _unfit_for_flash(run: RunConfig, card: Card | None) -> str | None:
    head = run.model.head_width
    if head > FLASH_LARGEST_HEAD:
        return f"takes heads of at most {FLASH_LARGEST_HEAD}, not {head}"
    if card is None or card.capability not in _SMALL_SHARED_MEMORY or head <= 192:
        return None
    if head <= 224:
        return f"cannot train heads of {head} on {card.name}"
    return f"cannot train heads of {head} with dropout on {card.name}" if run.model.dropout else None


def _unfit_for_cudnn(run: RunConfig, card: Card | None) -> str | None:
    head = run.model.head_width
    if card is not None and card.is_amd:
        return f"does not run on {card.name}, which is not Nvidia's"
    if head % 8:
        return f"takes heads that are a multiple of 8, not {head}"
    wide = head == 2 * CUDNN_LARGEST_HEAD and (card is None or card.capability in _PREFERS_CUDNN)
    if head > CUDNN_LARGEST_HEAD and not wide:
        return f"takes heads of at most {CUDNN_LARGEST_HEAD}, not {head}"
    if (16 * run.model.dropout) % 1:
        return f"takes dropout in sixteenths, for example 0.125, not {run.model.dropout}"
    return None


def _unfit_for_mem_efficient(run: RunConfig, card: Card | None) -> str | None:
    """Why the memory-efficient kernel cannot train the run (see :func:`unfit`).

    It needs head sizes that are a multiple of torch's ``minimum_gemm_alignment``: 16 bytes where tensor cores are used,
    which in fp32 is from capability 8.0 on.
    """
    old = card is not None and not card.has_flash
    aligned = 8 if run.train.precision != "fp32" else 1 if old else 4
    head = run.model.head_width
    if head % aligned:
        return f"takes heads that are a multiple of {aligned} in {run.train.precision}, not {head}"
    return None
