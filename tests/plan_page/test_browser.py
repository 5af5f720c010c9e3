"""What the page that plans in the browser is answered: the same as the command prints."""

import json
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scalegpt.cli.main import main
from scalegpt.config.run import PLANNED
from scalegpt.plan_page import form
from scalegpt.plan_page.browser import KNOWN, PARTS, ask, parts
from scalegpt.planner.query import answer

ROOT = Path(__file__).resolve().parents[2]

LLAMA = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))


def answered(values: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The parts of the answer, as they come."""
    yield from (json.loads(part) for part in parts(json.dumps(values)) if part)


def merged(values: dict[str, str]) -> dict[str, Any]:
    """The answer: all parts together."""
    whole: dict[str, Any] = {"html": {}}
    for part in answered(values):
        whole |= {**part, "html": whole["html"] | part.get("html", {})}
    return whole


def as_json(values: dict[str, str]) -> Any:
    """What ``scalegpt plan --json`` prints, as the page has it; it comes with the second part."""
    found = [part for _, part in zip(range(2), answered(values), strict=False)]
    return found[-1].get("json", found[-1])


# --- the same as the command -----------------------------------------------------------------------------------------

CHOICES = {
    "backend": ("auto", "plain", "fsdp", "deepspeed"), "zero_stage": ("0", "2", "3"), "offload": ("none", "optimizer"),
    "micro_batch": ("1", "4", "6"), "recompute": ("none", "selective", "full"), "loss": ("full", "chunked"),
    "precision": ("bf16", "fp32"), "optimizer": ("muon", "lion"), "max_tokens": ("5e9", "1_000_000"),
    "tokens_per_step": ("524288", "49152"), "host_memory_gb": ("128",), "network_gbps": ("100",),
    "network": ("8xroce-100g", "400"), "margin": ("0.1",),
    "n_layer": ("12", "0"), "n_embd": ("512", "999"), "memory_gb": ("8", "1"),
}  # fmt: skip


def drawn(seed: int) -> dict[str, str]:
    """What a user may enter; some of it cannot work."""
    draw = random.Random(seed)
    values = {
        "preset": draw.choice(("tiny", "small", "150M_1024", "gpt2", "SmolLM2-135M")),
        "gpu": draw.choice(("4090", "a100-40gb", "H100 SXM", "T4")),
        "gpus": draw.choice(("1", "2", "8")),
    }
    for name in draw.sample(sorted(CHOICES), draw.choice((0, 1, 2, 2, 3))):
        values[name] = draw.choice(CHOICES[name])
    return values


@pytest.mark.parametrize("seed", range(50))
def test_the_page_says_what_the_command_says(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    values = drawn(seed)
    status = main(["plan", "--json", *(f"--{name}={value}" for name, value in values.items())])
    printed = capsys.readouterr()
    if status == 2:
        message = printed.err.strip().removeprefix("scalegpt plan: error: ").removeprefix("command line: ")
        assert as_json(values)["error"] == message
    else:
        assert as_json(values) == json.loads(printed.out)


def test_the_drawn_inputs_have_every_outcome() -> None:
    outcomes = {
        "refused" if "error" in found else str(found["choice"]["fits"])
        for found in (as_json(drawn(seed)) for seed in range(50))
    }
    assert outcomes == {"refused", "True", "False"}


def test_a_hugging_face_config_is_planned_as_the_command_plans_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "llama" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(LLAMA), encoding="utf-8")
    main(["plan", "--json", "--hf", str(file), "--gpu", "h100", "--gpus", "8"])
    found = as_json({"hf": json.dumps(LLAMA), "hf_name": "llama", "gpu": "h100", "gpus": "8"})
    assert found == json.loads(capsys.readouterr().out)
    assert found["model"]["name"] == "llama"


# --- the parts -------------------------------------------------------------------------------------------------------


def test_the_first_part_has_the_plan_and_the_rest_follows() -> None:
    found = list(answered(form.FIRST))
    assert {"summary", "command", "memory", "time", "details"} == found[0]["html"].keys()
    assert {name for part in found for name in part["html"]} == set(PARTS)
    assert found[0]["used"]["backend"] in found[0]["html"]["command"]
    for part in found:
        for name, text in part["html"].items():
            assert ET.fromstring(f"<section id='{name}'>{text}</section>").tag == "section"  # it is well-formed


def test_the_work_can_be_ended_between_the_parts() -> None:
    steps = parts(json.dumps(form.FIRST))
    assert json.loads(next(steps))["title"]
    steps.close()
    assert list(steps) == []


def test_what_does_not_fit_shows_what_would() -> None:
    found = merged({"preset": "500M_1024", "gpu": "3060", "micro_batch": "64", "recompute": "none", "backend": "plain"})
    assert "it does not fit" in found["status"]
    assert "What would fit" in found["html"]["command"]
    assert "Whole run" not in found["html"]["summary"]


def test_a_card_without_a_name_has_no_times() -> None:
    found = merged({"preset": "tiny", "memory_gb": "12"})
    assert found["html"]["time"] == found["html"]["scaling"] == ""
    assert "tokens" not in found["html"]["summary"]


def test_the_form_is_told_what_the_planner_chose() -> None:
    values = {"preset": "150M_1024", "gpu": "4090", "gpus": "2"}
    used, choice = merged(values)["used"], as_json(values)["choice"]
    for name in PLANNED | {"tokens_per_step"}:
        assert used[name] == ("none" if choice[name] is None else str(choice[name]))


def test_the_notes_name_the_command_that_asks_the_same() -> None:
    values = {"preset": "tiny", "gpu": "RTX 4090", "gpus": "2"}
    text = re.sub("<[^>]+>", "", merged(values)["html"]["details"])
    assert "scalegpt plan --preset tiny --gpu &#x27;RTX 4090&#x27; --gpus 2" in text


def test_the_speeds_over_gpus_are_those_of_single_plans() -> None:
    values = {"preset": "150M_1024", "gpu": "a100-40gb", "gpus": "4"}
    table = merged(values)["html"]["scaling"]
    rows = [[*map("".join, (cell.itertext() for cell in row))] for row in ET.fromstring(f"<p>{table}</p>").iter("tr")]
    assert [row[0] for row in rows[1:]] == ["1", "2", "4", "8", "16", "32", "64"]
    for row in rows[1:5]:
        plan = answer(ask({**values, "gpus": row[0]}), explain=False).choice
        assert row[1] == f"{plan.tokens_per_second:,.0f}"


# --- what cannot be answered -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"preset": "tny", "gpu": "h100"}, "preset", "did you mean tiny?"),
        ({"preset": "tiny"}, "gpu", "choose a card"),
        ({"preset": "tiny", "gpu": "cpu"}, "gpu", "choose a GPU"),
        ({"preset": "tiny", "gpu": "foo"}, "gpu", "not in the catalogue"),
        ({"preset": "tiny", "gpu": "h100", "gpus": "many"}, "gpus", "must be a whole number"),
        ({"preset": "tiny", "gpu": "h100", "memory_gb": "900"}, "memory_gb", "give less"),
        ({"gpu": "h100", "n_embd": "100"}, "n_embd", "not divisible"),
        ({"preset": "tiny", "gpu": "h100", "backend": "fsdpp"}, "backend", "did you mean fsdp?"),
        ({"preset": "tiny", "gpu": "h100", "batch_size": "8"}, None, "unknown setting 'batch_size'"),
        ({"gpu": "h100", "hf": "{", "hf_name": "x"}, "hf", "config.json:1: not JSON"),
        ({"gpu": "h100", "hf": '{"model_type": "mamba"}', "hf_name": "../.."}, "hf", "'mamba' is not supported"),
        ({"gpu": "h100", "hf": "{}", "preset": "tiny"}, "preset", "not both"),
        ({"gpu": "h100", "hf": "x" * 2_000_000}, "hf", "more than 1,048,576 characters"),
    ],
)
def test_bad_input_is_one_line_beside_its_field(values: dict[str, str], field: str | None, words: str) -> None:
    found = list(answered(values))
    assert len(found) == 1
    assert words in found[0]["error"]
    assert "\n" not in found[0]["error"]
    assert "/tmp" not in found[0]["error"]
    assert found[0]["field"] == field


def test_user_text_is_escaped() -> None:
    name = "<script>alert(1)</script>"
    found = merged({"hf": json.dumps(LLAMA), "hf_name": name, "gpu": "h100", "input_file": name})
    assert "&lt;script&gt;" in found["html"]["details"] + found["html"]["command"]
    assert not [text for text in found["html"].values() if "<script" in text]


# --- what Python in a browser has ------------------------------------------------------------------------------------


def test_it_needs_only_what_python_in_a_browser_has() -> None:
    """Packages and modules that Pyodide lacks are missing here too, and only folders that are in the page are imported."""
    program = f"""
import json, runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        absent = {{"fcntl", "grp", "pwd", "resource", "termios", "torch", "numpy", "psutil", "rich", "pynvml", "tiktoken",
                   "safetensors", "deepspeed", "transformers"}}
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"no module named {{name}}", name=name)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
from scalegpt.plan_page.browser import parts
from scalegpt.plan_page.form import index
index()
for values in ({{"gpu": "4090", "hf": {json.dumps(json.dumps(LLAMA))}}}, {{"preset": "tiny", "gpu": "h100", "bach": "1"}},
               {{"preset": "tiny", "gpu": "a100", "gpus": "4", "optimizer": "muon", "backend": "deepspeed"}}):
    for part in parts(json.dumps(values)):
        pass
