"""Error lines of ranks that share a terminal or a log."""

import socket
import subprocess
import sys


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
