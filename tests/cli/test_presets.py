"""``scalegpt presets``: the list, the comparison of two, and what it refuses."""

import json

import pytest

from scalegpt.cli.main import main
from scalegpt.config.presets import preset_names, public_names

Printed = pytest.CaptureFixture[str]


def presets(capsys: Printed, *words: str) -> str:
    status = main(["presets", *words])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def test_json_list_is_complete_and_ordered_by_size(capsys: Printed) -> None:
    listed = json.loads(presets(capsys, "--json"))
    groups = {entry["name"]: entry["group"] for entry in listed}
    assert groups == dict.fromkeys(preset_names(), "own") | dict.fromkeys(public_names(), "public")
    order = [(entry["group"], entry["parameters"]) for entry in listed]
    assert order == sorted(order)
    for entry in listed:
        assert {"name", "parameters", "model", "train", "backend", "zero_stage", "description"} <= set(entry)
    entry = next(entry for entry in listed if entry["name"] == "250M_1024")
    assert entry["model"]["n_embd"] == 1024
    assert entry["train"]["micro_batch"] == 16
    assert entry["train"]["seed"] == 1337  # what the file leaves out is there too
    assert (entry["backend"], entry["zero_stage"], entry["ds_config"]) == ("deepspeed", 1, "zero1.json")


def test_list_shows_each_preset_in_a_line(capsys: Printed) -> None:
    lines = {line.split()[0]: line for line in presets(capsys).splitlines() if line}
    assert {*preset_names(), *public_names()} <= set(lines)
    words = lines["350M_1024"].split()
    assert words[:9] == ["350M_1024", "354,599,936", "24", "1024", "16", "1024", "50304", "12", "393,216"]
    assert "deepspeed stage 2" in lines["350M_1024"]
    assert "fsdp stage 2" in lines["150M"]
    assert "2,048 a GPU" in lines["demo"]


def test_comparison_shows_only_what_differs(capsys: Printed) -> None:
    out = presets(capsys, "150M", "150M_1024")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["parameters"] == ["152,101,632", "152,691,456"]
    assert rows["model.block_size"] == ["256", "1,024"]
    assert rows["train.micro_batch"] == ["64", "24"]
    assert "model.n_embd" not in rows
    assert "backend" not in rows
    assert "1.004 times the parameters" in out


def test_comparison_in_json(capsys: Printed) -> None:
    values = json.loads(presets(capsys, "150M", "250M_1024", "--json"))
    assert values["names"] == ["150M", "250M_1024"]
    assert values["parameters"] == [152_101_632, 253_920_256]
    assert values["ratio"] == pytest.approx(253_920_256 / 152_101_632)
    assert values["differences"]["model.n_embd"] == [768, 1024]
    assert values["differences"]["ds_config"] == [None, "zero1.json"]
    assert "model.vocab_size" not in values["differences"]


def test_a_preset_does_not_differ_from_itself(capsys: Printed) -> None:
    assert json.loads(presets(capsys, "tiny", "tiny", "--json"))["differences"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["150M", "250M-1024"], "preset '250M-1024' does not exist; did you mean 250M_1024"),
        (["tiny"], "presets compares two presets, not 1"),
        (["tiny", "small", "150M"], "presets compares two presets, not 3"),
        (["--jsn"], "unknown flag --jsn; did you mean --json"),
    ],
)
def test_bad_words_are_one_line_and_status_2(capsys: Printed, words: list[str], message: str) -> None:
    status = main(["presets", *words])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("scalegpt presets: error: ")
    assert err.count("\n") == 1
    assert message in err
