"""Makes a DeepSpeed engine skip a step and clear its gradients.

Weights, moments, step counts and loss scale do not change.

DeepSpeed (0.19.8) skips a step only if it finds gradients that are not finite. How it checks them depends on its
wrapper of the optimizer:

================================  ========================================================================================
wrapper (stage)                   what makes ``step()`` return without a step
================================  ========================================================================================
none (stage 0 in fp32 and bf16)   nothing; the backend steps by itself
``FP16_UnfusedOptimizer`` (0)     ``overflow_checker.check()``, or a norm that is not finite
``BF16_Optimizer`` (1 in bf16)    a norm that is not finite
``DeepSpeedZeroOptimizer`` (1, 2) ``has_overflow()`` where ``check_grad_overflow`` is set (fp16 always, bf16 by default, fp32
                                  never), and a norm that is not finite, except in bf16 without that setting
``…ZeroOptimizer_Stage3``         a norm that is not finite, and in fp16 ``check_overflow()``
================================  ========================================================================================

All ranks get the same result from each check. If a step must be skipped although its gradients are finite, the check is
overridden, so that DeepSpeed clears its buffers itself. In fp16 DeepSpeed is also kept from halving the loss scale.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def discarding(optimizer: Any) -> Iterator[None]:
    """Make ``engine.step()`` skip the step and clear the gradients inside the ``with`` block.

    Args:
        optimizer: DeepSpeed's wrapper around the optimizer.
    """

    def found(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    def forget(*_: Any, **__: Any) -> None:
        found()
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()

    with ExitStack() as overridden:

        def override(name: str, value: Any, owner: Any = optimizer) -> None:
            overridden.enter_context(_overridden(owner, name, value))

        if hasattr(optimizer, "clear_hp_grads"):  # BF16_Optimizer
            override("step", forget)
        else:
            override("_update_scale", _nothing)
            if hasattr(optimizer, "overflow_checker"):  # FP16_UnfusedOptimizer
                override("check", found, optimizer.overflow_checker)
            elif hasattr(optimizer, "check_grad_overflow"):  # stages 1 and 2
                override("check_grad_overflow", True)
                override("has_overflow", found)
            else:
                override("_overflow_check_and_loss_scale_update", found)
        yield


def forget_gradients(optimizer: Any) -> None:
    """Clear the gradients that DeepSpeed keeps after a skipped step.

    With the optimizer offloaded, stages 1 and 2 reset their flags but not the buffers in which fp32 gradients are
    accumulated (``averaged_gradients``): a NaN would stay there, and every later step would be skipped too.
    """
    if hasattr(optimizer, "check_grad_overflow"):
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None


@contextmanager
def _overridden(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of an object another value inside the ``with`` block."""
    assert hasattr(owner, name), f"this DeepSpeed's {type(owner).__name__} has no {name}"
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing. This replaces a method."""
