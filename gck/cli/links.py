"""Slow links on one machine: network namespaces joined by shaped veth pairs and a bridge.

    with links(4, "100mbit") as nodes:
        subprocess.run(nodes[0].command([sys.executable, "-m", "..."]))
        nodes[0].counters().tx_bytes

Every node is a namespace with one interface, `eth0`, whose peer is a port of a bridge that has a
namespace of its own. A token bucket on either end limits both directions of every link; its queue holds
what the link carries in 50 ms, and no less than a switch has room for. TCP is CUBIC where the kernel lets
namespaces have it, and else Reno, but no other that the machine may be set to. Nothing is visible from
outside: addresses, routes and listening ports exist in these namespaces only.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gck.cli.signals import raising, shielded
from gck.errors import ArgumentError, BackendUnavailableError

__all__ = [
    "Counters",
    "LinksUnavailableError",
    "Node",
    "default_burst",
    "format_rate",
    "links",
    "measure_rate",
    "parse_rate",
    "read_counters",
    "remove_stale",
    "unavailable_reason",
]

INTERFACE = "eth0"
SUBNET = "10.77.0"
MAX_NODES = 254
NETNS_DIRECTORY = Path("/run/netns")
QUEUE = 256 << 10  # bytes, at least, for what meets in a link
FRAME, MAX_PACKET = 1514, 64 << 10  # bytes: of Ethernet; that the kernel makes at most, to cut them late
COMMAND_TIMEOUT = 20.0  # seconds; `ip` and `tc` answer in milliseconds

# gck-<pid>-<start time of that process>-<node>: the pair names one process for as long as the
# machine is up, so that leftovers of a dead run are told from a live one even when pids are reused.
_NAME = re.compile(r"gck-(\d+)-(\d+)-(\w+)")
_RATE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)([kmg]?)bit", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_CONGESTION_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"
_CLONE_NEWNET = 0x40000000


class LinksUnavailableError(BackendUnavailableError):
    """Namespaces cannot be made or shaped here: a tool, a permission or a kernel module is missing."""


@dataclass(frozen=True)
class Counters:
    """What an interface has sent and received since it came up, with the headers of packets.

    These are the kernel's, which are cut into frames with headers of their own only as they leave.
    """

    tx_bytes: int
    rx_bytes: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(self.tx_bytes - earlier.tx_bytes, self.rx_bytes - earlier.rx_bytes)


def read_counters(interface: str = INTERFACE) -> Counters:
    """Counters of an interface of the namespace that the calling process lives in."""
    folder = Path("/sys/class/net") / interface / "statistics"
    return Counters(*(int((folder / name).read_text()) for name in ("tx_bytes", "rx_bytes")))


@dataclass(frozen=True)
class Node:
    """One end of a slow link."""

    index: int
    namespace: str
    address: str
    bits_per_second: int | None
    interface: str = INTERFACE

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` inside this namespace, as the same process."""
        return ["ip", "netns", "exec", self.namespace, *argv]

    def counters(self) -> Counters:
        """Counters of this node's interface, read from outside."""
        shown = _run("ip", "-n", self.namespace, "-j", "-s", "link", "show", "dev", self.interface)
        stats = json.loads(shown)[0]["stats64"]
        return Counters(stats["tx"]["bytes"], stats["rx"]["bytes"])

    def plug(self, plugged: bool) -> None:
        """Puts the cable into the switch, or pulls it out: nothing is delivered, and nobody is told."""
        switch = self.namespace.rpartition("-")[0] + "-switch"
        _run("ip", "-n", switch, "link", "set", f"port{self.index}", "up" if plugged else "down")

    def congestion_control(self) -> str:
        """The TCP of the node's connections: "cubic" or "reno"."""
        return _run("ip", "netns", "exec", self.namespace, "cat", _CONGESTION_CONTROL).strip()

    def tcp_socket(self) -> socket.socket:
        """A TCP socket that lives in this namespace; the calling thread does not move there."""
        libc = ctypes.CDLL(None, use_errno=True)
        # A socket belongs for good to the namespace that its thread was in when it was created.
        with (
            (NETNS_DIRECTORY / self.namespace).open() as there,
            Path("/proc/thread-self/ns/net").open() as here,
        ):
            if libc.setns(there.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.namespace}")
            try:
                return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            finally:
                if libc.setns(here.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns back")


def parse_rate(text: str) -> int:
    """Bits a second of "100mbit", "1gbit", "250kbit" (powers of ten, as tc reads them).

    Raises:
        ArgumentError: not a positive number with such a unit.
    """
    match = _RATE.fullmatch(text.strip())
    bits = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if bits < 8000:
        raise ArgumentError(f"parse_rate: rate must be like 100mbit, 1gbit or 250kbit, got {text!r}")
    return bits


def format_rate(bits_per_second: int) -> str:
    """A rate for people: "100 Mbit/s"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if bits_per_second >= size:
            return f"{bits_per_second / size:g} {unit}bit/s"
    return f"{bits_per_second} bit/s"


def default_burst(bits_per_second: int) -> int:
    """Bytes of burst that let tbf reach a rate: what the link carries in 4 ms, at least 8 KiB.

    The bucket is refilled when a timer fires, so a smaller one runs empty between two ticks of a slow
    timer and the link stays below its rate.
    """
    return max(8 << 10, bits_per_second // 8 // 250)


def unavailable_reason() -> str | None:
    """Why `links` cannot work here, or None; tries for real, with one node that is gone again after."""
    try:
        with links(1, "100mbit"):
            return None
    except LinksUnavailableError as error:
        return str(error)


@contextmanager
def links(
    count: int, rate: str | Sequence[str | None] | None = "100mbit", *, burst: int | None = None
) -> Iterator[list[Node]]:
    """Makes `count` nodes on one switch; everything is removed on exit, however it comes about.

    Within it SIGTERM and SIGHUP raise `gck.cli.signals.Terminated`. A process killed by SIGKILL leaves
    its namespaces behind; the next call removes them. Programs started in a node must have ended before
    the exit: a namespace lives as long as a process in it.

    Args:
        count: nodes, in [1, 254]; node i has the address 10.77.0.(i + 1).
        rate: of each direction of each link, "100mbit", or one for each node; None: not shaped.
        burst: bytes that a link may send at once; default: `default_burst` of its rate.

    Raises:
        ArgumentError: count or rate is not as above.
        LinksUnavailableError: not possible on this machine; the text says why.
    """
    if not 1 <= count <= MAX_NODES:
        raise ArgumentError(f"links: count must be in [1, {MAX_NODES}], got {count}")
    rates = [rate] * count if rate is None or isinstance(rate, str) else list(rate)
    if len(rates) != count:
        raise ArgumentError(f"links: one rate or {count} of them are needed, got {len(rates)}")
    bits = [None if text is None else parse_rate(text) for text in rates]
    _require_tools()
    remove_stale()
    prefix = f"gck-{os.getpid()}-{_start_time(os.getpid())}-"
    if any(name.startswith(prefix) for name in _namespaces()):
        raise ArgumentError("links: this process already has links; leave the first ones before")
    nodes = [Node(i, f"{prefix}{i}", f"{SUBNET}.{i + 1}", bits[i]) for i in range(count)]
    with raising():
        try:
            _build(f"{prefix}switch", nodes, burst)
            yield nodes
        finally:
            with shielded():
                _remove(prefix)


def remove_stale() -> list[str]:
    """Removes namespaces of runs that died before they could; returns their names."""
    stale = []
    for name in _namespaces():
        match = _NAME.fullmatch(name)
        if match and _start_time(int(match[1])) != int(match[2]):
            # Another process may be removing it at this moment.
            with suppress(LinksUnavailableError):
                _run("ip", "netns", "del", name)
                stale.append(name)
    return stale


def measure_rate(sender: Node, receiver: Node, nbytes: int, *, timeout: float = 30.0) -> float:
    """Bits a second at which `nbytes` of TCP payload travel from one node to the other.

    Give it many times the burst: that much is sent at once, whatever the rate.

    Raises:
        OSError: the connection failed, or took longer than `timeout` seconds.
    """
    chunk = bytes(1 << 16)
    with receiver.tcp_socket() as listener, sender.tcp_socket() as source:
        for end in (listener, source):
            end.settimeout(timeout)
        listener.bind((receiver.address, 0))
        listener.listen(1)
        source.connect(listener.getsockname())
        sink, _ = listener.accept()

        def send() -> None:
            # A receiver that gave up closes the connection; its own exception says so.
            try:
                for start in range(0, nbytes, len(chunk)):
                    source.sendall(chunk[: nbytes - start])
            except OSError:
                pass

        with sink:
            sink.settimeout(timeout)
            thread = threading.Thread(target=send, daemon=True)
            started = time.perf_counter()
            thread.start()
            received = 0
            while received < nbytes:
                got = len(sink.recv(len(chunk)))
                if not got or time.perf_counter() - started > timeout:
                    raise TimeoutError(f"measure_rate: {received} of {nbytes} bytes arrived in {timeout} s")
                received += got
            elapsed = time.perf_counter() - started
        thread.join()
    return nbytes * 8 / elapsed


def _build(switch: str, nodes: list[Node], burst: int | None) -> None:
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "switch", "up")
    for node in nodes:
        port = f"port{node.index}"
        _run("ip", "netns", "add", node.namespace)
        _set_congestion_control(node.namespace)
        ends = ("netns", node.namespace, "type", "veth", "peer", "name", port, "netns", switch)
        _run("ip", "link", "add", node.interface, *ends)
        for namespace, interface in ((node.namespace, node.interface), (switch, port)):
            if Path("/proc/sys/net/ipv6").exists():
                # No IPv6 address, so that the kernel sends nothing of its own: the counters are ours.
                _run("ip", "-n", namespace, "link", "set", interface, "addrgenmode", "none")
            if node.bits_per_second is not None:
                size = default_burst(node.bits_per_second) if burst is None else burst
                limit = size + max(QUEUE, node.bits_per_second // 8 // 20)
                bucket = ("rate", f"{node.bits_per_second}bit", "burst", f"{size}b", "limit", f"{limit}b")
                _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *bucket)
                # A packet beyond the burst would be cut into frames by tbf: more work, and more answers.
                with suppress(LinksUnavailableError):  # iproute2 before 4.15
                    largest = str(min(MAX_PACKET, max(size // 2, FRAME)))
                    _run("ip", "-n", namespace, "link", "set", interface, "gso_max_size", largest)
        _run("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
        _run("ip", "-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.interface)
        _run("ip", "-n", node.namespace, "link", "set", "lo", "up")
        _run("ip", "-n", node.namespace, "link", "set", node.interface, "up")


def _set_congestion_control(namespace: str) -> None:
    """CUBIC, Linux's own, or Reno where the kernel refuses it to namespaces, but never a machine's default.

    Defaults differ, and BBR, which some machines have, leaves up to a fifth of a slow link unused.
    """
    # Reno is in every kernel, and allowed unless somebody has taken it from tcp_allowed_congestion_control.
    script = f"echo cubic 2> /dev/null > {_CONGESTION_CONTROL} || echo reno > {_CONGESTION_CONTROL}"
    _run("ip", "netns", "exec", namespace, "sh", "-c", script)


def _remove(prefix: str) -> None:
    failures = []
    for name in _namespaces():
        if name.startswith(prefix):
            try:
                _run("ip", "netns", "del", name)
            except LinksUnavailableError as error:
                failures.append(str(error))
    if failures:
        raise LinksUnavailableError("; ".join(failures))


def _namespaces() -> list[str]:
    return sorted(path.name for path in NETNS_DIRECTORY.iterdir()) if NETNS_DIRECTORY.is_dir() else []


def _start_time(pid: int) -> int | None:
    """Clock ticks after boot at which a process started; None when there is none."""
    try:
        # The name in parentheses may hold anything; field 22 is the 20th after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None


def _require_tools() -> None:
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise LinksUnavailableError(f"links: `{tool}` is not installed (package iproute2)")


def _run(*argv: str) -> str:
    # A session of its own: Ctrl-C in a terminal must not kill `ip` in the middle of a clean-up.
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise LinksUnavailableError(
            f"links: `{' '.join(argv)}` did not end in {COMMAND_TIMEOUT:.0f} s"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        # Root in a container often lacks them too.
        refused = re.search("not permitted|denied", said) is not None
        hint = "; namespaces need root with CAP_SYS_ADMIN and CAP_NET_ADMIN" if refused else ""
        raise LinksUnavailableError(f"links: `{' '.join(argv)}` failed: {said}{hint}")
    return done.stdout
