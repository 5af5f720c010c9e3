"""Measures the time that the host needs to start a kernel: Python, modules, the dispatcher, autograd.

``python benchmarks/host_time.py`` runs steps of a tiny GPT, in which computing takes almost no time, on one core, eager
and compiled. It divides the time of a block by the number of kernels that the planner counts for it. On a GPU the host
does the same work, and in addition the driver launches the kernel. This measurement is the starting point from which
``DISPATCH`` in ``scalegpt/planner/time/rates.py`` is fitted to published runs.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from scalegpt.config.presets import resolve
from scalegpt.model.gpt import GPT
from scalegpt.planner.time.step_time import StepWork

FEW, MANY = 4, 20
"""Two numbers of blocks. The difference of their times is the time of the additional blocks."""
STEPS, ROUNDS = 20, 8
KINDS = ("eager", "compiled")


class _Steps:
    """Steps of a model with a given number of blocks."""

    def __init__(self, layers: int, *, compiled: bool) -> None:
        shape = {"n_layer": layers, "n_embd": 64, "n_head": 4, "block_size": 8, "vocab_size": 64, "bias": True}
        run = resolve(flags={**shape, "micro_batch": 1, "precision": "bf16", "loss": "full"})
        totals = StepWork.of(run, ranks=1, grad_accum=1, kernel="flash", compiled=compiled).totals()
        self.kernels = totals.forward.kernels + totals.backward.kernels
        self.model, self.tokens = GPT(run.model), torch.zeros(1, 8, dtype=torch.long)
        if compiled:
            for block in self.model.blocks:
                block.compile()
        self.seconds()

    def seconds(self) -> float:
        """Processor seconds of a forward and a backward pass: the least of several, since other processes disturb."""
        taken = []
        for _ in range(STEPS):
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(self.tokens, self.tokens)
            loss.backward()
            taken.append(time.process_time() - start)
        return min(taken)


def main() -> None:
    """Measure both forms in turns, and print microseconds per kernel."""
    torch.set_num_threads(1)
    steps = {(layers, kind): _Steps(layers, compiled=kind == "compiled") for layers in (FEW, MANY) for kind in KINDS}
    best = {name: min(each.seconds() for _ in range(ROUNDS)) for name, each in steps.items()}
    per_kernel = {}
    for kind in KINDS:
        kernels = (steps[MANY, kind].kernels - steps[FEW, kind].kernels) / (MANY - FEW)
        seconds = (best[MANY, kind] - best[FEW, kind]) / (MANY - FEW)
        per_kernel[kind] = seconds / kernels
        print(
            f"{kind:<9} {seconds * 1e3:.2f} ms a block of {kernels:g} kernels: {per_kernel[kind] * 1e6:.0f} µs for each"
        )
    print(f"compiled / eager, for a kernel: {per_kernel['compiled'] / per_kernel['eager']:.2f}")


if __name__ == "__main__":
    main()
