"""``python -m scalegpt.train``: trains as ``launch/train.py`` does, and needs only the installed package.

This module is only to be run. In Python code, ``scalegpt.train`` is the function of :mod:`scalegpt.api`.

python -m scalegpt.train --preset tiny --input_file my_text.txt
torchrun --nproc_per_node 8 -m scalegpt.train --preset 350M_1024 --input_file data/
deepspeed --module scalegpt.train --preset 500M_1024 --input_file data/
"""

import sys

from scalegpt.cli.main import run_and_exit

if __name__ == "__main__":
    run_and_exit(["train", *sys.argv[1:]])
else:  # an import would put this module in the place of the function
    raise ImportError("scalegpt.train is a function: call scalegpt.train(...), or run python -m scalegpt.train")
