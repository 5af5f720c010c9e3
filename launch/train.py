"""Trains a GPT; ``python``, ``torchrun`` and ``deepspeed`` all start this script.

python launch/train.py --preset tiny --input_file my_text.txt
torchrun --nproc_per_node 8 launch/train.py --preset 350M_1024 --input_file data/
deepspeed launch/train.py --preset 500M_1024 --input_file data/
"""

import sys
from pathlib import Path

# Launchers run this file by its path. Python must find the repository's package even if it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scalegpt.cli.main import run_and_exit

if __name__ == "__main__":
    run_and_exit(["train", *sys.argv[1:]])
