"""``scalegpt params``: count a model's parameters part by part, and the memory they take."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from scalegpt.architecture.counting import (
    ParameterCount,
    closed_form,
    count_parameters,
    formula_steps,
    sizes_of,
    weight_bytes,
)
from scalegpt.architecture.parameters import SYMBOLS
from scalegpt.cli.output import aligned, note, show, show_json
from scalegpt.cli.parser import Parser, add_json, add_settings, add_source, given_settings
from scalegpt.config import ModelConfig
from scalegpt.config.presets import preset_names, resolve
from scalegpt.config.shape import heads_near
from scalegpt.errors import InputError
from scalegpt.interop.families import as_config, families_of
from scalegpt.planner.memory.states import training_bytes
from scalegpt.planner.source import source_of
from scalegpt.units import BYTES, format_bytes

EXAMPLE = """\
scalegpt params --preset 150M_1024
scalegpt params --hf models/Llama-3.2-1B
scalegpt params --n_layer 12 --n_embd 768 --n_head 12 --block_size 1024 --vocab_size 50257 --bias --show_formula
scalegpt params --interactive"""

QUESTIONS = {
    "n_layer": "layers: the number of transformer blocks",
    "n_embd": "width of the residual stream: how many numbers describe a token between two blocks",
    "n_head": "attention heads; must divide the width; heads of 64 are usual",
    "block_size": "block: the tokens that the model sees at once",
    "vocab_size": "vocabulary: the number of different tokens; 50304 for GPT-2's tokens (padded), 257 for bytes",
    "bias": "biases in linear layers and norms, as GPT-2 has them",
    "tie_head": "tied: the head shares the token embedding's matrix",
}
"""Setting of the shape → the question that ``--interactive`` asks for it, in order."""


def main(argv: Sequence[str]) -> int:
    """Print the parameter counts and the memory of the model that the arguments or the dialogue describe."""
    arguments = _parser().parse(argv)
    flags = given_settings(arguments, ModelConfig)
    try:
        name, model = _chosen_model(arguments, flags)
    except EOFError:
        note("\nscalegpt params: the input ended before the last answer; nothing was counted")
        return 0
    if arguments.json:
        show_json(report(name, model, with_formula=arguments.show_formula))
        return 0
    sections = [_title(name, model), _parts_table(model, count_parameters(model)), _memory_table(model), _family(model)]
    if arguments.show_formula:
        sections.insert(1, _formula(model))
    show("\n\n".join(sections))
    return 0


def _parser() -> Parser:
    parser = Parser("params", "Count a model's parameters, part by part, and the memory they take.", EXAMPLE)
    add_source(parser, hf=True)
    parser.add_argument("--interactive", action="store_true", help="ask for the shape step by step")
    parser.add_argument("--show_formula", action="store_true", help="show the formula, with the numbers filled in")
    add_json(parser)
    add_settings(parser, "shape", ModelConfig)
    parser.add_argument(
        "--untied",
        "--no_tie_head",
        dest="tie_head",
        action="store_const",
        const="off",
        default=argparse.SUPPRESS,
        help="the same as --tie_head false",
    )
    return parser


def _chosen_model(arguments: argparse.Namespace, flags: dict[str, Any]) -> tuple[str, ModelConfig]:
    """The name and the shape of the model to count."""
    preset, config_file, hf = arguments.preset, arguments.config_file, arguments.hf
    if arguments.interactive and preset is config_file is hf is None:
        preset = _ask_for_preset()
    source = source_of(preset=preset, config_file=config_file, hf=hf, flags=flags)
    for remark in source.remarks:
        note(f"scalegpt params: {remark}")
    run = source.resolved(flags, "command line")
    model = _ask_for_model(run.model) if arguments.interactive else run.model
    return (run.name if model == source.run.model or not source.words else f"{run.name} (changed)"), model


# The dialogue is written to standard error, so that standard output has only the counts.


def _ask_for_preset() -> str | None:
    note(f"Presets: {', '.join(preset_names())}")
    answer = _ask("name of a preset to start from, or none", "none", _existing_preset)
    return None if answer == "none" else answer


def _existing_preset(answer: str) -> str:
    if answer != "none":
        resolve(preset=answer)  # raises InputError, which names the nearest preset, if there is no such preset
    return answer


def _ask_for_model(default: ModelConfig) -> ModelConfig:
    """Ask for each setting of the shape; Enter keeps the default.

    Raises:
        EOFError: standard input ended before the last answer.
    """
    note("Enter keeps the value in brackets; Ctrl-D ends.")
    answers: dict[str, Any] = {}
    for key, question in QUESTIONS.items():
        proposal = getattr(default, key)
        if key == "n_head" and answers["n_embd"] % proposal:
            proposal = heads_near(answers["n_embd"], answers["n_embd"] // 64)
        if isinstance(proposal, bool):
            proposal = "yes" if proposal else "no"
        answers[key] = _ask(f"{key}, {question}", str(proposal), _checked(key, answers))
    note("")
    return default.changed(**answers)


def _checked(key: str, answers: dict[str, Any]) -> Callable[[str], Any]:
    """A function from an answer to the value of setting ``key``; it raises :class:`InputError` for a bad answer."""
    # Until the dialogue has asked for n_head it is 1, which divides every width.
    values = {"n_head": 1, **answers}

    def accept(answer: str) -> Any:
        model = ModelConfig.from_mapping({**values, key: answer}, "answer")
        count_parameters(model)  # refuses vocab_size auto, since there is no tokenizer to decide it
        return getattr(model, key)

    return accept


def _ask(question: str, default: str, accept: Callable[[str], Any]) -> Any:
    """Ask until ``accept`` converts an answer without an error; return the value. An empty answer means the default.

    Raises:
        EOFError: standard input ended.
    """
    while True:
        print(f"{question} [{default}]: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        try:
            return accept(line.strip() or default)
        except InputError as error:
            note(f"  {error}; try again")


# The functions below make the output.


def report(name: str, model: ModelConfig, *, with_formula: bool = False) -> dict[str, Any]:
    """The values that ``--json`` prints: parameter counts, shares of the total from 0 to 1, sizes in bytes.

    The numbers in ``breakdown`` add up to ``parameters``, without its object ``per_layer``, which has the counts of one
    layer.
    """
    count = count_parameters(model)
    parameters, states = count.total, training_bytes(model)
    layer = {**dataclasses.asdict(count.layer), "total": count.layer.total}
    values: dict[str, Any] = {
        "name": name,
        "parameters": parameters,
        "model": dataclasses.asdict(model),
        "breakdown": {**count.parts(), "per_layer": layer},
        "shares": {**_shares(count, count.parts()), "per_layer": _shares(count, layer)},
        "head_is_shared": count.head_is_shared,
        "weight_bytes": weight_bytes(parameters),
        "training_bytes": {**states, "total": sum(states.values())},
        "hugging_face_families": list(families_of(model)),
    }
    if with_formula:
        steps = [dataclasses.asdict(step) | {"part": step.part.strip()} for step in formula_steps(model)]
        values["formula"] = {"closed_form": closed_form(model), "sizes": sizes_of(model), "steps": steps}
    return values


def _shares(count: ParameterCount, parts: dict[str, int]) -> dict[str, float]:
    return {part: count.share(value) for part, value in parts.items()}


def _title(name: str, model: ModelConfig) -> str:
    head = "tied" if model.tie_head else "untied"
    biases = {True: "biases", False: "no biases", "qkv": "biases of QKV"}[model.bias]
    usual = ModelConfig()
    unusual = [f", {value}" for key in ("norm", "activation") if (value := getattr(model, key)) != getattr(usual, key)]
    return (
        f"{name}: {model.n_layer} layers, width {model.n_embd}, {model.heads_in_words(f' of {model.head_width}')}, "
        f"block {model.block_size}, vocabulary {model.vocab_size}, {biases}, {head} head{''.join(unusual)}"
    )


def _parts_table(model: ModelConfig, count: ParameterCount) -> str:
    layer, width = count.layer, model.n_embd
    inner = f"2 times {model.inner_width}" if model.is_gated else model.inner_width
    positions = ("position embedding", f"{model.block_size} by {width}", count.position_embedding)
    head = "shared with the token embedding" if count.head_is_shared else f"{model.vocab_size} by {width}"
    parts = [
        ("token embedding", f"{model.vocab_size} by {width}", count.token_embedding),
        *([positions] if count.position_embedding else []),
        ("one layer", "", layer.total),
        ("  attention", "queries, keys, values; projection", layer.attention),
        ("  feed-forward", f"{width} to {inner} and back", layer.feed_forward),
        ("  norms", "two", layer.norms),
        ("all layers", f"{count.n_layer} times one layer", count.all_layers),
        ("final norm", "", count.final_norm),
        ("head", head, count.head),
        ("total", "", count.total),
    ]
    rows = [(part, what, f"{value:,}", _percent(count.share(value))) for part, what, value in parts]
    return aligned([("part", "what it is", "parameters", "share"), *rows], right={2, 3})


def _percent(share: float) -> str:
    """A share as a percentage with two decimals; a positive share that would round to zero is written ``<0.01%``."""
    return "<0.01%" if 0 < share < 5e-5 else f"{share:.2%}"


def _memory_table(model: ModelConfig) -> str:
    parameters = count_parameters(model).total
    rows = [("memory", "bytes each", "size")]
    for dtype, size in weight_bytes(parameters).items():
        rows.append((f"weights in {dtype}", str(BYTES[dtype]), format_bytes(size)))
    states = training_bytes(model)
    total = sum(states.values())
    rows.append(("training", f"{total / parameters:g}", format_bytes(total)))
    for part, size in states.items():
        rows.append((f"  fp32 {part.replace('_', ' ')}", f"{size / parameters:g}", format_bytes(size)))
    note = (
        "Training: the model states with AdamW on one GPU, without sharding. Activations, the loss, buffers and the\n"
        "device's context are not included."
    )
    return f"{aligned(rows, right={1, 2})}\n\n{note}"


def _family(model: ModelConfig) -> str:
    """Say which Hugging Face architecture the model has, or which settings prevent an export to Hugging Face."""
    try:
        return f"As a Hugging Face folder: {as_config(model)['architectures'][0]}."
    except InputError as error:
        return f"As a Hugging Face folder: {error}."


def _formula(model: ModelConfig) -> str:
    count = count_parameters(model)
    rows = [(step.part, step.symbols, step.numbers, f"{step.value:,}") for step in formula_steps(model)]
    table = aligned([("part", "symbols", "numbers", "parameters"), *rows], right={3})
    words = {**SYMBOLS, "L": "layers"}
    sizes = ", ".join(f"{symbol} = {size} {words[symbol]}" for symbol, size in sizes_of(model).items())
    parts = {part: value for part, value in count.parts().items() if value or part != "position_embedding"}
    total = " + ".join(f"{value:,}" for value in parts.values())
    return f"{closed_form(model)}\n{sizes}\n\n{table}\n\nP = {total}\n  = {count.total:,}"
