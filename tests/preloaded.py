"""What rank processes of tests import, loaded once: ``ranks.py`` forks them from a process that has imported this.

Without that, torch, its compiler and DeepSpeed take each rank of each test about five seconds of a core.
"""

import contextlib
import gc
import importlib

for name in (
    "torch._inductor.compile_fx",  # DeepSpeed's optimizers import it
    "scalegpt.backends.fsdp",
    "scalegpt.checkpoint.saver",
    "scalegpt.optim.factory",
    "deepspeed",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
):
    with contextlib.suppress(ImportError):  # DeepSpeed is an extra
        importlib.import_module(name)

gc.freeze()  # DeepSpeed collects garbage many times while it starts, and these are no garbage
