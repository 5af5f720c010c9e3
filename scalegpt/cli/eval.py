"""``scalegpt eval``: how well a trained model predicts a text: loss, perplexity, bits per byte."""

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scalegpt.checkpoint.address import place_of
from scalegpt.cli.output import ProgressLine, show_json, show_row
from scalegpt.cli.parser import Parser, add_json, add_settings, given_settings, path_argument
from scalegpt.config import DataConfig
from scalegpt.config.inference import EvaluationSettings
from scalegpt.config.run import READING
from scalegpt.inputs import as_text

if TYPE_CHECKING:  # importing torch takes seconds; --help and a mistyped flag must not wait for it
    from scalegpt.inference.evaluation import Evaluation
    from scalegpt.inference.loaded import LoadedModel

EXAMPLE = """\
scalegpt eval runs/tiny
scalegpt eval runs/tiny --input_file book.txt
scalegpt eval runs/tiny --input_file docs/ --stride 256 --checkpoint best --json"""

SUMMARY = """\
Score how well a trained model predicts a text: loss, perplexity, bits per byte.

Every token is scored once. Each document of a text is scored on its own; a split is scored as one stream, as in training.
Without --input_file and --split, the val split of the run's own data is scored."""


def main(argv: Sequence[str]) -> int:
    """Evaluate the model on the text that the arguments name."""
    arguments = _parser().parse(argv)
    settings = EvaluationSettings.from_mapping(given_settings(arguments, EvaluationSettings), "command line")
    reading = DataConfig.from_mapping(given_settings(arguments, DataConfig), "command line")

    given = as_text(arguments.input_file)
    from scalegpt.inference.load import load_model

    loaded = load_model(
        place_of(arguments.run), settings.device, precision=settings.precision, checkpoint=settings.checkpoint
    )
    progress = _ProgressLine() if sys.stderr.isatty() else None
    start = time.perf_counter()
    try:
        result = loaded.evaluate(
            given, split=arguments.split, stride=settings.stride, micro_batch=settings.micro_batch,
            progress=progress, **{key: getattr(reading, key) for key in READING},
        )  # fmt: skip
    finally:
        if progress is not None:
            progress.clear()
    seconds = time.perf_counter() - start
    facts = _facts(arguments.run, given, settings, loaded, result)
    if arguments.json:
        show_json({**facts, "seconds": seconds, "tokens_per_second": result.tokens / seconds})
    else:
        _print(facts, result.tokens / seconds)
    return 0


def _parser() -> Parser:
    parser = Parser("eval", SUMMARY, EXAMPLE)
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="folder of a run, of a checkpoint, or of a Hugging Face model"
    )
    parser.add_argument(
        "--input_file",
        metavar="FILE",
        help="text or code, a folder of it, or a folder made by `scalegpt data prepare`; several, with commas, are one text, "
        "or with weights (a=0.7,b=0.3) a mixture",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        help="score this part of the run's data, or of a folder of prepared tokens [val]",
    )
    add_json(parser)
    add_settings(parser, "evaluation", EvaluationSettings)
    add_settings(parser, "text", DataConfig, READING)
    return parser


def _facts(
    run: str, given: str | None, settings: EvaluationSettings, loaded: "LoadedModel", result: "Evaluation"
) -> dict[str, Any]:
    block = loaded.model.config.block_size
    return {
        "run": run,
        "step": loaded.header.progress.step,
        "input_file": given,
        "split": result.split,
        "loss": result.loss,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "documents": result.documents,
        "block_size": block,
        "stride": settings.stride or block,
        "sources": [
            {
                "name": source.name,
                "weight": source.weight,
                **{key: getattr(source, key) for key in ("loss", "bits_per_byte", "tokens", "bytes")},
            }
            for source in result.sources
        ],
    }


def _print(facts: dict[str, Any], tokens_per_second: float) -> None:
    documents = "" if facts["documents"] is None else f"{facts['documents']:,}"
    split = "" if facts["split"] is None else f"{facts['split']} split of "
    perplexity = "more than 1e308" if facts["perplexity"] is None else f"{facts['perplexity']:,.3f}"
    rows = {
        "model": facts["run"] + (f", step {facts['step']:,}" if facts["step"] else ""),
        "text": f"{split}{facts['input_file'] or 'the data that the run was trained on'}",
        "loss": f"{facts['loss']:.4f} nats per token",
        "perplexity": f"{perplexity} per token",
        "bits per byte": f"{facts['bits_per_byte']:.4f}",
        "tokens": f"{facts['tokens']:,} scored, {tokens_per_second:,.0f} tokens/s",
        "windows": f"of {facts['block_size']:,} tokens, beginning every {facts['stride']:,} tokens",
        "bytes": f"{facts['bytes']:,} of UTF-8",
        "documents": documents,
    }
    for name, value in rows.items():
        if value:
            show_row(f"{name:<15}", value)
    for source in facts["sources"]:
        show_row(
            f"{'source':<15}",
            f"{source['name']}, weight {source['weight']:.4g}: {source['loss']:.4f} nats per token, "
            f"{source['bits_per_byte']:.4f} bits per byte, {source['tokens']:,} scored",
        )


class _ProgressLine(ProgressLine):
    """Shows how much of the text has been scored. Call it with the share that has been read, and the tokens scored."""

    def __call__(self, share: float, tokens: int) -> None:
        if (seconds := self.due(is_last=share >= 1)) is not None:
            self.show(f"scoring {share:4.0%}  {tokens:,} tokens  {tokens / seconds:,.0f} tokens/s")
