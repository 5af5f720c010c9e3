"""``make demo``: trains a small model on the sources of Python's standard library, on all GPUs here or on the CPU."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT = ("--max_minutes", "3")
"""Flags that end the training after three minutes, even on a slow machine."""


def library_sources() -> list[str]:
    """The paths of the top-level modules of Python's standard library, about 4 MB of text that every machine has."""
    return [str(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


def run(*words: str) -> None:
    """Print a command and run it; if it fails, end this process with its exit status."""
    shown = " ".join(word if len(word) < 60 else "…" for word in words[:12])
    print(f"\n$ {shown}{' …' if len(words) > 12 else ''}", flush=True)
    status = subprocess.run(words, cwd=ROOT).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Count the parameters of the model, plan, prepare tokens, train, and print how to sample."""
    scalegpt = (sys.executable, "-m", "scalegpt")
    tokens = ROOT / "runs" / "demo-data"
    run(*scalegpt, "params", "--preset", "demo")
    machine = [] if torch.cuda.is_available() else ["--gpu", "cpu"]
    run(*scalegpt, "plan", "--preset", "demo", *machine, *layout())
    run(*scalegpt, "data", "prepare", "--tokenizer", "byte", "--out", str(tokens), *library_sources())
    run(*launcher(), "launch/train.py", "--preset", "demo", "--input_file", str(tokens), *LIMIT, "--fresh", *layout())
    newest = max((ROOT / "runs").glob("demo*/run_status.json"), key=lambda path: path.stat().st_mtime).parent
    print(
        f"\nThe run's files are in {newest}/: open report.html in a browser, or let the model write more with\n"
        f"  .venv/bin/scalegpt sample {newest.relative_to(ROOT)} --prompt 'import '"
    )


def launcher() -> list[str]:
    """The beginning of the training command: Python for a CPU or one GPU, torchrun for several GPUs."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]


def layout() -> list[str]:
    """The flags of the layout.

    Several GPUs use FSDP2 without sharding, since the model is small; otherwise there are none.
    """
    return ["--backend", "fsdp", "--zero_stage", "0"] if torch.cuda.device_count() > 1 else []


if __name__ == "__main__":
    main()
