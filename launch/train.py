"""Trains a GPT; the same under ``python``, ``torchrun`` and ``deepspeed``.

python launch/train.py --preset tiny --input_file my_text.txt
torchrun --nproc_per_node 8 launch/train.py --preset 350M_1024 --input_file data/
deepspeed launch/train.py --preset 500M_1024 --input_file data/
"""

import sys
from pathlib import Path

# Launchers run this file by path: the repository's package must be found without an installed one.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scalegpt.cli.main import run_and_exit

if __name__ == "__main__":
    run_and_exit(["train", *sys.argv[1:]])
