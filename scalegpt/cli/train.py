"""``scalegpt train``, also run by ``launch/train.py`` and ``python -m scalegpt.train``: reads the flags, prepares, trains."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scalegpt.api import run_request
from scalegpt.cli.parser import Parser, add_run_settings, add_source, given_settings, path_argument
from scalegpt.config.run import DATA
from scalegpt.errors import InputError
from scalegpt.hardware.networks import read_network
from scalegpt.system.invocation import train_command
from scalegpt.system.ranks import read_ranks
from scalegpt.system.streams import outlast_standard_streams
from scalegpt.text import brief
from scalegpt.training.request import PROGRESS, Request
from scalegpt.training.resilience.stopping import LauncherWatch, StopRequest

MOST_DIGITS = 18
"""The most digits of the step number of ``--resume_step``."""


def examples() -> str:
    """A training command for each launcher (Python, torchrun, DeepSpeed), in the form that works with this installation."""
    return "\n".join(
        (
            f"{train_command()} --preset tiny --input_file my_text.txt",
            f"{train_command('torchrun', '--nproc_per_node', '8')} --preset 350M_1024 --input_file data/",
            f"{train_command('deepspeed')} --preset 500M_1024 --input_file data/",
        )
    )


def make_parser() -> Parser:
    """The parser of ``scalegpt train``: the flags of a run, and a flag for every setting of a preset."""
    parser = Parser("train", "Train a GPT. The same command resumes an unfinished run.", examples())
    run = parser.add_argument_group("run")
    add_source(run)
    run.add_argument("--model_name", metavar="NAME", help="the run's folder in --runs_dir [the preset's name]")
    run.add_argument("--runs_dir", type=path_argument, default="runs", metavar="DIR", help="folder of all runs [runs]")
    run.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto: CUDA if there is a CUDA device]"
    )
    run.add_argument("--fresh", action="store_true", help="start a new run, beside an earlier one of the same name")
    run.add_argument(
        "--trust_checkpoint", action="store_true", help="resume from a checkpoint that another run has written"
    )
    run.add_argument("--resume_step", metavar="N", help="resume from the checkpoint of step N; set later ones aside")
    run.add_argument(
        "--margin", metavar="X", help="share of a GPU's memory that stays free when the planner chooses settings [0.03]"
    )
    run.add_argument(
        "--progress",
        default="auto",
        choices=PROGRESS,
        help="auto: a live line on a terminal; plain: plain lines everywhere [auto]",
    )
    run.add_argument(
        "--allow_change",
        metavar="KEY[,KEY…]",
        help=f"settings that may differ when the run resumes; {DATA} allows other tokens, tokenizer tokens of another "
        "tokenizer",
    )
    run.add_argument(
        "--network",
        metavar="NETWORK",
        help="the network of each machine, as for `scalegpt plan`, for example 8xinfiniband-400g or 100Gb/s; a run on "
        "several machines is refused if it reaches less than a quarter of it",
    )
    run.add_argument("--allow_slow_network", action="store_true", help="train even if the network is that slow")
    # The deepspeed launcher adds this flag. Its value is not used: the launcher also sets the rank in the environment.
    run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_run_settings(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Train, and return the exit status: 0, or 128 plus the number of the signal that stopped the run."""
    stop = StopRequest()
    launcher = LauncherWatch(stop)  # made first, since it notes the present parents of this process as launchers
    arguments = make_parser().parse(argv)
    outlast_standard_streams()
    # Everything that needs no torch is checked before torch is imported.
    if arguments.network is not None:
        read_network(arguments.network)
    request = Request.of(
        preset=arguments.preset,
        config_file=arguments.config_file,
        name=arguments.model_name,
        settings=given_settings(arguments),
        runs_dir=Path(arguments.runs_dir),
        fresh=arguments.fresh,
        margin=arguments.margin,
        allow_change=(arguments.allow_change or "").split(","),
        trust_checkpoint=arguments.trust_checkpoint,
        resume_step=_resume_step(arguments.resume_step),
        progress=arguments.progress,
    )
    request = replace(request, network=arguments.network, allow_slow_network=arguments.allow_slow_network)
    ending = run_request(request, arguments.device, stop, launcher)
    if request.run.train.max_iters == 0 and read_ranks().rank == 0:
        print("no step was taken: max_iters is 0; give a larger --max_iters to train", flush=True)
    return ending.status


def _resume_step(text: str | None) -> int | None:
    """The value of ``--resume_step`` as a number; None if the flag is not given.

    Raises:
        InputError: the text is not a step number.
    """
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > MOST_DIGITS:
        raise InputError(f"resume_step: {brief(text, 40)} is not the step of a checkpoint; give a number such as 1000")
    return int(text)
