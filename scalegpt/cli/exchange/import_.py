"""``scalegpt import``: make a run from a model that was trained elsewhere."""

from collections.abc import Sequence
from pathlib import Path

from scalegpt.cli.output import show, show_json
from scalegpt.cli.parser import Parser, add_json, add_settings, given_settings, path_argument
from scalegpt.config import DataConfig, ModelConfig
from scalegpt.planner.source import LONGEST_BLOCK

EXAMPLE = """\
scalegpt import models/SmolLM2-135M --model_name smol
scalegpt sample runs/smol --prompt "Once upon a time"
scalegpt train --model_name smol --input_file my_text.txt --block_size 1024"""

SUMMARY = """\
Make a run from a Hugging Face folder, a run or a checkpoint, without training.

sample, eval, export and train use it like any other run. Its checkpoint of step 0 has the weights in fp32. Nothing is
downloaded, and no code in the folder is run."""

SETTINGS = ("tokenizer", "end_of_text")
"""The data settings that name a tokenizer."""

THEIRS = "FOLDER's"

ROWS = ("block_size", "vocab_size")
"""The model settings that may differ from the folder's."""


def main(argv: Sequence[str]) -> int:
    """Import the model that the arguments name."""
    arguments = _parser().parse(argv)
    settings = given_settings(arguments, ModelConfig, DataConfig)

    from scalegpt.training.setup.importing import import_model

    run = import_model(Path(arguments.folder), arguments.model_name, Path(arguments.runs_dir), settings)
    if arguments.json:
        show_json({"run": str(run), "imported_from": arguments.folder})
    else:
        show(f"{run}: the model of {arguments.folder}, not trained further; train it with --model_name {run.name}")
    return 0


def _parser() -> Parser:
    parser = Parser("import", SUMMARY, EXAMPLE)
    parser.add_argument(
        "folder",
        type=path_argument,
        metavar="FOLDER",
        help="folder of a Hugging Face model, of a run, or of a checkpoint",
    )
    parser.add_argument("--model_name", required=True, metavar="NAME", help="the run's folder in --runs_dir")
    parser.add_argument(
        "--runs_dir", type=path_argument, default="runs", metavar="DIR", help="folder of all runs [runs]"
    )
    add_json(parser)
    add_settings(parser, "tokenizer", DataConfig, SETTINGS, dict.fromkeys(SETTINGS, THEIRS))
    longest = f"{THEIRS}, at most {LONGEST_BLOCK}"
    add_settings(parser, "model", ModelConfig, ROWS, {**dict.fromkeys(ROWS, THEIRS), "block_size": longest})
    return parser
