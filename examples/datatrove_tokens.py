"""Tokenise JSON Lines with datatrove, in several processes or on a cluster, and train on its files as they are.

pip install datatrove
python examples/datatrove_tokens.py JSONL_FOLDER my_tokenizer/tokenizer.json tokens [PROCESSES]
scalegpt train --preset small --input_file tokens

Each line is an object with a "text". Each process takes whole files; there are 2 unless PROCESSES says otherwise. On a
cluster, give the same steps to datatrove's SlurmPipelineExecutor. END_OF_TEXT is put after each document, in place of what
the tokenizer's post-processor adds.
"""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

END_OF_TEXT = "<|endoftext|>"


def main(documents: str, tokenizer: str, out: str, tasks: str = "2") -> None:
    """Make one file of shuffled documents for each task; a second call finds finished tasks in ``out``/logs."""
    path = str(Path(tokenizer).absolute())  # its name is kept beside the tokens
    steps = [JsonlReader(documents), DocumentTokenizer(out, path, eos_token=END_OF_TEXT, seed=1)]
    LocalPipelineExecutor(steps, tasks=int(tasks), workers=-1, logging_dir=f"{out}/logs").run()


if __name__ == "__main__":
    if len(sys.argv) not in {4, 5}:
        sys.exit(__doc__)
    main(*sys.argv[1:])
