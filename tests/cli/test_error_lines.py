"""Error lines of ranks that share a terminal or a log."""

import socket
import subprocess
import sys

from ranks import rank_environment


def test_an_error_is_one_write_so_that_ranks_lines_do_not_mix() -> None:
    """Through a datagram socket each write arrives alone; ``-u`` is how torchrun and DeepSpeed start Python."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.settimeout(60)
        job = subprocess.Popen([sys.executable, "-u", "-m", "scalegpt", "nosuch"], stderr=theirs.fileno())
        line = ours.recv(65536).decode()
        assert job.wait(60) == 2
    assert line.startswith("scalegpt: error: unknown command 'nosuch'")
    assert line.endswith("\n")


def test_a_rank_that_prints_nothing_leaves_the_first_rank_time_to_print() -> None:
    """A launcher ends all ranks when the first exits: the line must be out by then, whichever rank starts first."""
    command = [sys.executable, "-m", "scalegpt", "nosuch"]
    silent, speaking = (rank_environment(rank, 2, port=29999) for rank in (1, 0))
    with subprocess.Popen(command, env=silent, stderr=subprocess.PIPE, text=True) as second:
        first = subprocess.run(command, env=speaking, capture_output=True, text=True, check=False)
        assert second.poll() is None
        assert second.communicate()[1] == ""
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.startswith("scalegpt: error: unknown command 'nosuch'")


def test_a_package_that_is_missing_is_named() -> None:
    program = (
        "import importlib.abc, sys\n"
        "class Hidden(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from scalegpt.cli.main import main\n"
        "sys.exit(main(['sample', 'runs/none']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "scalegpt sample: error: torch is not installed; install it with pip install torch\n"
