"""The script that completes commands: what bash and fish offer with it, and that it knows every flag."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt.cli.completion import SHELLS, card_words, whole_parser
from scalegpt.cli.main import COMMANDS, main
from scalegpt.cli.parser import Parser, shape_of
from scalegpt.cli.train import main as train
from scalegpt.hardware.gpus import catalogue, find_card

BASH = """
source "$1"; shift
COMP_WORDS=(scalegpt "$@"); COMP_CWORD=$#; COMPREPLY=()
_shtab_scalegpt
printf '%s\\n' "${COMPREPLY[@]}"
"""

LINES = [
    ("", set(COMMANDS)),
    ("tra", {"train"}),
    ("train --micro", {"--micro_batch"}),
    ("train --preset 150M_", {"150M_1024", "150M_2048"}),
    ("train --preset Qwen3-0", {"Qwen3-0.6B"}),
    ("plan --preset tiny --gpu a100-4", {"a100-40gb"}),
    ("plan --gpu rtx409", {"rtx4090", "rtx4090-d"}),
    ("train --recompute ", {"none", "selective", "full", "auto"}),
    ("data pre", {"prepare"}),
    ("checkpoint verify --j", {"--json"}),
    ("presets tiny sma", {"small"}),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shell → the script that the command prints for it."""
    paths = {}
    for shell in SHELLS:
        paths[shell] = tmp_path_factory.mktemp("completion") / shell
        done = subprocess.run([sys.executable, "-m", "scalegpt", "completion", shell], capture_output=True, check=True)
        paths[shell].write_bytes(done.stdout)
    return paths


@pytest.mark.parametrize(("line", "offered"), LINES)
def test_bash(scripts: dict[str, Path], line: str, offered: set[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    words = [bash, "-c", BASH, "bash", str(scripts["bash"]), *line.split(" ")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert offered <= set(done.stdout.split()), done.stderr
    assert all(word.startswith(line.split(" ")[-1]) for word in done.stdout.split())


def test_fish(scripts: dict[str, Path]) -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("fish is not installed")
    for line, offered in LINES:
        words = [fish, "-c", 'source $argv[1]; complete -C "scalegpt $argv[2]"', str(scripts["fish"]), line]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert offered <= {each.split("\t")[0] for each in done.stdout.splitlines()}, line


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_reads_the_script(scripts: dict[str, Path], shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([program, "-n", str(scripts[shell])], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_flag_of_training_is_there() -> None:
    shape = shape_of(lambda words: train(words))
    assert isinstance(shape, Parser)
    commands = whole_parser()._subparsers
    assert commands is not None
    known = commands._group_actions[0].choices
    assert isinstance(known, dict)
    assert known.keys() == COMMANDS.keys()
    assert known["train"]._option_string_actions.keys() == shape._option_string_actions.keys()


def test_every_name_of_a_card_is_understood() -> None:
    for card in catalogue():
        assert {find_card(word).name for word in card_words(card)} == {card.name}


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "bash" in capsys.readouterr().err
