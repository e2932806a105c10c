"""Machines on one machine, for tests: each with an address, a host name and process numbers of its own, and no loopback
that leads to another. A switch connects them, which can delay, lose and cut.

A machine is a set of Linux namespaces. The switch is a process that passes on the frames of their TAP devices, as `tc`
needs modules that a kernel may lack (netem). All ends with the process that made it, also when that is killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

_PREFIX = "10.77.0."
_ROOT = Path(__file__).parents[2]
_MTU = 9000
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x2, 0x1000
# It is process 1, which has to wait for what others leave behind.
_INIT = """
hostname "$0" && ip link set lo up && echo ready
trap : CHLD
while :; do sleep 3600 & wait $!; done
"""


def missing() -> str:
    """Why there can be no such machines here; "" if there can be."""
    if lacking := [name for name in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]:
        return f"{', '.join(lacking)} not found (Debian: apt-get install iproute2 util-linux)"
    if not os.access("/dev/net/tun", os.W_OK):
        return "/dev/net/tun cannot be opened"
    if subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        return "no permission to make namespaces (run as root)"
    return ""


class Network:
    """Machines by their names. A context manager."""

    def __init__(self, names: list[str]) -> None:
        self.addresses = {name: f"{_PREFIX}{number}" for number, name in enumerate(names, start=1)}
        self._machines: dict[str, subprocess.Popen] = {}
        self._inits: dict[str, int] = {}
        self._switch: subprocess.Popen | None = None

    def __enter__(self) -> Network:
        try:
            for name in self.addresses:
                self._boot(name)
            self._switch = subprocess.Popen(
                [sys.executable, __file__, *(f"{name}={pid}" for name, pid in self._inits.items())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._switch.stdout is not None and self._switch.stdout.readline() == "ready\n"
            for name, address in self.addresses.items():
                for line in (f"addr add {address}/24 dev eth0", f"link set eth0 mtu {_MTU} up"):
                    subprocess.run([*self.enter(name), "ip", *line.split()], check=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._machines):
            self.power_off(name)
        if self._switch:
            self._switch.kill()
            self._switch.communicate()

    def enter(self, name: str) -> list[str]:
        """Words before a command that is to run on a machine."""
        return ["nsenter", "--target", str(self._inits[name]), "--net", "--uts", "--pid", "--mount", f"--wdns={_ROOT}"]

    def power_off(self, name: str) -> None:
        """A machine is gone with all its processes; nobody is told."""
        self._machines[name].kill()
        self._machines.pop(name).communicate()

    def set(self, name: str, *, cut: bool = False, delay: float = 0.0, loss: float = 0.0) -> None:
        """How the switch treats the frames from and to a machine: cut, delayed by seconds, lost with a probability."""
        assert self._switch and self._switch.stdin
        self._switch.stdin.write(f"{name} {int(cut)} {delay} {loss}\n")
        self._switch.stdin.flush()

    def _boot(self, name: str) -> None:
        flags = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *flags, "bash", "-c", _INIT, name]
        machine = self._machines[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert machine.stdout is not None and machine.stdout.readline() == "ready\n"
        self._inits[name] = int(Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()[0])


def _tap(pid: int) -> int:
    """A TAP device eth0 in the network of a process."""
    with open(f"/proc/{pid}/ns/net") as network:
        if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI))
    return device


def _run_switch(ports: dict[str, int]) -> None:
    """Passes frames on until stdin ends; its lines are those of `Network.set`."""
    names = {device: name for name, device in ports.items()}
    rules = dict.fromkeys(ports, (False, 0.0, 0.0))
    learned: dict[bytes, int] = {}
    waiting: list[tuple[float, int, int, bytes]] = []  # when, number, to, frame
    numbers, chance = itertools.count(), random.Random(0)
    poll = select.poll()
    for device in (0, *names):
        poll.register(device, select.POLLIN)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) * 1000 if waiting else None
        for device, _ in poll.poll(pause):
            if device == 0:
                if not (line := sys.stdin.readline()):
                    return
                name, cut, delay, loss = line.split()
                rules[name] = (bool(int(cut)), float(delay), float(loss))
                continue
            try:
                frame = os.read(device, 65536)
            except BlockingIOError:
                continue
            learned[frame[6:12]] = device
            to = learned.get(frame[:6])
            for target in [to] if to is not None else [other for other in names if other != device]:
                both = rules[names[device]], rules[names[target]]
                if not any(cut or chance.random() < loss for cut, _, loss in both):
                    when = time.monotonic() + sum(delay for _, delay, _ in both)
                    heapq.heappush(waiting, (when, next(numbers), target, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(waiting)
            try:
                os.write(target, frame)
            except OSError:  # that machine is gone, or its queue is full
                continue


if __name__ == "__main__":
    made = {name: _tap(int(pid)) for name, _, pid in (word.partition("=") for word in sys.argv[1:])}
    print("ready", flush=True)
    _run_switch(made)
