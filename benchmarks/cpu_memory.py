"""Compares the predicted memory of a training process on the CPU with the peak that the kernel counts for it (VmHWM).

python benchmarks/cpu_memory.py                               (from the repository's root; some minutes, at most 3 GB)
python benchmarks/cpu_memory.py --only fsdp --json memory.json

Each row is a short run of the trainer in its own processes, which writes checkpoints while it trains. With several
ranks, the memory of the first rank counts. --limit_gb limits the data segment of each process.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least, flag_words, new_file, python_words, write_figures
from scalegpt.cli.output import aligned
from scalegpt.units import gib

ROOT = Path(__file__).resolve().parents[1]

COMMON = "--tokenizer byte --max_iters 5 --checkpoint_every 2 --eval_every 3 --eval_tokens 2048 --sample_tokens 4"
NARROW = "--n_layer 8 --n_embd 512 --n_head 8 --block_size 256"
WIDE = "--n_layer 6 --n_embd 768 --n_head 8 --block_size 128"
DEEP = "--n_layer 10 --n_embd 768 --n_head 8 --block_size 512"
VOCABULARY = "--n_layer 4 --n_embd 384 --n_head 6 --block_size 256 --vocab_size 50304"

PLAIN = {
    "narrow": f"{NARROW} --micro_batch 4 --tokens_per_step 2048",
    "narrow, large batch": f"{NARROW} --micro_batch 16",
    "deep": f"{DEEP} --micro_batch 2",
    "deep, recompute full": f"{DEEP} --micro_batch 4 --recompute full",
    "deep, recompute selective": f"{DEEP} --micro_batch 4 --recompute selective",
    "wide": f"{WIDE} --micro_batch 8",
    "wide, small batch": f"{WIDE} --micro_batch 4",
    "wide, recompute full": f"{WIDE} --micro_batch 8 --recompute full",
    "wide, recompute selective": f"{WIDE} --micro_batch 8 --recompute selective",
    "vocabulary": f"{VOCABULARY} --micro_batch 4",
    "vocabulary, full loss": f"{VOCABULARY} --micro_batch 4 --loss full",
}
SHARDED = f"{WIDE} --micro_batch 4 --tokens_per_step 2048"


def cases() -> dict[str, tuple[str, str]]:
    """Name of a row → its backend and its flags."""
    found = {}
    for precision in ("fp32", "bf16"):
        for name, flags in PLAIN.items():
            found[f"plain, {name}, {precision}"] = "plain", f"{flags} --precision {precision}"
        for backend, stages in {"fsdp": (0, 2, 3), "deepspeed": (0, 1, 2, 3)}.items():
            for stage in stages:
                flags = f"{SHARDED} --zero_stage {stage} --precision {precision}"
                found[f"{backend} {stage}, 2 ranks, {precision}"] = backend, flags
    broad = "--n_layer 3 --n_embd 1024 --n_head 8 --block_size 128 --micro_batch 8 --zero_stage 3 --precision bf16"
    return {**found, "fsdp 3, broad, 2 ranks, bf16": ("fsdp", broad)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows that were asked for, print the errors of the predictions, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name has these words")
    parser.add_argument(
        "--limit_gb", type=at_least(1), default=4, help="largest data segment of each process, in GB [4]"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(argv)
    figures, failed = [], False
    for name, (backend, flags) in cases().items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measured(Path(folder), backend, flags, arguments.limit_gb * 10**9)
        failed |= found is None
        if found is not None:
            figures.append({"name": name, **found})
            print(f"{name}: prediction {found['predicted'] / found['measured'] - 1:+.1%}", flush=True)
    print(table(figures))
    write_figures(arguments.json, figures)
    return 1 if failed or not figures else 0


def measured(folder: Path, backend: str, flags: str, limit: int) -> dict[str, Any] | None:
    """Predicted and measured bytes of a short run, and the parts of the prediction; None if the run failed."""
    text = folder / "text.txt"
    draw = random.Random(1)
    text.write_text("".join(draw.choice("abcdefgh \n") for _ in range(200_000)), encoding="ascii")
    settings = {"backend": backend, "device": "cpu", "model_name": "run", "input_file": text, "runs_dir": folder}
    command = [*python_words(1 if backend == "plain" else 2), str(ROOT / "launch" / "train.py"), *flag_words(settings)]
    environment = {
        **os.environ,
        "SCALEGPT_CACHE": str(folder / "cache"),
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*command, *flags.split(), *COMMON.split()], env=environment, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )  # fmt: skip
    if done.returncode:
        print(f"{flags}: {(done.stderr or done.stdout)[-500:]}", file=sys.stderr)
        return None
    plan = json.loads((folder / "run" / "plan.json").read_text(encoding="utf-8"))["memory"]
    status = json.loads((folder / "run" / "run_status.json").read_text(encoding="utf-8"))
    return {
        "predicted": plan["total_bytes"],
        "measured": status["measured_peak_bytes"],
        "peak": plan["peak_bytes"],
        **plan["overheads"],
    }


def table(figures: list[dict[str, Any]]) -> str:
    """The results of all rows as text."""
    rows = [("run", "step's peak", "predicted", "measured", "error")]
    rows += [
        (
            each["name"], gib(each["peak"]), gib(each["predicted"]), gib(each["measured"]),
            f"{each['predicted'] / each['measured'] - 1:+.1%}",
        )
        for each in figures
    ]  # fmt: skip
    return aligned(rows, right={1, 2, 3, 4})


if __name__ == "__main__":
    sys.exit(main())
