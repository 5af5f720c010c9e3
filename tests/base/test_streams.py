"""Standard streams that are missing, closed or full do not end what prints to them."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scalegpt.system.streams import LastingStream, lasting

ROOT = Path(__file__).resolve().parents[2]


class Failing(io.StringIO):
    """A stream whose disk is full for some writes."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def write(self, text: str) -> int:
        if self.left:
            self.left -= 1
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_what_cannot_be_written_is_dropped_and_reported_once() -> None:
    broken, fallback = Failing(2), io.StringIO()
    stream = LastingStream(broken, fallback)
    for number in range(3):
        assert stream.write(f"line {number}\n") == 7
        stream.flush()
    assert broken.getvalue() == "line 2\n"  # there is room again
    assert stream.lost == "No space left on device"
    assert fallback.getvalue().count("No space left on device") == 1


def test_it_is_the_stream_for_all_else() -> None:
    stream = lasting(Failing(0))
    assert lasting(stream) is stream  # type: ignore[arg-type]
    assert stream.lost is None
    print("word", file=stream)  # type: ignore[arg-type]
    assert stream.getvalue() == "word\n"
    assert not stream.isatty()


def run(code: str, **streams: Any) -> int:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, **streams).returncode


PRINTS = """\
import sys
from scalegpt.system.streams import outlast_standard_streams, lost_output
outlast_standard_streams()
for _ in range(3): print("x" * 5000, flush=True)
print("left in the buffer")
sys.exit(7 if lost_output() else 8)
"""


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")


@needs_dev_full
def test_a_full_disk_behind_standard_output_changes_no_exit_status() -> None:
    with Path("/dev/full").open("w") as full:
        assert run(PRINTS, stdout=full, stderr=full) == 7
    assert run(PRINTS, stdout=subprocess.DEVNULL) == 8


@needs_dev_full
@pytest.mark.parametrize(
    ("variables", "reports"),
    [
        ("", True),
        ("RANK=1", True),  # half set: no launcher starts a rank so
        ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2", True),
        ("RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2", False),
    ],
)
def test_of_several_ranks_the_first_reports_lost_output(variables: str, reports: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if "RANK" not in key and "WORLD_SIZE" not in key}
    environment |= dict(word.split("=") for word in variables.split())
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, timeout=120
        )
    assert (b"standard output cannot be written" in done.stderr) == reports


def test_a_reader_that_has_gone_changes_no_exit_status() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert run(PRINTS, stdout=writer, stderr=subprocess.DEVNULL) == 7
    os.close(writer)


@pytest.mark.parametrize("closed", [(1,), (1, 2), (0, 1, 2)])
def test_closed_streams_are_the_null_device_and_never_a_file_of_ours(tmp_path: Path, closed: tuple[int, ...]) -> None:
    code = (
        "import os, sys\n"
        "from scalegpt.system.streams import open_missing\n"
        "open_missing()\n"
        f"file = open({str(tmp_path / 'data')!r}, 'wb')\n"
        "assert file.fileno() > 2\n"
        "print('word', flush=True); print('word', file=sys.stderr, flush=True); os.write(1, b'raw')\n"
        "sys.exit(7)\n"
    )
    shut = "".join(f" {descriptor}>&-" for descriptor in closed)
    shell = f'{sys.executable} -c "$CODE" {shut}'
    done = subprocess.run(["sh", "-c", shell], cwd=ROOT, env={**os.environ, "CODE": code}, timeout=120)
    assert done.returncode == 7
    assert (tmp_path / "data").read_bytes() == b""


FLAGS = {
    "tokenizer": "byte", "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "micro_batch": 4, "tokens_per_step": 64,
    "max_iters": 3, "precision": "fp32", "compile": "off", "sample_tokens": 0, "eval_every": 0, "eval_tokens": 100,
    "device": "cpu", "log_every": 1, "input_file": "text.txt", "model_name": "run",
}  # fmt: skip


@needs_dev_full
@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["> /dev/full 2>&1", ">&- 2>&-"])
def test_a_run_trains_to_its_end_without_its_output(tmp_path: Path, redirection: str) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh\n" * 200)
    flags = [f"--{key}={value}" for key, value in FLAGS.items()]
    command = [sys.executable, "-m", "scalegpt", "train", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SCALEGPT_CACHE": str(tmp_path / "c")}
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command], cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0
    status = (tmp_path / "runs" / "run" / "run_status.json").read_text()
    assert '"state": "finished"' in status
    assert ("No space left on device" in status) == ("full" in redirection)
