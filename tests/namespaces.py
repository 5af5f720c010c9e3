"""Machines on one machine: network namespaces, each with a name, an address and a link to the others.

Processes of different machines reach each other only over the link, as over a network. They share processors, disks and
process numbers. It needs root, and Linux with ``ip``, ``unshare`` and veth devices.
"""

import os
import shutil
import subprocess
import uuid
from pathlib import Path

BRIDGE_ADDRESS = "10.77.0.{}"
"""Addresses of the machines, from 1. Each set of machines has its own bridge, so the sets do not meet."""


def why_not() -> str | None:
    """Why machines cannot be made here; None: they can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "mount") if shutil.which(name) is None]
    if missing:
        return f"there is no {missing[0]}"
    machines = None
    try:
        machines = Machines(1)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.strip()[:200]}"
    finally:
        if machines is not None:
            machines.close()
    return None


class Machines:
    """Machines ``alpha``, ``beta`` …, with one address each, on one switch.

    Args:
        count: how many, up to 4.
        folder: where the files of host names are put; None: names do not resolve. As on Debian, a machine's own name
            has a loopback address there.
    """

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self.mark = uuid.uuid4().hex[:6]
        self.names = ["alpha", "beta", "gamma", "delta"][:count]
        self.addresses = [BRIDGE_ADDRESS.format(number) for number in range(1, count + 1)]
        self.folder = folder
        self._made: list[str] = []
        self._switch = f"sw{self.mark}"
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        for own in self.names if folder is not None else ():
            known = zip(self.addresses, self.names, strict=True)
            lines = [f"{'127.0.1.1' if name == own else address} {name}\n" for address, name in known]
            self._hosts(own).write_text("".join(["127.0.0.1 localhost\n", *lines]))

    def _make(self) -> None:
        # The switch is in a namespace of its own, so that nothing of it shows on the real machine.
        self._namespace(self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            place = self._namespace(self._place(name))
            _ip("-n", place, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", name, "master", "bridge", "up")
            _ip("-n", place, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", place, "link", "set", "lo", "up")
            _ip("-n", place, "link", "set", "eth0", "up")

    def _namespace(self, name: str) -> str:
        _ip("netns", "add", name)
        self._made.append(name)
        return name

    def _hosts(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"hosts.{name}"

    def _place(self, name: str) -> str:
        return f"{name}{self.mark}"

    def on(self, name: str, command: list[str]) -> list[str]:
        """The command line that runs a command on a machine."""
        hosts = f"mount --bind {self._hosts(name)} /etc/hosts; " if self.folder else ""
        script = f'hostname {name}; {hosts}exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            self._place(name),
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
            *command,
        ]

    def cut(self, name: str) -> None:
        """Pull a machine's cable: its link to the switch is down."""
        _ip("-n", self._switch, "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Plug the cable in again."""
        _ip("-n", self._switch, "link", "set", name, "up")

    def close(self) -> None:
        """Remove the machines; their processes must have ended."""
        while self._made:
            _ip("netns", "del", self._made.pop())


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
