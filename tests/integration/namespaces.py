"""Hosts with names and addresses of their own on this machine, by namespaces.

They share processes and files with the machine, but for /etc/hosts, and end with their holders.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.integration.tools import require_tools

TOOLS = ("ip", "nsenter", "unshare")
ADMINISTRATION = "198.18.0"
"""Network of the scheduler; the first host's address ends with 1, the second's with 2."""
FABRIC = "198.18.1"
"""Network of the programs that run, where the hosts' names lead."""

_HOST = """\
set -e
mount --bind "$2" /etc/hosts
hostname "$1"
ip link set lo up
echo ready
exec sleep infinity
"""


def require_namespaces() -> None:
    """Skip where there are none."""
    require_tools(TOOLS, "making network namespaces")


class Hosts:
    """Some hosts and the two networks between them, whose switches the first host holds.

    Attributes:
        names: Of the hosts.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Start the hosts.

        Args:
            names: What they are called.
            folder: Where to put the file that names them to each other.
        """
        self.names = tuple(names)
        self._file = folder / "hosts"
        lines = [f"{FABRIC}.{number}\t{name}" for number, name in enumerate(names, 1)]
        self._file.write_text("\n".join(["127.0.0.1\tlocalhost", *lines, ""]))
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in names:
                self._start(name)
            for network in (ADMINISTRATION, FABRIC):
                self._connect(network)
        except BaseException:
            self.stop()
            raise

    def _start(self, name: str) -> None:
        holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "sh", "-c", _HOST, "sh", name, self._file],
            stdout=subprocess.PIPE,
        )
        self._holders[name] = holder
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n", f"{name} did not start"

    def _connect(self, network: str) -> None:
        first = self.names[0]
        switch = _interface(network)
        self.run(first, "ip", "link", "add", switch, "type", "bridge")
        self.run(first, "ip", "addr", "add", f"{network}.1/24", "dev", switch)
        self.run(first, "ip", "link", "set", switch, "up")
        for number, name in enumerate(self.names[1:], 2):
            port, pid = _port(network, name), str(self._holders[name].pid)
            peer = ("peer", "name", switch, "netns", pid)
            self.run(first, "ip", "link", "add", port, "type", "veth", *peer)
            self.run(first, "ip", "link", "set", port, "master", switch, "up")
            self.run(name, "ip", "addr", "add", f"{network}.{number}/24", "dev", switch)
            self.run(name, "ip", "link", "set", switch, "up")

    def prefix(self, name: str, folder: Path) -> tuple[str, ...]:
        """Words that have the command behind them run on a host, in a folder."""
        of_host = (f"--target={self._holders[name].pid}", "--net", "--mount", "--uts")
        return ("nsenter", *of_host, "env", f"--chdir={folder}")

    def run(self, name: str, *command: str) -> None:
        """Run a command on a host."""
        subprocess.run([*self.prefix(name, Path("/")), *command], check=True, timeout=60)

    def address(self, name: str) -> str:
        """A host's address on the scheduler's network."""
        return f"{ADMINISTRATION}.{self.names.index(name) + 1}"

    def cut(self, name: str) -> None:
        """Lose what a host's programs send and get, without a word to either side.

        The scheduler's network stays as it is.
        """
        self.run(self.names[0], "ip", "link", "set", _port(FABRIC, name), "nomaster")

    def mend(self, name: str) -> None:
        """Undo `cut`."""
        switch = _interface(FABRIC)
        self.run(self.names[0], "ip", "link", "set", _port(FABRIC, name), "master", switch)

    def stop(self) -> None:
        """End the hosts; what still runs there keeps the rest of them alive."""
        for holder in self._holders.values():
            holder.kill()
            holder.wait()
            assert holder.stdout is not None
            holder.stdout.close()
        self._file.unlink(missing_ok=True)


def _interface(network: str) -> str:
    return {ADMINISTRATION: "admin", FABRIC: "fabric"}[network]


def _port(network: str, name: str) -> str:
    return f"{_interface(network)}-{name}"
