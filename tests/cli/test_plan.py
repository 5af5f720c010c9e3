"""``scalegpt plan``: its promises in JSON and text, its exit statuses, and the one line of every bad input."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.cli.main import main
from scalegpt.cli.plan import command as command
from scalegpt.cli.plan.text import bar
from scalegpt.cli.train import make_parser
from scalegpt.config.presets import preset_names, resolve
from scalegpt.hardware.gpus import catalogue
from scalegpt.hardware.machine import Machine
from scalegpt.planner.batches import plan_batches
from scalegpt.planner.memory import predict as memory
from scalegpt.planner.query import Asked, answer
from scalegpt.planner.time import calibration
from scalegpt.planner.time.calibration import Measurement
from scalegpt.system.invocation import program, train_command
from scalegpt.units import gib

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--preset tiny --backend plain --gpu 4090"
LARGE = "--preset 500M_1024 --backend plain"
PRESETS_OWN = "--micro_batch 8 --recompute none --loss chunked"
"""What 500M_1024 trains with where nothing is chosen."""

CHOICE = {
    "fits", "backend", "zero_stage", "micro_batch", "grad_accum", "recompute", "loss", "precision", "optimizer", "offload",
    "peak_bytes", "reserved_bytes", "total_bytes", "host_bytes", "breakdown", "phases", "step_seconds", "tokens_per_second",
    "tokens_per_second_low", "tokens_per_second_high",
    "mfu", "command",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
    ):  # the machine that runs the tests is not what they ask of
        monkeypatch.setenv(name, "")


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command with ``--json``; the parsed object."""

    def run(words: str, status: int = 0) -> Any:
        capsys.readouterr()
        assert main(["plan", *shlex.split(words), "--json"]) == status
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; its standard output."""

    def run(words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(["plan", *shlex.split(words)]) == status
        return capsys.readouterr().out

    return run


# --- what is promised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [SMALL, LARGE, f"{LARGE} {PRESETS_OWN} --gpu rtx3060", "--preset small --backend plain --memory_gb 1e3"],
)
def test_the_json_has_the_documented_keys(plan: Any, words: str) -> None:
    found = plan(words, status=3 if "3060" in words else 0)
    choice = found["choice"]
    assert {"model", "gpu", "choice", "alternatives"} <= set(found)
    assert {"name", "parameters"} <= set(found["model"])
    machine = {"name", "usable_bytes", "count", "nodes", "network_gbps", "network_kind", "host_bytes", "host_source"}
    assert machine == set(found["gpu"])
    assert set(choice) >= CHOICE
    usable = found["gpu"]["usable_bytes"]
    assert bool(found["alternatives"]) == (usable is not None and choice["fits"])
    assert all({*CHOICE, "why_not", "differs"} <= set(each) for each in found["alternatives"])
    assert choice["peak_bytes"] <= choice["reserved_bytes"] <= choice["total_bytes"]
    assert 0 < choice["peak_bytes"] == max(choice["phases"].values()) == sum(choice["breakdown"].values())
    assert choice["peak_bytes"] + sum(choice["overheads"].values()) == choice["total_bytes"]
    assert choice["phases"][choice["binding_phase"]] == choice["peak_bytes"]
    if "--gpu" in words:
        assert choice["tokens_per_second"] == pytest.approx(choice["tokens_per_step"] / choice["step_seconds"])
        assert sum(choice["time"].values()) == pytest.approx(choice["step_seconds"])
        assert 0 < choice["mfu"] < 1
        assert choice["tokens_per_second_low"] < choice["tokens_per_second"] < choice["tokens_per_second_high"]
    else:  # no card is named: no time is known
        assert (choice["step_seconds"], choice["tokens_per_second"], choice["mfu"]) == (None, None, None)
        assert choice["tokens_per_second_low"] is choice["tokens_per_second_high"] is None
    assert choice["fits"] == (None if usable is None else choice["total_bytes"] <= usable)


def test_fixed_settings_are_predicted_as_given(plan: Any) -> None:
    words = f"{SMALL} --micro_batch 4 --recompute full --loss full --precision fp32 --tokens_per_step 16384"
    choice = plan(words)["choice"]
    run = asked(words).run
    run = replace(run, train=run.train.changed(micro_batch=4))
    predicted = memory.predict(run, ranks=1, grad_accum=choice["grad_accum"])
    assert choice["peak_bytes"] == predicted.peak_bytes
    fixed = {"micro_batch": 4, "recompute": "full", "loss": "full", "precision": "fp32", "backend": "plain"}
    assert {key: choice[key] for key in fixed} == fixed
    assert choice["grad_accum"] * 4 * run.model.block_size == 16384 == choice["tokens_per_step"]


def asked(words: str) -> Asked:
    """What these words ask, of no machine in particular."""
    arguments = command._parser().parse(shlex.split(words))
    flags = command.given_settings(arguments)
    return Asked.of(preset=arguments.preset, config_file=arguments.config_file, flags=flags, machine=Machine())


def test_the_model_is_the_presets(plan: Any) -> None:
    model = plan("--preset 150M_1024 --backend plain")["model"]
    assert (model["name"], model["parameters"], model["n_layer"]) == ("150M_1024", 152_691_456, 16)


def test_every_setting_is_a_flag_in_either_spelling(plan: Any) -> None:
    shape = "--n-layer 2 --n_embd 64 --n-head 2 --block_size 32 --vocab-size 100 --tie_head false --bias --dropout 0.1"
    assert plan(f"{shape} --micro-batch 2")["model"]["parameters"] == sum(
        _size(each) for each in parameter_shapes(resolve(flags=_flags(shape)).model).values()
    )


def _flags(words: str) -> dict[str, Any]:
    return command.given_settings(command._parser().parse(shlex.split(words)), command.ModelConfig)


def _size(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def test_auto_is_the_same_as_no_flag(plan: Any) -> None:
    preset = plan("--preset 500M_1024 --gpu h100")
    auto = "--micro_batch auto --backend auto --zero_stage auto --recompute auto --loss auto --offload auto"
    assert plan(f"--preset 500M_1024 --gpu h100 {auto}") == preset


@pytest.mark.parametrize(
    ("gpu", "precision"), [("4090", "bf16"), ("t4", "fp16"), ("v100-32gb", "fp16"), ("mi300x", "bf16")]
)
def test_auto_precision_follows_the_card(plan: Any, gpu: str, precision: str) -> None:
    assert plan(f"--preset tiny --backend plain --gpu {gpu}")["choice"]["precision"] == precision


def test_the_step_keeps_its_tokens_over_any_number_of_gpus(plan: Any) -> None:
    for layout, ranks in (("--gpus 1", 1), ("--gpus 8", 8), ("--gpus 4 --nodes 2", 8), ("--gpus 64", 64)):
        found = plan(f"--preset 150M_1024 --gpu a100-80gb {layout}")
        choice = found["choice"]
        assert choice["micro_batch"] * choice["grad_accum"] * ranks * 1024 == choice["tokens_per_step"] == 393_216
        assert found["gpu"]["count"] * found["gpu"]["nodes"] == ranks


def test_a_micro_batch_that_does_not_divide_is_lowered_with_a_note(plan: Any) -> None:
    found = plan("--preset 150M_1024 --gpus 64")
    assert found["choice"]["micro_batch"] == 6
    assert "micro batch 6 rather than 24" in found["notes"][0]


# --- fits or not -----------------------------------------------------------------------------------------------------


def test_a_plan_that_does_not_fit_has_remedies(plan: Any, printed: Any) -> None:
    found = plan(f"{LARGE} {PRESETS_OWN} --memory_gb 12", status=3)
    choice, lighter = found["choice"], found["would_fit"]
    assert choice["fits"] is False
    assert choice["missing_bytes"] == choice["total_bytes"] - 12 * 10**9 > 0
    assert lighter["fits"] is True
    assert lighter["tokens_per_step"] == choice["tokens_per_step"]
    text = printed(f"{LARGE} {PRESETS_OWN} --memory_gb 12", status=3)
    assert f"does not fit: {gib(choice['missing_bytes'])} too much" in text
    assert f"would fit, with {gib(lighter['total_bytes'])}: --" in text
    assert found["remedies"][0]["command"] == lighter["command"]
    settings, card = found["remedies"]
    assert settings["what"] == "with other settings"
    assert (card["what"], card["gpu"]["name"]) == ("on an RTX A4500", "RTX A4500")
    assert f"would fit on an RTX A4500, with {gib(card['total_bytes'])}" in text
    assert lighter["command"] in text


def test_a_remedy_fits_when_planned(plan: Any) -> None:
    lighter = plan(f"{LARGE} {PRESETS_OWN} --memory_gb 12", status=3)["would_fit"]
    words = lighter["command"].split("launch/train.py ")[1].replace(" --input_file your_text.txt", "")
    again = plan(f"{words} --memory_gb 12")["choice"]
    assert again == lighter


def test_without_a_remedy_it_says_so(plan: Any, printed: Any) -> None:
    impossible = "--n_layer 400 --n_embd 16384 --n_head 128 --backend plain --memory_gb 2"
    assert plan(impossible, status=3)["would_fit"] is None
    assert "nothing lighter fits on this machine" in printed(impossible, status=3)


def test_the_limit_is_exact_to_the_byte(plan: Any) -> None:
    fixed = f"{SMALL} --micro_batch 8 --recompute none --loss chunked --zero_stage 0 --offload none"
    total = plan(fixed)["choice"]["total_bytes"]
    plan(f"{fixed} --memory_gb {total / 1e9:.9f}")
    plan(f"{fixed} --memory_gb {(total - 1) / 1e9:.9f}", status=3)


@pytest.mark.parametrize("flags", ["", "--recompute full", "--loss full", "--precision fp32", "--fused false"])
def test_a_larger_micro_batch_never_takes_less(plan: Any, flags: str) -> None:
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    totals = [plan(f"--preset tiny --backend plain --micro_batch {n} --tokens_per_step 49152 {flags}") for n in sizes]
    peaks = [found["choice"]["peak_bytes"] for found in totals]
    # Accumulating, of which the largest micro batch here needs none, holds the gradients besides.
    assert peaks[:-1] == sorted(peaks[:-1])


# --- text ------------------------------------------------------------------------------------------------------------


def test_the_table_adds_up(printed: Any, plan: Any) -> None:
    choice = plan(f"{LARGE} --gpu a100-40gb")["choice"]
    text = printed(f"{LARGE} --gpu a100-40gb")
    rows = re.findall(r"^(\S.*?) +([\d.]+) ([GM])iB +([\d.]+)%", text, flags=re.MULTILINE)
    sizes = {name: float(size) * (2**30 if unit == "G" else 2**20) for name, size, unit, _ in rows}
    sums = {name: sizes.pop(name) for name in ("= the allocator's peak", "= reserved", "= total")}
    assert sum(sizes.values()) == pytest.approx(choice["total_bytes"], rel=0.01)
    assert sums["= total"] == pytest.approx(choice["total_bytes"], rel=0.001)
    assert len(sizes) > 6
    shares = [float(share) for name, _, _, share in rows if name in sizes]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    bars = {name: len(drawn) for name, drawn in re.findall(r"^(\w.*?) +[\d.]+ .iB +[\d.]+% *(█*)", text, re.MULTILINE)}
    largest = max(sizes.values())
    for name, size in sizes.items():
        assert bars[name] == pytest.approx(40 * size / largest, abs=1.1)


def test_the_text_says_what_is_planned(printed: Any) -> None:
    text = printed(f"{LARGE} --gpu a100-40gb --gpus 1")
    assert "500M_1024: 537,621,760 parameters, 24 layers, 1280 wide" in text
    assert "1 × A100 40GB, plain, bf16" in text
    assert len(re.findall("◀ binds", text)) == 1
    assert "of 39.50 GiB (A100 40GB)" in text
    assert "fits, with " in text
    assert max(map(len, text.split("the command:")[0].splitlines())) <= 120
    assert re.search(r"tokens/s on all GPUs, \d+% MFU, likely [\d,]+ to [\d,]+; ", text)
    assert re.search(r"^instead +total +tokens/s +why not", text, re.MULTILINE)
    assert "estimated from published figures, not measured" in text  # nothing here pretends to be measured
    assert "times on A100 40GB rest on rates fitted to published runs of other trainers on it" in text
    assert "the usable memory of A40 is estimated" in printed(f"{LARGE} --gpu a40")
    table = printed(LARGE)  # without a GPU, and none named: on every card
    assert {card.name for card in catalogue()} <= {line.split("  ")[0] for line in table.splitlines()}
    assert "--gpu NAME shows one of them in full" in table


def test_bars() -> None:
    assert [bar(share, 4) for share in (0, 1 / 32, 0.25, 0.5, 1, 2, -1)] == ["", "▏", "█", "██", "████", "████", ""]


@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        ("--preset tiny --backend plain", train_command() + " --preset tiny "),
        (
            "--preset tiny --gpus 8 --backend fsdp",
            train_command("torchrun", "--nproc_per_node", "8") + " --preset tiny ",
        ),
        (
            "--preset tiny --gpus 8 --backend deepspeed",
            train_command("deepspeed", "--num_gpus", "8") + " --preset tiny ",
        ),
        (
            "--preset tiny --gpus 8 --nodes 2 --backend fsdp",
            f"{shlex.join(program('torchrun'))} --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d",
        ),
    ],
)
def test_the_command_starts_the_right_launcher(plan: Any, words: str, launcher: str) -> None:
    assert plan(words)["choice"]["command"].startswith(launcher)


def test_the_command_for_several_machines_says_what_to_put_in(printed: Any) -> None:
    said = "note: start the command on every machine, with the first one's host name for FIRST_MACHINE"
    words = "--preset tiny --gpu 4090 --gpus 8 --backend fsdp"
    assert said in printed(f"{words} --nodes 2 --network 100Gb/s --zero_stage 0")
    assert said not in printed(words)


def test_the_trainer_understands_the_command(plan: Any, tmp_path: Path) -> None:
    file = tmp_path / "my run.json"
    file.write_text(json.dumps({"model": {"n_layer": 3, "n_embd": 96}, "train": {"learning_rate": 2e-3}}))
    words = (
        f"--config_file '{file}' --n_head 6 --bias --dropout 0.1 --micro_batch 4 --max_tokens 4096 --input_file a.txt"
    )
    found = plan(words)
    arguments = make_parser().parse(shlex.split(found["choice"]["command"].split("launch/train.py ")[1]))
    flags = command.given_settings(arguments)
    run = resolve(config_file=arguments.config_file, flags=flags)
    question, _ = asked(words).question()
    ours = answer(asked(words), explain=False).choice.run
    assert question.run.train.precision == "bf16"
    assert asdict(run) == asdict(ours)


def test_host_memory_that_is_assumed_is_named_and_what_it_lacks_does_not_fit(plan: Any, printed: Any) -> None:
    seventy = "--n_layer 80 --n_embd 8192 --n_head 64 --block_size 2048 --gpu a100-80gb"
    found = plan(seventy, status=3)
    assert (found["gpu"]["host_bytes"], found["gpu"]["host_source"]) == (160 * 10**9, "assumed")
    choice = found["choice"]
    assert (choice["fits"], choice["fits_host"]) == (False, False)
    assert choice["host_needed_bytes"] > 160 * 10**9
    assert any("assumed to have 160 GB of host memory" in note for note in found["notes"])
    text = printed(seventy, status=3)
    assert "of host memory in each machine, of 149.01 GiB assumed" in text
    given = plan(f"{seventy} --host_memory_gb 3000")
    assert (given["gpu"]["host_bytes"], given["gpu"]["host_source"]) == (3 * 10**12, "given")
    assert given["choice"]["fits"]
    assert "of 2793.97 GiB given" in printed(f"{seventy} --host_memory_gb 3000")
    rows = plan("--gpu rtx2060 --host_memory_gb 8")["presets"]
    assert {row["choice"]["fits_host"] for row in rows} == {True, False}
    assert all(row["choice"]["fits_host"] == (row["choice"]["host_needed_bytes"] <= 8 * 10**9) for row in rows)
    assert not any(row["choice"]["fits"] and not row["choice"]["fits_host"] for row in rows)
    assert "for offload, each machine is assumed to have 64 GB" in printed("--gpu rtx2060")


def test_a_given_length_is_planned_and_two_are_reported(plan: Any) -> None:
    tokens = "--n_layer 2 --vocab_size 257 --block_size 64 --micro_batch 4 --gpu 4090 --max_tokens 26e6"
    found = plan(tokens)
    assert not any("the run ends" in note for note in found["notes"])
    assert "--max_tokens 26000000" in found["choice"]["command"]
    assert "max_iters" not in found["choice"]["command"]
    both = plan(f"{tokens} --max_iters 20")
    assert any("the run ends after 20 steps" in note for note in both["notes"])
    assert "--max_iters 20 --max_tokens 26000000" in both["choice"]["command"]
    alone = plan("--preset tiny --gpu 4090 --max_minutes 5")
    assert alone["notes"] == []  # the preset has a length


# --- calibration -----------------------------------------------------------------------------------------------------


def test_measured_runs_correct_all_except_the_peak(plan: Any, printed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{SMALL} --micro_batch 8 --recompute none"
    tables = plan(words)["choice"]
    measured = Measurement(
        card="NVIDIA GeForce RTX 4090", driver="1", torch=str(calibration.installed_torch()), backend="plain", ranks=1,
        predicted_peak_bytes=10**9, allocated_bytes=10**9, reserved_bytes=2 * 10**9, driver_bytes=5 * 10**9, date="now",
    )  # fmt: skip
    assert calibration.record(measured) is None
    corrected = plan(words)["choice"]
    assert corrected["peak_bytes"] == tables["peak_bytes"]
    assert corrected["overheads"]["CUDA context"] == 3 * 10**9
    assert corrected["overheads_measured_on_runs"] == 1
    assert "corrected by 1 measured run like this one" in printed(words)
    assert plan(f"{words} --no-calibration")["choice"] == tables


def test_a_broken_calibration_file_is_a_warning(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = plan(SMALL)["choice"]
    path = calibration.calibration_path()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    found = plan(SMALL)
    assert found["choice"] == expected
    assert any(note.startswith("warning: calibration ") for note in found["notes"])
    assert main(["plan", *SMALL.split()]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("scalegpt plan: warning: calibration ")
    assert path.read_text() == "{"
    assert main(["plan", *SMALL.split(), "--no_calibration"]) == 0
    assert capsys.readouterr().err == ""


# --- trace -----------------------------------------------------------------------------------------------------------


def test_a_trace_is_printed_beside_the_prediction(plan: Any, printed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--preset tiny --backend plain --micro_batch 2 --tokens_per_step 1024"
    traced = plan(words)["choice"]["phases"]
    traced = {phase: size + 2**20 for phase, size in traced.items()}
    monkeypatch.setattr(command, "traced", lambda given: replace(given, trace=traced))
    choice = plan(f"{words} --trace")["choice"]
    assert choice["trace"] == {"peak_bytes": max(traced.values()), "phases": traced}
    text = printed(f"{words} --trace")
    assert re.search(r"^phase +peak +traced +error", text, re.MULTILINE)
    assert re.search(r"^forward +[\d.]+ .iB +[\d.]+ .iB +-\d+\.\d\d%", text, re.MULTILINE)
    assert " calculated, " in text


@pytest.mark.slow
def test_the_trace_is_of_the_same_step(plan: Any) -> None:
    shape = "--n_layer 2 --n_embd 128 --n_head 2 --block_size 64 --vocab_size 512 --backend plain"
    choice = plan(f"{shape} --precision bf16 --micro_batch 4 --trace")["choice"]
    assert choice["trace"]["phases"].keys() == choice["phases"].keys()
    assert choice["trace"]["peak_bytes"] == pytest.approx(choice["peak_bytes"], rel=0.05)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "--preset nope": "preset 'nope' does not exist",
    "--preset tiny --gpu rtx4091": "RTX 4090",
    "--preset tiny --gpu a100": "A100 40GB, A100 80GB",
    "--preset tiny --gpus 0": "gpus must be at least 1, not 0",
    "--preset tiny --gpus -1": "gpus must be at least 1",
    "--preset tiny --gpus two": "gpus must be a whole number",
    "--preset tiny --nodes 0": "nodes must be at least 1, not 0",
    "--preset tiny --memory_gb 0": "memory_gb must be more than 0",
    "--preset tiny --memory_gb nan": "memory_gb must be a number",
    "--preset tiny --gpu 4090 --memory_gb 80": "RTX 4090 has 25.25 GB",
    "--preset tiny --micro_batch 0": "micro_batch must be at least 1, not 0",
    "--preset tiny --backend plain --zero_stage 3": "zero_stage 3 does not exist for backend plain; it has 0",
    "--preset tiny --backend fsdp --zero_stage 1": "it has 0, 2, 3",
    "--preset tiny --backend plain --gpus 2": "use --backend fsdp or --backend deepspeed",
    "--preset tiny --backend fsdp --zero_stage 3": "give --gpus 2 or more, or --backend plain",
    "--preset tiny --backend deepspeed --zero_stage 1": "give --gpus 2 or more",
    "--preset tiny --gpu t4 --precision bf16": "T4 has no bf16; use --precision fp16",
    "--preset tiny --gpu v100-32gb --precision bf16": "use --precision fp16",
    "--preset tiny --gpu t4 --attention flash": "mem_efficient",
    "--preset tiny --gpu t4 --attention cudnn": "use --attention auto",
    "--preset tiny --precision fp32 --attention flash": "not fp32; use --attention auto",
    "--n_embd 1024 --n_head 2 --attention flash": "heads of at most 256, not 512; use --attention auto",
    "--n_embd 240 --n_head 1 --dropout 0.1 --gpu 4090 --attention flash": "heads of 240 with dropout",
    "--n_embd 208 --n_head 1 --gpu 4090 --attention flash": "heads of 208",
    "--preset tiny --backend plain --offload all": "offload all needs backend fsdp or deepspeed",
    "--preset tiny --backend fsdp --offload optimizer": "use --offload all --zero_stage 3",
    "--preset tiny --backend deepspeed --zero_stage 2 --offload all": "--offload optimizer",
    "--preset tiny --backend deepspeed --ds_config nope.json": "nope.json",
    "--preset tiny --backend fsdp --ds_config zero2.json": "needs backend deepspeed",
    "--preset tiny --gpus 3 --tokens_per_step 1000": "would work",
    "--preset tiny --tokens_per_step 32768 --micro_batch 7": "use --micro_batch",
    "--preset tiny --batch_size 8": "the sequences of one pass on a GPU are --micro_batch",
    "--preset tiny --epochs 3": "use --max_tokens or --max_iters",
    "--preset tiny --gpu 2xh100 --gpus 4": "says 2 gpus, but --gpus says 4",
    "--preset tiny --gpu gaudi2": "the closest card that can be planned is A100 80GB",
    "--preset tiny --optimizer sgd": "'sgd' is not a value of optimizer",
    "--preset tiny --recompute some": "'some' is not a value of recompute",
    "--preset tiny --precision fp8": "'fp8' is not a value of precision",
    "--preset tiny --config_file x.json": "not both",
    "--config_file /no/such/file": "/no/such/file",
    "--preset tiny --micro_bath 4": "did you mean --micro_batch",
    "--preset tiny extra": "unexpected argument 'extra'",
    "--gpu": "expected one argument",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_with_a_remedy(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("scalegpt plan: error: ")
    assert BAD[words] in captured.err


def test_heads_refused_with_dropout_work_without_it_or_on_another_card(plan: Any) -> None:
    shape = "--n_embd 240 --n_head 1 --attention flash --backend plain"
    plan(f"{shape} --gpu 4090")
    plan(f"{shape} --gpu h100 --dropout 0.1")


def test_one_rank_shards_nothing(plan: Any) -> None:
    found = plan("--preset 150M_1024 --gpu a100-80gb")
    assert (found["choice"]["backend"], found["choice"]["zero_stage"]) == ("plain", 0)


def test_a_gpu_without_a_preset_shows_every_preset(plan: Any, printed: Any) -> None:
    found = plan("--gpu 4090")
    assert {row["name"] for row in found["presets"]} == set(preset_names())
    assert found["largest"] == "500M_1024" == found["model"]["name"]
    assert found["choice"]["fits"] is True
    assert "the largest that fits: 500M_1024" in printed("--gpu 4090")
    assert plan("--memory_gb 0.5", status=3)["largest"] is None


def test_a_preset_without_a_gpu_shows_every_card(plan: Any) -> None:
    found = plan("--preset 150M_1024 --gpus 8")
    assert [row["name"] for row in found["gpus"]] == [
        card.name for card in sorted(catalogue(), key=lambda card: (card.usable_bytes, card.tflops))
    ]
    assert found["choice"]["fits"] is None
    assert all(row["gpu"]["count"] == 8 for row in found["gpus"])


def test_the_choice_leaves_the_margin_and_explains_the_alternatives(plan: Any) -> None:
    found = plan("--preset 350M_1024 --gpu 4090 --gpus 8 --margin 0.1")
    choice, usable = found["choice"], found["gpu"]["usable_bytes"]
    assert choice["total_bytes"] <= 0.9 * usable
    assert all(each["why_not"] for each in found["alternatives"])
    layouts = {(each["backend"], each["zero_stage"], each["offload"]) for each in found["alternatives"]}
    assert {("fsdp", 3, "none"), ("deepspeed", 1, "none"), ("deepspeed", 3, "none")} <= layouts


def test_the_trainer_refuses_the_same_tokens_per_step(plan: Any) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        plan_batches(resolve(preset="tiny", flags={"tokens_per_step": 1000}), 3, micro_fixed=True)


# --- cost ------------------------------------------------------------------------------------------------------------


def test_nothing_heavy_is_loaded() -> None:
    program = (
        "import sys; from scalegpt.cli.main import main\n"
        f"main(['plan', *{SMALL.split()!r}, '--json'])\n"
        f"main(['plan', *{LARGE.split()!r}, '--memory_gb', '12'])\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'rich', 'tiktoken'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[]"


# --- clusters and cost -----------------------------------------------------------------------------------------------


def test_a_sweep_prints_a_line_for_each_number_of_gpus(plan: Any, printed: Any) -> None:
    words = "--preset 150M_1024 --gpu 'h100 sxm' --sweep_gpus 64 --network 8xinfiniband-400g"
    found = plan(words)
    assert [point["gpus"] for point in found["sweep"]] == [1, 2, 4, 8, 16, 32, 64]
    assert found["tokens_per_step"] == 393216
    assert found["gpu"]["network_gbps"] == 3200
    text = printed(words)
    assert found["stops"] in text
    assert "strong scaling" in text
    assert "GPU hours for 1M tokens" in text
    priced = printed(f"{words} --price_per_gpu_hour 2.5")
    assert "cost of 1M tokens" in priced
    assert [line.split()[0] for line in priced.splitlines() if line[:4].strip().isdigit()] == [
        str(point["gpus"]) for point in found["sweep"]
    ]
    four = plan("--preset 150M_1024 --gpu 'h100 sxm' --gpus 4 --sweep_gpus 8")
    assert [(point["gpu"]["count"], point["gpu"]["nodes"]) for point in four["sweep"]] == [
        (1, 1),
        (2, 1),
        (4, 1),
        (4, 2),
    ]


def test_a_number_of_gpus_without_a_plan_gets_its_reason_below_the_table(printed: Any) -> None:
    text = printed("--preset 350M_1024 --gpu a100-80gb --sweep_gpus 256 --network 8xinfiniband-200g")
    (row,) = [line for line in text.splitlines() if line.startswith(" 256 ")]
    assert row.endswith("no plan")
    assert max(map(len, text.splitlines())) <= 120
    assert "\n\n256 GPUs: tokens_per_step 393216 is not a multiple of ranks 256" in text
    assert "adding GPUs pays up to 128, the most here that have a plan\n" in text
    assert "efficiency above 100%" not in text


def test_an_efficiency_above_100_percent_is_explained(printed: Any) -> None:
    text = printed("--preset Qwen3-8B --gpu rtx4090 --sweep_gpus 2")
    assert "105%" in text
    assert "note: efficiency above 100%: more GPUs each hold less of the model" in text


def test_a_preset_without_a_plan_gets_its_reason_below_the_table(printed: Any) -> None:
    text = printed("--gpu rtx4090 --gpus 8")
    (row,) = [line for line in text.splitlines() if line.startswith("shakespeare_char ")]
    assert row.endswith("no plan")
    assert "\n\nshakespeare_char: tokens_per_step 768 is not a multiple of ranks 8" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_price_gives_the_cost_of_the_run(plan: Any, printed: Any) -> None:
    words = "--preset 150M_1024 --gpu a100-40gb --gpus 2 --price_per_gpu_hour 1.5"
    choice = plan(words)["choice"]
    assert choice["cost"] == pytest.approx(2 * choice["run_hours"] * 1.5)
    assert f"{choice['cost']:,.2f} for " in printed(words)
    assert " GPU hours at 1.5, likely " in printed(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpu h100 --sweep_gpus", "sweep_gpus plans one run"), ("--preset tiny --sweep_gpus", "needs a GPU whose speed"),
        ("--preset tiny --gpu 4090 --sweep_gpus 0", "a whole number from 1 to"),
        ("--preset tiny --gpu 4090 --sweep_gpus many", "a whole number from 1 to"),
        ("--preset tiny --gpu 4090 --sweep_gpus=-3", "a whole number from 1 to"),
        ("--preset tiny --gpu 4090 --nodes 2 --sweep_gpus", "omit --nodes"),
        ("--preset tiny --launch torchrun", "give --gpu NAME or --memory_gb N too"),
        ("--preset tiny --gpu 4090 --sweep_gpus --html a", "html shows one"),
        ("--preset tiny --gpu 4090 --price_per_gpu_hour -1", "price_per_gpu_hour must be more than 0"),
        ("--preset tiny --gpu 4090 --price_per_gpu_hour free", "price_per_gpu_hour must be a number"),
        ("--preset tiny --gpu 4090 --network 400", "has no unit; write 400Gb/s"),
        ("--preset tiny --gpu 4090 --network infiniband-40g", "did you mean infiniband-400g"),
        ("--preset tiny --gpu 4090 --network roce-100g --network_gbps 5", "give one of them"),
    ],
)  # fmt: skip
def test_bad_input_about_clusters_and_prices_is_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *shlex.split(words)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
