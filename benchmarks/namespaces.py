"""Two hosts on one machine: network namespaces, joined by a link of limited rate.

Nothing but what is made here is touched, and all of it vanishes with the namespaces. Their
names hold the id of the process that made them, so that what a killed one has left behind is
found, and what a living one uses is let alone.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

PREFIX = "adadelta-bench"
INTERFACE = "host"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TOOLS = ("ip", "tc")


class MissingError(Exception):
    """What making namespaces takes is not there."""


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces whose `INTERFACE`s have `ADDRESSES`; removed at the end.

    The end is an exception as well, Ctrl-C, and SIGTERM.

    Raises:
        MissingError: not root, or without what it takes.
    """
    check()
    remove_leftovers()
    names = (f"{PREFIX}-{os.getpid()}-0", f"{PREFIX}-{os.getpid()}-1")
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _join(names)
        yield names
    finally:
        for name in names:
            _remove(name)
        signal.signal(signal.SIGTERM, before)


def inside(name: str, command: Sequence[str]) -> list[str]:
    """The command, to be run in a namespace."""
    return ["ip", "netns", "exec", name, *command]


def limit(gigabits: float) -> None:
    """Limit what this process's own namespace sends, in Gbit/s."""
    rate = ["rate", f"{gigabits}gbit", "burst", "1mb", "latency", "50ms"]
    _run("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", *rate)


def check() -> None:
    """Raise `MissingError` if this process cannot make namespaces."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise MissingError(f"needs {' and '.join(missing)}: install iproute2")
    if os.geteuid() != 0:
        raise MissingError("needs root, to make network namespaces")
    try:
        _run("ip", "netns", "list")
        probe = f"{PREFIX}-{os.getpid()}-probe"
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "del", probe)
    except OSError as error:
        raise MissingError(f"this system refuses network namespaces: {error}") from error


def remove_leftovers() -> None:
    """Remove the namespaces of processes that are gone, and end what still runs in them."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if name.startswith(PREFIX) and not Path(f"/proc/{owner}").exists():
            _remove(name)


def _join(names: Sequence[str]) -> None:
    ends = [word for name in names for word in ("name", INTERFACE, "netns", name)]
    first, second = ends[:4], ends[4:]
    _run("ip", "link", "add", *first, "type", "veth", "peer", *second)
    for name, address in zip(names, ADDRESSES, strict=True):
        _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
        _run("ip", "-n", name, "link", "set", INTERFACE, "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")


def _remove(name: str) -> None:
    """End what runs in a namespace, and delete it; nothing if it is gone already."""
    with suppress(OSError):
        for pid in _run("ip", "netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    with suppress(OSError):
        _run("ip", "netns", "del", name)  # its end of the link goes with it, and so the other


def _run(*command: str) -> str:
    """What the command printed.

    Raises:
        OSError: it failed, with its reason.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _terminated(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
