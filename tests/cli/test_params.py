"""``scalegpt params`` as its users meet it: figures, dialogue, bad input, start-up."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalegpt.architecture.counting import count_parameters
from scalegpt.cli.main import main
from scalegpt.cli.output import aligned
from scalegpt.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
GPT2_SMALL = ["--n_layer", "12", "--n_embd", "768", "--n_head", "12", "--block_size", "1024", "--vocab_size", "50257"]

Printed = pytest.CaptureFixture[str]


def params(capsys: Printed, *words: str) -> str:
    """Run the command, which must succeed in silence on stderr, and return what it printed."""
    status = main(["params", *words])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def answering(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [((12, 768, 12), 124_439_808), ((24, 1024, 16), 354_823_168), ((36, 1280, 20), 774_030_080),
     ((48, 1600, 25), 1_557_611_200)],
)  # fmt: skip
def test_gpt2_sizes(capsys: Printed, shape: tuple[int, int, int], parameters: int) -> None:
    layers, width, heads = map(str, shape)
    words = ["--n_layer", layers, "--n_embd", width, "--n_head", heads, "--block_size", "1024", "--vocab_size", "50257"]
    assert json.loads(params(capsys, *words, "--bias", "--json"))["parameters"] == parameters
    assert f"{parameters:,}" in params(capsys, *words, "--bias")


def test_json_breakdown_adds_up(capsys: Printed) -> None:
    values = json.loads(params(capsys, "--preset", "150M_1024", "--json"))
    assert values["parameters"] == 152_691_456
    breakdown = values["breakdown"]
    layer = breakdown.pop("per_layer")
    assert sum(breakdown.values()) == values["parameters"]
    assert layer["attention"] + layer["feed_forward"] + layer["norms"] == layer["total"]
    assert 16 * layer["total"] == breakdown["all_layers"]
    assert values["shares"]["token_embedding"] == pytest.approx(50304 * 768 / 152_691_456)
    assert values["weight_bytes"] == {"fp32": 4 * 152_691_456, "bf16": 2 * 152_691_456}
    assert values["training_bytes"]["total"] == 16 * 152_691_456
    assert "formula" not in values


def test_table_shows_every_part_its_share_and_units(capsys: Printed) -> None:
    out = params(capsys, "--preset", "150M_1024")
    table = {line[:20].strip(): line for line in out.splitlines()}
    for part, value, share in [
        ("token embedding", "38,633,472", "25.30%"),
        ("position embedding", "786,432", "0.52%"),
        ("one layer", "7,079,424", "4.64%"),
        ("attention", "2,359,296", "1.55%"),
        ("feed-forward", "4,718,592", "3.09%"),
        ("norms", "1,536", "<0.01%"),
        ("all layers", "113,270,784", "74.18%"),
        ("final norm", "768", "<0.01%"),
        ("total", "152,691,456", "100.00%"),
    ]:
        assert table[part].split()[-2:] == [value, share]
    assert "shared with the token embedding" in table["head"]
    assert table["weights in fp32"].endswith("610.77 MB (582.47 MiB)")
    assert table["weights in bf16"].endswith("305.38 MB (291.24 MiB)")
    assert table["training"].endswith("2.44 GB (2.28 GiB)")


@pytest.mark.parametrize("words", [["--tie_head", "false"], ["--tie-head=off"], ["--untied"], ["--no-tie-head"]])
def test_every_spelling_of_untied_is_counted(capsys: Printed, words: list[str]) -> None:
    assert "191,324,928" in params(capsys, "--preset", "150M_1024", *words)


def test_bias_bare_or_with_a_value(capsys: Printed) -> None:
    with_biases = params(capsys, *GPT2_SMALL, "--bias")
    assert "124,439,808" in with_biases
    assert params(capsys, *GPT2_SMALL, "--bias", "true") == with_biases
    assert params(capsys, *GPT2_SMALL, "--bias", "--tie_head") == with_biases
    assert params(capsys, *GPT2_SMALL, "--bias", "false") == params(capsys, *GPT2_SMALL)


def test_hyphens_and_underscores_are_equal(capsys: Printed) -> None:
    hyphens = [word.replace("_", "-") for word in GPT2_SMALL]
    assert params(capsys, *hyphens, "--show-formula") == params(capsys, *GPT2_SMALL, "--show_formula")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(heads=st.integers(1, 32), size=st.integers(1, 128), layers=st.integers(1, 200), vocab=st.integers(1, 200_000))
def test_flags_reach_the_calculator(capsys: Printed, heads: int, size: int, layers: int, vocab: int) -> None:
    model = ModelConfig(n_layer=layers, n_embd=heads * size, n_head=heads, vocab_size=vocab, bias=True)
    words = [f"--{key}={getattr(model, key)}" for key in ("n_layer", "n_embd", "n_head", "vocab_size", "bias")]
    assert json.loads(params(capsys, *words, "--json"))["parameters"] == count_parameters(model).total


def test_config_file_in_json_and_yaml_and_a_flag_over_it(capsys: Printed, tmp_path: Path) -> None:
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 32, "vocab_size": 100}
    as_json, as_yaml = tmp_path / "mine.json", tmp_path / "mine.yaml"
    as_json.write_text(json.dumps({"model": shape}))
    as_yaml.write_text("model: {n_layer: 2, n_embd: 64, n_head: 2, block_size: 32, vocab_size: 100}\n")
    out = params(capsys, "--config_file", str(as_json))
    assert params(capsys, "--config-file", str(as_yaml)) == out
    assert out.startswith("mine: 2 layers")
    assert params(capsys, "--config_file", str(as_json), "--n_layer", "3").startswith("mine (changed): 3 layers")


def test_formula_adds_up_to_the_total(capsys: Printed) -> None:
    out = params(capsys, *GPT2_SMALL, "--bias", "--untied", "--show_formula")
    assert "P = V·H + T·H + L·(12·H² + 13·H) + 2·H + V·H\n" in out
    assert "12·(12·768² + 13·768)" in out
    assert "P = 38,597,376 + 786,432 + 85,054,464 + 1,536 + 38,597,376\n  = 163,037,184" in out
    formula = json.loads(params(capsys, "--preset", "tiny", "--show_formula", "--json"))["formula"]
    assert formula["closed_form"] == "P = V·H + T·H + L·(12·H² + 2·H) + H"
    assert {"part": "final norm", "symbols": "H", "numbers": "192", "value": 192} in formula["steps"]


def test_a_model_without_learned_positions_has_no_line_of_them(capsys: Printed) -> None:
    out = params(capsys, "--preset", "150M_2048", "--show_formula")
    assert "position" not in out
    assert "P = 38,633,472 + 113,276,160 + 768 + 0\n  = 151,910,400" in out


def test_it_says_what_the_model_is_for_hugging_face(capsys: Printed) -> None:
    assert params(capsys, "--preset", "150M_2048").endswith("\nAs a Hugging Face folder: Qwen3ForCausalLM.\n")
    words = ("--preset", "tiny", "--position", "rope", "--activation", "relu2", "--norm", "rmsnorm")
    assert "\nAs a Hugging Face folder: no Hugging Face family has this shape; the nearest is " in params(
        capsys, *words
    )
    assert json.loads(params(capsys, *words, "--json"))["hugging_face_families"] == []
    assert json.loads(params(capsys, "--preset", "gpt2", "--json"))["hugging_face_families"] == ["gpt2"]


def test_a_gated_model_is_shown_as_it_is(capsys: Printed) -> None:
    words = ["--preset", "tiny", "--activation", "swiglu", "--norm", "rmsnorm", "--n_inner", "500"]
    out = params(capsys, *words, "--show_formula")
    assert out.startswith(
        "tiny (changed): 4 layers, width 192, 3 heads of 64, block 256, vocabulary 50304, no biases, tied head, "
    )
    assert "tied head, rmsnorm, swiglu\n" in out
    assert "L·(4·H² + 3·H·F + 2·H)" in out
    assert "H = 192 width, F = 500 inner width, L = 4 layers\n" in out
    assert "192 to 2 times 500 and back" in out
    formula = json.loads(params(capsys, *words, "--show_formula", "--json"))["formula"]
    assert formula["sizes"] == {"V": 50304, "T": 256, "H": 192, "F": 500, "L": 4}


def test_dialogue_accepts_defaults_from_a_preset(capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "350M_1024", *[""] * 7)
    assert main(["params", "--interactive"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("350M_1024: 24 layers")
    assert "354,599,936" in out
    assert "[24]" in err
    assert "[no]" in err


def test_dialogue_asks_again_and_says_why(capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["150N", "none", "many", "0", "12", "768", "11", "12", "1024", "auto", "0", "50257", "yes", "perhaps", ""]
    answering(monkeypatch, *answers)
    assert main(["params", "--interactive", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["parameters"] == 124_439_808
    for reason in ("did you mean 150M", "not 'many'", "at least 1, not 0", "768 is not divisible by n_head 11",
                   "not 'auto'", "vocab_size is auto", "not 'perhaps'"):  # fmt: skip
        assert reason in err


def test_dialogue_proposes_heads_that_divide_a_new_width(capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, "tiny", "", "640", "", "", "", "", "")
    assert main(["params", "--interactive"]) == 0
    assert capsys.readouterr().out.startswith("tiny (changed): 4 layers, width 640, 10 heads of 64")


def test_dialogue_takes_flags_as_its_defaults(capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, *[""] * 7)
    assert main(["params", "--interactive", "--preset", "tiny", "--n_layer", "7"]) == 0
    assert capsys.readouterr().out.startswith("tiny (changed): 7 layers")


@pytest.mark.parametrize("answers", [[], ["none"], ["tiny", "4", "192"]])
def test_the_dialogue_ends_cleanly_at_the_end_of_input(
    capsys: Printed, monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    answering(monkeypatch, *answers)
    assert main(["params", "--interactive"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "scalegpt params: the input ended before the last answer; nothing was counted"
    assert "Traceback" not in err


BAD_WORDS = {
    "an unknown preset": (["--preset", "150N"], "preset '150N' does not exist; did you mean 150M"),
    "an unknown flag": (["--n_layers", "3"], "unknown flag --n_layers; did you mean --n_layer"),
    "heads that do not divide": (["--n_embd", "768", "--n_head", "7"], "768 is not divisible by n_head 7; n_head 6"),
    "a word for a number": (["--n_layer", "many"], "n_layer must be a whole number, not 'many'"),
    "a broken number": (["--n_layer", "1.5"], "n_layer must be a whole number"),
    "too small a number": (["--n_layer", "0"], "n_layer must be at least 1, not 0"),
    "a number for a switch": (["--bias", "2"], "'2' is not a value of bias; known: false, qkv, true"),
    "a preset and a file": (["--preset", "tiny", "--config_file", "x.json"], "not both"),
    "a missing file": (["--config_file", "absent.json"], "absent.json: No such file"),
    "a flag without its value": (["--preset"], "expected one argument"),
    "a stray word": (["150M"], "unexpected argument '150M'"),
    "an undecided vocabulary": (["--vocab_size", "auto"], "vocab_size is auto"),
}


@pytest.mark.parametrize(("words", "message"), BAD_WORDS.values(), ids=BAD_WORDS)
def test_bad_words_are_one_line_and_status_2(capsys: Printed, words: list[str], message: str) -> None:
    refused(capsys, words, message)


BAD_FILES = {
    "an unknown key": ('{"model": {"n_layers": 3}}', "unknown key 'n_layers'; did you mean n_layer"),
    "an unknown part": ('{"modle": {}}', "unknown key 'modle'; did you mean model"),
    "a setting at the top": ('{"learning_rate": 1e-3}', "learning_rate belongs under 'train'"),
    "a number for a part": ('{"model": 3}', "model must be an object of settings, not 3"),
    "a list": ("[]", "must hold an object"),
    "nothing": ("", ":1: not JSON"),
    "broken JSON": ('{"model": {\n  "n_layer": 3,\n  "n_embd" 64}}', ":3: not JSON"),
    "a wrong type": ('{"model": {"n_layer": true}}', "n_layer must be a whole number, not True"),
    "no number": ('{"train": {"learning_rate": NaN}}', "learning_rate must be a number"),
    "a stage that is not": ('{"backend": "plain", "zero_stage": 3}', "zero_stage 3 does not exist for backend plain"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_one_line_that_names_it(capsys: Printed, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    assert str(path) in refused(capsys, ["--config_file", str(path)], message)


def test_file_that_is_no_text_or_no_yaml_or_a_folder(capsys: Printed, tmp_path: Path) -> None:
    binary, broken = tmp_path / "a.json", tmp_path / "a.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    broken.write_text("model: {n_layer: 3\ntrain: [")
    refused(capsys, ["--config_file", str(binary)], "not a text file")
    refused(capsys, ["--config_file", str(broken)], "not YAML")
    refused(capsys, ["--config_file", str(tmp_path)], "Is a directory")


def refused(capsys: Printed, words: list[str], message: str) -> str:
    status = main(["params", *words])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("scalegpt params: error: ")
    assert err.count("\n") == 1
    assert message in err
    return err


def test_debug_adds_a_traceback(capsys: Printed) -> None:
    assert main(["params", "--preset", "150N", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_shows_an_example_first(capsys: Printed) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["params", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert out.index("example:") < out.index("usage:") < out.index("shape:")


@pytest.mark.parametrize(
    "words",
    [["--help"], ["params", "--help"], ["params", "--preset", "tiny"], ["presets"], ["presets", "tiny", "150M"]],
)
def test_nothing_heavy_is_imported(words: list[str]) -> None:
    script = (
        "import sys\nfrom scalegpt.cli.main import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as ended:\n    status = ended.code\n"
        "heavy = {'torch', 'numpy', 'yaml', 'rich', 'deepspeed', 'tiktoken'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


def test_columns_line_up() -> None:
    table = aligned([("name", "size"), ("a", "1,000"), ("long name", "5")], right={1})
    assert table.splitlines() == [
        "name        size",
        "---------  -----",
        "a          1,000",
        "long name      5",
    ]