needed = runpy.run_path("docs/planner_page/build.py")["NEEDED"]
ours = {{name.split(".")[1] for name, module in sys.modules.items()
        if name.startswith("scalegpt.") and hasattr(sys.modules["scalegpt." + name.split(".")[1]], "__path__")}}
print(sorted(ours - set(needed)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


# --- the page itself -------------------------------------------------------------------------------------------------


def test_the_form_has_a_labelled_field_for_each_choice() -> None:
    page = form.index()
    tree = ET.fromstring(page[page.index('<form id="form"') : page.index("</form>") + len("</form>")])
    fields = {each.get("name"): each for each in tree.iter() if each.get("name")}
    assert fields.keys() <= KNOWN
    assert {
        "preset",
        "gpu",
        "gpus",
        "nodes",
        "micro_batch",
        "backend",
        "zero_stage",
        "recompute",
        "precision",
    } <= fields.keys()
    labels = {each.get("for") for each in tree.iter("label")}
    problems = {each.get("id") for each in tree.iter("p")}
    for name, field in fields.items():
        assert field.get("id") in labels
        assert field.get("aria-describedby") == f"e-{name}"
        assert f"e-{name}" in problems
    chosen = {option.get("value") for option in fields["preset"].iter("option")}
    assert {"tiny", "Qwen3-0.6B"} < chosen
    identities = re.findall(r'\bid="([^"]+)"', page)
    assert len(identities) == len(set(identities))


def test_the_page_loads_nothing_from_elsewhere_and_shows_a_plan_at_once() -> None:
    page = form.index()
    assert "default-src &#x27;none&#x27;" in page
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert not re.findall(r"<script(?![^>]* src=)|<style|\bstyle=|\bon\w+=", page)  # the policy would block it
    assert "It fits." in page
