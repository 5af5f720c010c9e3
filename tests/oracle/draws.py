"""Draws configurations of every kind and compares the arithmetic with a trace of the real step.

``python tests/oracle/draws.py 160`` prints the errors of 160 configurations, the worst last.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scalegpt.config.presets import resolve
from scalegpt.config.run import RunConfig
from scalegpt.planner.attention import attention_kernel, unfit
from scalegpt.planner.memory.predict import predict
from scalegpt.planner.memory.step import Prediction


@dataclass(frozen=True)
class Case:
    run: RunConfig
    ranks: int
    grad_accum: int
    label: str


LAYOUTS = (
    [("plain", 0, "none", 1)] * 4
    + [("fsdp", stage, "none", ranks) for stage in (0, 2, 3) for ranks in (8, 64)]
    + [("fsdp", 3, "all", ranks) for ranks in (1, 8)]
)
WIDTHS = (4, 20, 32, 40, 60, 64, 64, 80, 100, 128, 136, 264)
"""Of a head: multiples of 32, of 8, and neither; up to what flash does not take."""


def draw(number: int) -> Case:
    """The configuration of this number: the same every time."""
    pick = random.Random(number).choice
    heads = pick((1, 2, 4, 6, 12))
    backend, stage, offload, ranks = pick(LAYOUTS)
    flags: dict[str, Any] = {
        "n_layer": pick((1, 2, 3, 4, 6)), "n_head": heads, "n_embd": heads * pick(WIDTHS),
        "block_size": pick((64, 100, 256, 512, 1024)), "vocab_size": pick((257, 5000, 50304)),
        "tie_head": pick((True, False)), "dropout": pick((0.0, 0.0, 0.1, 0.125)), "micro_batch": pick((1, 2, 4, 8)),
        "precision": pick(("bf16", "bf16", "fp32", "fp16")), "residual_dtype": pick(("compute", "compute", "fp32")),
        "recompute": pick(("none", "selective", "full")), "loss": pick(("full", "chunked")),
        "loss_chunk": pick((64, 1024)), "fused": pick((True, False)), "backend": backend, "zero_stage": stage,
        "offload": offload, "attention": pick(("auto", "flash", "mem_efficient", "cudnn", "math")),
    }  # fmt: skip
    grad_accum = pick((1, 2))
    flags["activation"] = pick(("gelu", "gelu_tanh", "relu2", "swiglu", "geglu"))
    flags["parallel_block"] = pick((False, False, True))
    flags["logit_softcap"] = pick((None, None, 15.0))
    flags["norm"] = pick(("layernorm", "rmsnorm"))
    flags["n_inner"] = pick((None, None, 96, 1000))
    flags["bias"] = pick((False, True, "qkv"))
    flags["optimizer"] = pick(("adamw", "adamw", "muon", "lion")) if offload == "none" else "adamw"
    flags["n_kv_head"] = pick([n for n in range(1, heads + 1) if heads % n == 0])
    flags["head_size"] = pick((None, None, None, 64, 32, 100))
    flags["position"] = pick(("learned", "rope", "rope", "none"))
    flags["rotary_share"] = pick((1.0, 1.0, 0.5))
    flags["qk_norm"] = pick((False, True))
    if flags["attention"] not in ("flash", "cudnn"):
        flags["packing"] = pick(("contiguous", "documents"))
    if stage > 1 and ranks > 1:
        flags["shard_size"] = pick((None, 2, ranks // 2))
    if unfit(flags["attention"], resolve(flags=flags)):
        flags["attention"] = "auto"
    label = " ".join(f"{key}={value}" for key, value in flags.items()) + f" ranks={ranks} accum={grad_accum}"
    return Case(resolve(flags=flags), ranks, grad_accum, label)


def compare(case: Case) -> tuple[float, Prediction, Any]:
    """The arithmetic's error against the trace, as a share of the traced peak."""
    from scalegpt.tracing.trace import trace_step

    planned = predict(case.run, ranks=case.ranks, grad_accum=case.grad_accum)
    traced = trace_step(case.run, ranks=case.ranks, grad_accum=case.grad_accum)
    return planned.peak_bytes / traced.peak_bytes - 1, planned, traced


def main(count: int) -> None:
    results = []
    for number in range(count):
        case = draw(number)
        error, planned, traced = compare(case)
        results.append((abs(error), number, error, planned.phase, traced.peak_phase, case.label))
    for _, number, error, planned_phase, traced_phase, label in sorted(results):
        kernel = attention_kernel(draw(number).run)
        print(f"{error:+8.3%}  #{number:<4} {planned_phase}/{traced_phase} {kernel}  {label}")
    errors = sorted(result[0] for result in results)
    print(f"{count} configurations: median {errors[count // 2]:.3%}, largest {errors[-1]:.3%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 160)
