"""``scalegpt train``, also run by ``launch/train.py`` and ``python -m scalegpt.train``: reads the flags, prepares, trains."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scalegpt.api import run_request
from scalegpt.cli.parser import Parser, add_settings, given_settings, path_argument
from scalegpt.config.run import DATA, SECTIONS, DataConfig, ParallelConfig
from scalegpt.config.shape import ModelConfig
from scalegpt.config.train import TrainConfig
from scalegpt.errors import InputError
from scalegpt.system.invocation import train_command
from scalegpt.system.ranks import read_ranks
from scalegpt.system.streams import outlast_standard_streams
from scalegpt.text import brief
from scalegpt.training.request import Request
from scalegpt.training.resilience.stopping import LauncherWatch, StopRequest

MOST_DIGITS = 18
"""Of a step that is given: what has more is none."""


def examples() -> str:
    """One command for each launcher, as they run in this installation."""
    return "\n".join(
        (
            f"{train_command()} --preset tiny --input_file my_text.txt",
            f"{train_command('torchrun', '--nproc_per_node', '8')} --preset 350M_1024 --input_file data/",
            f"{train_command('deepspeed')} --preset 500M_1024 --input_file data/",
        )
    )


def make_parser() -> Parser:
    """The trainer's flags: the run's own, and every setting of a preset."""
    parser = Parser("train", "Train a GPT. The same command resumes an unfinished run.", examples())
    run = parser.add_argument_group("run")
    run.add_argument("--preset", help="a named configuration, see `scalegpt presets`")
    run.add_argument(
        "--config_file", type=path_argument, metavar="FILE", help="a JSON or YAML file of the same form as a preset"
    )
    run.add_argument("--model_name", metavar="NAME", help="the run's folder in --runs_dir [the preset's name]")
    run.add_argument("--runs_dir", type=path_argument, default="runs", metavar="DIR", help="folder of all runs [runs]")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto: CUDA if there is any]")
    run.add_argument("--fresh", action="store_true", help="start anew, beside an earlier run of the same name")
    run.add_argument(
        "--trust_checkpoint", action="store_true", help="go on from a checkpoint that this run did not write itself"
    )
    run.add_argument(
        "--resume_step", metavar="N", help="go back: resume from the checkpoint of step N, and set later ones aside"
    )
    run.add_argument(
        "--margin", metavar="X", help="share of a GPU's memory that a chosen micro batch leaves free [0.03]"
    )
    run.add_argument(
        "--allow_change",
        metavar="KEY[,KEY…]",
        help=f"settings that the run may have otherwise when it goes on; {DATA} and tokenizer: the tokens too",
    )
    # The deepspeed launcher adds this flag; the ranks are read from the environment, which it sets too.
    run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_settings(parser, "data", DataConfig)
    add_settings(parser, "parallel layout", ParallelConfig)
    add_settings(parser, "training", TrainConfig)
    add_settings(parser, "model", ModelConfig)
    return parser


def main(argv: Sequence[str]) -> int:
    """Train to the end and return 0, or 128 and the number of the signal that stopped it."""
    stop = StopRequest()
    launcher = LauncherWatch(stop)  # first of all: a launcher that has ended by now leaves no other trace
    arguments = make_parser().parse(argv)
    outlast_standard_streams()
    # Everything that needs no torch is checked before torch is imported.
    request = Request.of(
        preset=arguments.preset,
        config_file=arguments.config_file,
        name=arguments.model_name,
        settings=given_settings(arguments, *SECTIONS.values()),
        runs_dir=Path(arguments.runs_dir),
        fresh=arguments.fresh,
        margin=arguments.margin,
        allow_change=(arguments.allow_change or "").split(","),
        trust_checkpoint=arguments.trust_checkpoint,
        resume_step=_resume_step(arguments.resume_step),
    )
    ending = run_request(request, arguments.device, stop, launcher)
    if request.run.train.max_iters == 0 and read_ranks().rank == 0:
        print("no step was taken: max_iters is 0; give a larger --max_iters to train", flush=True)
    return ending.status


def _resume_step(text: str | None) -> int | None:
    """The step of ``--resume_step``.

    Raises:
        InputError: it is no step.
    """
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > MOST_DIGITS:
        raise InputError(f"resume_step: {brief(text, 40)} is not the step of a checkpoint; give a number such as 1000")
    return int(text)
