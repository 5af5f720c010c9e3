"""``scalegpt sample``: continue prompts with a trained model, printing the text as it is sampled."""

import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from scalegpt.checkpoint.address import place_of
from scalegpt.cli.output import note
from scalegpt.cli.parser import Parser, add_json, add_settings, given_settings, path_argument
from scalegpt.cli.sample.printing import print_json, print_text
from scalegpt.cli.sample.prompts import check_flags, is_interactive, prompts_on_standard_input, read_prompts
from scalegpt.cli.sample.repl import converse
from scalegpt.config.inference import InferenceSettings
from scalegpt.config.sampling import SamplingSettings
from scalegpt.config.settings import setting
from scalegpt.errors import InputError

if TYPE_CHECKING:  # importing torch takes seconds; --help and a mistyped flag must not wait for it
    from scalegpt.inference.continuations import Continuation, Part
    from scalegpt.inference.loaded import LoadedModel

EXAMPLE = """\
scalegpt sample runs/tiny
scalegpt sample runs/tiny --prompt "Once upon a time"
echo "Once upon a time" | scalegpt sample runs/tiny
scalegpt sample runs/tiny --prompt_file start.txt --temperature 0.8 --top_k 50 --num_samples 3
scalegpt sample runs/tiny --prompts_file prompts.txt --checkpoint best --temperature 0 --json"""

SUMMARY = """\
Continue prompts with a trained model; the text appears as it is sampled. On a terminal and without a prompt, it asks for
prompts."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplingSettings, InferenceSettings):
    """The settings of ``scalegpt sample``: how to draw tokens, the number of samples, and how the model is loaded."""

    num_samples: int = setting(
        1,
        "continuations of each prompt. The first is drawn with the seed, the next with seed + 1, and so on; a seed "
        "gives "
        "the same text whatever else is drawn",
        minimum=1,
        maximum=10**6,
    )


class Sampling:
    """Draws the continuations that the arguments ask for, and counts their tokens and the time they take.

    Args:
        loaded: the model.
        settings: how to draw.
        stop: texts that end a continuation.
    """

    def __init__(self, loaded: "LoadedModel", settings: SampleSettings, stop: Sequence[str]) -> None:
        self.loaded, self.settings, self.stop = loaded, settings, stop
        self.tokens, self.seconds = 0, 0.0

    def parts(self, prompts: Sequence[str], drawn: int = 0) -> Iterator["Part"]:
        """Yield the parts of the prompts' continuations. The first seed is ``settings.seed`` + ``drawn``.

        Raises:
            InputError: a prompt has a character that the vocabulary lacks; raised before anything is drawn.
        """
        self._note_long(prompts)
        return self._draw(prompts, drawn)

    def _draw(self, prompts: Sequence[str], drawn: int) -> Iterator["Part"]:
        start = time.perf_counter()
        settings = replace(self.settings, seed=self.settings.seed + drawn)
        for part in self.loaded.stream(
            prompts, settings, num_samples=settings.num_samples, stop=self.stop, micro_batch=settings.micro_batch
        ):
            self.tokens += 0 if part.whole is None else part.whole.tokens
            yield part
        self.seconds += time.perf_counter() - start

    def _note_long(self, prompts: Sequence[str]) -> None:
        """Note which prompts are longer than the model's context."""
        block = self.loaded.model.config.block_size
        for number, ids in enumerate(self.loaded.all_prompt_ids(prompts), start=1):
            if len(ids) > block:
                which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
                note(f"scalegpt sample: {which} has {len(ids)} tokens; the model sees the last {block}")


def main(argv: Sequence[str]) -> int:
    """Print the samples that the arguments ask for."""
    arguments = _parser().parse(argv)
    settings = SampleSettings.from_mapping(given_settings(arguments, SampleSettings), "command line")
    check_flags(arguments)
    if "" in arguments.stop:
        raise InputError("stop must not be empty; omit it, or give the text at which to stop")
    asks = is_interactive(arguments)
    prompts = None if asks else read_prompts(arguments)

    from scalegpt.inference.load import load_model

    loaded = load_model(
        place_of(arguments.run), settings.device, precision=settings.precision, checkpoint=settings.checkpoint
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 must not end sampling
    sampling = Sampling(loaded, settings, arguments.stop)
    if asks:
        converse(lambda prompt, drawn: sampling.parts([prompt], drawn), settings.num_samples)
        return 0
    if prompts is None:  # read after loading, so that nobody types a prompt for a run that does not exist
        prompts = prompts_on_standard_input(arguments)
    repeated = [prompt for prompt in prompts for _ in range(settings.num_samples)]
    if arguments.json:
        facts = {"run": arguments.run, "step": loaded.header.progress.step}
        print_json(sampling.parts(prompts), lambda index, whole: {**facts, **_described(repeated[index], whole)})
    else:
        print_text(repeated, sampling.parts(prompts))
    note(f"scalegpt sample: {sampling.tokens} tokens, {sampling.tokens / max(sampling.seconds, 1e-9):.1f} tokens/s")
    return 0


def _described(prompt: str, whole: "Continuation") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "continuation": whole.text,
        "tokens": whole.tokens,
        "seed": whole.seed,
        "finish_reason": whole.finish_reason,
        "logprob": whole.logprob,
    }


def _parser() -> Parser:
    parser = Parser("sample", SUMMARY, EXAMPLE)
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="folder of a run, of a checkpoint, or of a Hugging Face model"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue; -: read it from standard input. By default the prompt is read from a pipe, or you "
        "are asked for it on a terminal. Otherwise a new text begins",
    )
    parser.add_argument(
        "--prompt_file", type=path_argument, metavar="FILE", help="UTF-8 file to continue instead; -: standard input"
    )
    parser.add_argument(
        "--prompts_file",
        type=path_argument,
        metavar="FILE",
        help='UTF-8 file of many prompts, one a line, or JSON Lines of {"prompt": TEXT}; -: standard input. Prompts with '
        "equal numbers of tokens are computed together; the output keeps the file's order",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts until an empty line or Ctrl-D; Ctrl-C stops a continuation. Each prompt uses the next "
        "seed",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a continuation before this text; may be given several times",
    )
    add_json(
        parser,
        "print a JSON object for each continuation, one a line: run, step, prompt, continuation, tokens, seed, "
        "finish_reason "
        "(end_of_text, stop or length), and logprob (the sum of its tokens' log probabilities at temperature 1)",
    )
    add_settings(parser, "sampling", SamplingSettings)
    add_settings(parser, "computing", SampleSettings, ("num_samples", *InferenceSettings.settings()))
    return parser
