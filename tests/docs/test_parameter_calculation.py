"""docs/PARAMETER_CALCULATION.md: every number in it is computed here, or is the output of the command beside it.

The document is taken apart: its code blocks, its tables and its sentences. What remains may hold no digit but in names, so
that a number cannot be added without a check.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from scalegpt.architecture.counting import ParameterCount, closed_form, count_parameters, formula_steps, weight_bytes
from scalegpt.cli.main import main
from scalegpt.config import ModelConfig
from scalegpt.config.presets import resolve
from scalegpt.planner.memory.predict import predict
from scalegpt.planner.memory.states import training_bytes

DOC = (Path(__file__).parents[2] / "docs" / "PARAMETER_CALCULATION.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)

OFTEN_COPIED_NORMS, OFTEN_COPIED_TOTAL = 6_144, 191_399_424
"""What the breakdown says that the document warns of."""

GPT2 = {
    "GPT-2": (12, 768, 12),
    "GPT-2 medium": (24, 1024, 16),
    "GPT-2 large": (36, 1280, 20),
    "GPT-2 XL": (48, 1600, 25),
}


def model(preset: str, **changes: object) -> ModelConfig:
    return resolve(preset=preset).model.changed(**changes)


def count(preset: str, **changes: object) -> ParameterCount:
    return count_parameters(model(preset, **changes))


def gpt2(name: str) -> ParameterCount:
    layers, width, heads = GPT2[name]
    return count_parameters(
        ModelConfig(n_layer=layers, n_embd=width, n_head=heads, block_size=1024, vocab_size=50257, bias=True)
    )


SMALL, LARGE, TINY = count("150M_1024"), count("500M_1024"), count("tiny")
UNTIED, BIASED = count("150M_1024", tie_head=False).total, count("150M_1024", bias=True).total
UNPADDED = count("150M_1024", vocab_size=50257).total
IN_LAYERS = SMALL.n_layer * (SMALL.layer.total - SMALL.layer.norms)
PLACES = SMALL.total - count("150M").total


def kept_by_a_layer() -> int:
    """Bytes that the planner says a layer keeps for the backward pass in bf16, by token and width."""
    sizes = []
    for layers in (15, 16):
        flags = {"n_layer": layers, "micro_batch": 1, "precision": "bf16", "backend": "plain", "recompute": "none"}
        prediction = predict(resolve(preset="150M_1024", flags=flags))
        sizes.append(prediction.breakdown["activations"])
    return round((sizes[1] - sizes[0]) / (1024 * 768))


KEPT = kept_by_a_layer()


def blocks(kind: str) -> list[str]:
    return [
        re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, name, text in FENCE.findall(DOC) if name == kind
    ]


def tables() -> dict[str, list[list[str]]]:
    """Head → rows of cells."""
    found = {}
    for text in TABLE.findall(FENCE.sub("", DOC)):
        head, _, *rows = text.splitlines()
        found[head] = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return found


def run(capsys: pytest.CaptureFixture[str], command: str, *more: str) -> str:
    program, *words = shlex.split(command)
    assert program == "scalegpt"
    assert main([*words, *more]) == 0, command
    return capsys.readouterr().out


def total_of(capsys: pytest.CaptureFixture[str], command: str) -> int:
    total: int = json.loads(run(capsys, command, "--json"))["parameters"]
    return total


# --- code blocks -----------------------------------------------------------------------------------------------------

EQUATIONS = {
    "50304·768": SMALL.token_embedding,
    "1024·768": SMALL.position_embedding,
    "12·768² + 2·768": SMALL.layer.total,
    f"16·{SMALL.layer.total:,}": SMALL.all_layers,
    f"{SMALL.token_embedding:,} + {SMALL.position_embedding:,} + {SMALL.all_layers:,} + 768": SMALL.total,
    "(1024 - 256)·768": PLACES,
    "16·(1024 - 256)·768": 16 * PLACES,
    "16·32·768·256": 16 * KEPT * 768 * 256,
    "16·32·768·1024": 16 * KEPT * 768 * 1024,
    "16·11·768 + 768": BIASED - SMALL.total,
    "786·64": model("150M_1024").vocab_size,
    "(50304 - 50257)·768": SMALL.total - UNPADDED,
    "2·768": SMALL.layer.norms,
    "8·768": OFTEN_COPIED_NORMS,
    "16·(6144 - 1536) + 768": OFTEN_COPIED_TOTAL - UNTIED,
    f"{UNTIED:,} + {OFTEN_COPIED_TOTAL - UNTIED:,}": OFTEN_COPIED_TOTAL,
    f"{gpt2('GPT-2').total:,} - 1024·768": gpt2("GPT-2").total - gpt2("GPT-2").position_embedding,
    "12·1024²": 12 * 1024**2,
    "12·16·768²": IN_LAYERS,
}
"""Each left-hand side in the document, and what it must come to by the counts."""


def test_equations_hold_and_are_the_models_counts() -> None:
    lines = [line.split(" = ") for text in blocks("arithmetic") for line in text.splitlines()]
    assert dict(lines) == {left: f"{value:,}" for left, value in EQUATIONS.items()}
    for left, right in lines:
        numbers = left.replace(",", "").replace("·", "*").replace("²", "**2")
        assert eval(numbers) == int(right.replace(",", "")), left


def test_closed_forms() -> None:
    (text,) = blocks("text")
    written = [re.split(r" {2,}", line) for line in text.splitlines()]
    kinds = [(bias, tie) for bias in (False, True) for tie in (True, False)]
    assert written == [
        [closed_form(model("tiny", bias=bias, tie_head=tie)),
         f"{'with' if bias else 'without'} biases, {'tied' if tie else 'untied'}"]
        for bias, tie in kinds
    ]  # fmt: skip


def test_commands_print_what_stands_below_them(capsys: pytest.CaptureFixture[str]) -> None:
    ran = 0
    for text in blocks("console"):
        for part in text.split("$ ")[1:]:
            command, _, output = part.partition("\n")
            printed = run(capsys, command)
            assert output.strip() in ("", printed.strip()), command
            ran += 1
    assert ran == 1 + len(GPT2)


def test_gpt2s_commands_give_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line.removeprefix("$ ") for line in blocks("console")[1].splitlines()]
    totals = [f"{total_of(capsys, command):,}" for command in commands]
    assert totals == [row[-1] for row in tables()["| model | L | H | heads | parameters |"]]


def test_commands_in_the_text_give_the_numbers_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    said = re.findall(r"`(scalegpt params [^`]+)`\s+says\s+([\d,]+\d)", DOC)
    assert len(said) == 2
    for command, number in said:
        assert f"{total_of(capsys, command):,}" == number


# --- tables ----------------------------------------------------------------------------------------------------------


def share(value: float) -> str:
    return "<0.01%" if 0 < value < 5e-5 else f"{value:.2%}"


def of_parts() -> list[list[str]]:
    def parts(one: ParameterCount) -> list[int]:
        return [one.token_embedding, one.position_embedding, one.layer.total, one.all_layers, one.final_norm, one.head,
                one.total]  # fmt: skip

    names = ("token embedding", "position embedding", "one layer", "all layers", "final norm", "head", "**total**")
    forms = ("V·H", "T·H", "12·H² + 2·H", "L·(12·H² + 2·H)", "H", "0, tied", "**P**")
    return [
        [name, form, f"{a:,}", share(SMALL.share(a)), f"{b:,}", share(LARGE.share(b))]
        for name, form, a, b in zip(names, forms, parts(SMALL), parts(LARGE), strict=True)
    ]


def of_block_sizes() -> list[list[str]]:
    pairs = [(name, count(name).total, count(f"{name}_1024").total) for name in ("150M", "200M", "250M")]
    return [[f"`{name}`, `{name}_1024`", f"{a:,}", f"{b:,}", f"{b - a:,}", f"+{b / a - 1:.2%}"] for name, a, b in pairs]


def of_heads() -> list[list[str]]:
    names = ("tiny", "small", "150M_1024", "350M_1024", "500M_1024")
    pairs = [(name, count(name).total, count(name, tie_head=False).total) for name in names]
    return [[f"`{name}`", f"{a:,}", f"{b:,}", f"{b - a:,}", f"+{b / a - 1:.1%}"] for name, a, b in pairs]


def of_gpt2() -> list[list[str]]:
    return [[name, *map(str, shape), f"{gpt2(name).total:,}"] for name, shape in GPT2.items()]


TABLES = {
    "| part | formula | `150M_1024` | share | `500M_1024` | share |": of_parts,
    "| presets | parameters at 256 | at 1,024 | more | |": of_block_sizes,
    "| preset | tied | `--untied` | more | |": of_heads,
    "| model | L | H | heads | parameters |": of_gpt2,
}
SETTINGS = "| settings | one layer |"
SYMBOLS = "| part | what it is | weights | biases add |"


@pytest.mark.parametrize("head", TABLES)
def test_tables_are_the_counts(head: str) -> None:
    assert tables()[head] == TABLES[head]()


def test_symbols_come_to_each_parts_count() -> None:
    assert set(tables()) == {SYMBOLS, SETTINGS, *TABLES}
    for bias in (False, True):
        shape = model("150M_1024", bias=bias)
        sizes = {"V": shape.vocab_size, "T": shape.block_size, "H": shape.n_embd}
        counted = {step.part.strip(): step.value for step in formula_steps(shape)}
        written = tables()[SYMBOLS]
        assert [row[0] for row in written] == [part for part in counted if part not in ("one layer", "all layers")]
        for part, _, weights, biases in written:
            symbols = f"{weights} + {biases or 0}" if bias else weights
            assert eval(symbols.replace("·", "*").replace("²", "**2"), dict(sizes)) == counted[part], part


def test_a_layers_formula_follows_the_settings() -> None:
    for words, layer in tables()[SETTINGS]:
        flags = {key: value or "true" for key, value in re.findall(r"--(\w+)(?: (\w+))?", words)}
        assert f"L·({layer})" in closed_form(resolve(flags={**flags, "n_embd": 768, "n_head": 12}).model), words


# --- sentences -------------------------------------------------------------------------------------------------------


def too_low(estimate: int) -> str:
    return f"{1 - estimate / SMALL.total:.2%} too low"


def shape_of(preset: str) -> str:
    shape = model(preset)
    return f"`{preset}` has L = {shape.n_layer}, H = {shape.n_embd:,}, T = {shape.block_size:,}"


def of_width(parameters: int) -> int:
    """How many times the width so many parameters are."""
    times, rest = divmod(parameters, 768)
    assert rest == 0
    return times


BIASES = of_width(count("150M_1024", bias=True).layer.total - SMALL.layer.total)
MATRICES = of_width(of_width(SMALL.layer.total - SMALL.layer.norms))
BYTES = weight_bytes(1)
TRAINING = sum(training_bytes(model("tiny")).values()) // TINY.total

SENTENCES = [
    "An embedding of r rows has r·H weights",
    f"(3 + 1 + 4 + 4)·H² = {MATRICES}·H², the weights of its norms to {of_width(SMALL.layer.norms)}·H, all its biases to "
    f"(3 + 1 + 4 + 1 + 2)·H = {BIASES}·H",
    f"{shape_of('150M_1024')}; {shape_of('500M_1024')}; both have V = {model('500M_1024').vocab_size:,}, no biases and a",
    f"P ≈ {MATRICES}·L·H² + V·H is a good estimate: for `150M_1024` it is {too_low(IN_LAYERS + SMALL.token_embedding)}",
    f"of the {TINY.total:,} parameters of `tiny` (L = {TINY.n_layer}, H = {model('tiny').n_embd}), "
    f"{TINY.share(TINY.token_embedding):.1%} are the token embedding",
    "Why a block of 1024 costs so few parameters",
    f"From 256 to 1,024 that is {1024 - 256}·H more, about {PLACES / SMALL.total:.1%} of the model",
    f"by about {KEPT}·H bytes for each token and layer",
    "A sequence of 1,024 tokens keeps four times as much as one of 256",
    f"gradients and moments, {TRAINING} bytes each",
    "what a sequence of 256 and one of 1,024 keep, in bytes",
    f"a layer has {BIASES}·H more parameters, and the final norm H more",
    "the default is 4·H, and for gated layers 8/3·H rounded up to a multiple of 256",
    "stored as one from H to 2·F, and one back",
    "Where F is 4·H the formula says so",
    f"says {BIASED:,}, {BIASED / SMALL.total - 1:.2%} more",
    "tokenizer has 50,257 tokens",
    f"presets have {model('150M_1024').vocab_size:,} rows, the next multiple of 64,",
    f"The {50304 - 50257} rows that no token uses",
    f"`scalegpt params --preset 150M_1024 --vocab_size 50257` says {UNPADDED:,}",
    "T = 1,024 and V = 50,257 the formula gives",
    f"a layer of width 768 without biases {OFTEN_COPIED_NORMS:,} norm parameters. Two norms of 768 weights have "
    f"only {SMALL.layer.norms:,}.",
    f"It comes to {OFTEN_COPIED_TOTAL:,} for `150M_1024` untied, but the model has {UNTIED:,}. "
    f"The difference of {OFTEN_COPIED_TOTAL - UNTIED:,}",
    f"stores both names is {UNTIED:,} for `150M_1024`",
    f"counts a shared matrix once and is right: {SMALL.total:,}",
    f"so it says {gpt2('GPT-2').total - gpt2('GPT-2').position_embedding:,} for GPT-2 instead of {gpt2('GPT-2').total:,}",
    f"the masks would add {GPT2['GPT-2'][0] * 1024**2:,}",
    f"{MATRICES}·L·H² is {IN_LAYERS:,} for `150M_1024`, {too_low(IN_LAYERS)}",
    f"117M and 345M; its authors corrected that to {gpt2('GPT-2').total // 10**6}M and "
    f"{round(gpt2('GPT-2 medium').total / 10**6)}M",
    f"A weight is {BYTES['fp32']} bytes in fp32 and {BYTES['bf16']} in bf16. Training with AdamW keeps {TRAINING} bytes",
]  # fmt: skip
"""Every sentence with a number in it, the number computed; a few only state what is given, such as GPT-2's vocabulary."""

NAMES = re.compile(
    r"150M_1024|500M_1024|fp32|bf16|gpt-2|GPT-2|README\.md#1024-or-256|`scalegpt params --preset|tests/docs/test_\w+"
)


def test_sentences_say_what_is_counted_and_no_number_stands_elsewhere() -> None:
    prose = " ".join(TABLE.sub(" ", FENCE.sub(" ", DOC)).split())
    for sentence in SENTENCES:
        assert sentence in prose, sentence
    for sentence in SENTENCES:
        prose = prose.replace(sentence, "…")
    left = NAMES.sub("", prose)
    unchecked = re.findall(r".{0,30}\d.{0,30}", left)
    assert not unchecked, f"numbers without a check: {unchecked}"
