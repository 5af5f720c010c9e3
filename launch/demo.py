"""``make demo``: trains a small model on the Python library's own sources, with all GPUs of this machine or its CPU."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "def main("


def library_sources() -> list[str]:
    """The top-level modules of Python's standard library: a corpus that every machine has, about 4 MB."""
    return [str(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


def run(*words: str) -> None:
    """Show a command and run it; end with its status if it fails."""
    shown = " ".join(word if len(word) < 60 else "…" for word in words[:12])
    print(f"\n$ {shown}{' …' if len(words) > 12 else ''}", flush=True)
    status = subprocess.run(words, cwd=ROOT).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """Count, prepare, train, sample."""
    scalegpt = (sys.executable, "-m", "scalegpt")
    tokens = ROOT / "runs" / "demo-data"
    run(*scalegpt, "params", "--preset", "demo")
    run(*scalegpt, "data", "prepare", "--tokenizer", "byte", "--out", str(tokens), *library_sources())
    gpus = torch.cuda.device_count()
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        if gpus > 1
        else [sys.executable]
    )
    run(*launcher, "launch/train.py", "--preset", "demo", "--input_file", str(tokens), "--fresh")
    newest = max((ROOT / "runs").glob("demo*/run_status.json"), key=lambda path: path.stat().st_mtime).parent
    run(*scalegpt, "sample", str(newest), "--prompt", PROMPT, "--max_new_tokens", "200")
    print(
        f"\nThe run's files are in {newest}/: open report.html, or go on with\n"
        f"  .venv/bin/scalegpt sample {newest.relative_to(ROOT)} --prompt 'import '"
    )


if __name__ == "__main__":
    main()
