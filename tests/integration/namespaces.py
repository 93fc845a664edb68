"""Simulated hosts with their own names and addresses on this machine, made with namespaces.

They share processes and files, except /etc/hosts, with the machine. Each exists as long as the
process that holds its namespaces.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.integration.tools import require_tools

TOOLS = ("ip", "nsenter", "unshare")
ADMINISTRATION = "198.18.0"
"""Network of the scheduler; the address of the first host ends with 1, of the second with 2."""
FABRIC = "198.18.1"
"""Network of the programs that run; the hosts' names resolve to addresses in it."""

_HOST = """\
set -e
mount --bind "$2" /etc/hosts
hostname "$1"
ip link set lo up
echo ready
exec sleep infinity
"""


def require_namespaces() -> None:
    """Skip the test if namespaces cannot be created."""
    require_tools(TOOLS, "making network namespaces")


class Hosts:
    """Several hosts and the two networks between them; the first host contains the switches.

    Attributes:
        names: Names of the hosts.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Start the hosts.

        Args:
            names: Names of the hosts.
            folder: Folder for their common /etc/hosts file.
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
        """Prefix of a command that runs it on a host, in a folder."""
        of_host = (f"--target={self._holders[name].pid}", "--net", "--mount", "--uts")
        return ("nsenter", *of_host, "env", f"--chdir={folder}")

    def run(self, name: str, *command: str) -> None:
        """Run a command on a host."""
        subprocess.run([*self.prefix(name, Path("/")), *command], check=True, timeout=60)

    def address(self, name: str) -> str:
        """A host's address on the scheduler's network."""
        return f"{ADMINISTRATION}.{self.names.index(name) + 1}"

    def disconnect(self, name: str) -> None:
        """Silently drop all traffic of a host's programs.

        The scheduler's network is not affected.
        """
        self.run(self.names[0], "ip", "link", "set", _port(FABRIC, name), "nomaster")

    def reconnect(self, name: str) -> None:
        """Undo `disconnect`."""
        switch = _interface(FABRIC)
        self.run(self.names[0], "ip", "link", "set", _port(FABRIC, name), "master", switch)

    def stop(self) -> None:
        """End the hosts; a process that still runs there keeps its namespaces alive."""
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
