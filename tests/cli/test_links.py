import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gck.cli import links as module
from gck.cli.links import (
    LinksUnavailableError,
    default_burst,
    format_rate,
    links,
    measure_rate,
    parse_rate,
    remove_stale,
    unavailable_reason,
)
from gck.cli.signals import Terminated
from gck.errors import ArgumentError

REASON = unavailable_reason()
needs_links = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def ours() -> list[str]:
    """Namespaces that this process made."""
    return [name for name in module._namespaces() if name.startswith(f"gck-{module.os.getpid()}-")]


@pytest.mark.parametrize(
    ("text", "bits"),
    [("100mbit", 10**8), ("1gbit", 10**9), ("1.5Gbit", 15 * 10**8), ("250kbit", 250_000), ("9000bit", 9000)],
)
def test_parse_rate(text: str, bits: int) -> None:
    assert parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "fast", "100", "100mb", "-1mbit", "0mbit", "100mbit; reboot"])
def test_parse_rate_quotes_what_it_refuses(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"parse_rate: rate must be like .* got"):
        parse_rate(text)


def test_format_rate() -> None:
    rates = (10**8, 15 * 10**8, 250_000, 900)
    assert [format_rate(bits) for bits in rates] == ["100 Mbit/s", "1.5 Gbit/s", "250 kbit/s", "900 bit/s"]


def test_default_burst_is_four_milliseconds() -> None:
    assert default_burst(10**9) == 500_000
    assert default_burst(10**6) == 8192


@pytest.mark.parametrize(("count", "rate"), [(0, "1gbit"), (255, "1gbit"), (3, ["1gbit", "1gbit"])])
def test_wrong_arguments(count: int, rate: str | list[str | None]) -> None:
    with pytest.raises(ArgumentError, match="links: "), links(count, rate):
        pass


@needs_links
def test_tcp_is_never_the_machines_default() -> None:
    with links(2, "10mbit") as nodes, nodes[0].tcp_socket() as source:
        used = source.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
        assert used == nodes[0].congestion_control()
        assert {node.congestion_control() for node in nodes} <= {"cubic", "reno"}


@needs_links
def test_counters_and_rates() -> None:
    with links(3, ["100mbit", "100mbit", None]) as nodes:
        assert len(ours()) == 4  # with the switch
        before = [node.counters() for node in nodes]
        assert [count.tx_bytes for count in before] == [0, 0, 0]
        sent = 6_000_000
        rate = measure_rate(nodes[0], nodes[1], sent)
        first, second, third = (node.counters() - count for node, count in zip(nodes, before, strict=True))
        # The payload's share of a shaped link is 95 %: the rest is headers.
        assert 85e6 < rate < 101e6
        assert sent < first.tx_bytes < 1.1 * sent
        assert sent < second.rx_bytes < 1.1 * sent
        assert third.tx_bytes < 1000
        # The slower end decides, in the other direction too.
        assert 85e6 < measure_rate(nodes[2], nodes[0], sent) < 101e6
    assert ours() == []


@needs_links
def test_program_in_a_node_sees_only_its_link() -> None:
    with links(2, "1gbit") as nodes:
        shown = subprocess.run(
            nodes[1].command(["ip", "-br", "-4", "addr"]), capture_output=True, text=True, check=True
        ).stdout
    assert "10.77.0.2/24" in shown
    assert {line.split()[0].partition("@")[0] for line in shown.splitlines()} == {"lo", "eth0"}


@needs_links
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_remove_everything(number: signal.Signals) -> None:
    expected = KeyboardInterrupt if number == signal.SIGINT else Terminated
    handler = signal.getsignal(number)
    with pytest.raises(expected), links(2):
        signal.raise_signal(number)
    assert ours() == []
    assert signal.getsignal(number) is handler


@needs_links
def test_failure_while_building_removes_what_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._run

    def run(*argv: str) -> str:
        if argv[0] == "tc":
            raise LinksUnavailableError("links: no tbf")
        return real(*argv)

    monkeypatch.setattr(module, "_run", run)
    with pytest.raises(LinksUnavailableError, match="no tbf"), links(2):
        pass
    assert ours() == []


@needs_links
def test_leftovers_of_a_killed_process_are_removed() -> None:
    code = "import os\nfrom gck.cli.links import links\nwith links(2) as nodes:\n"
    code += " print(*(node.namespace for node in nodes), flush=True)\n os.kill(os.getpid(), 9)"
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    left = killed.communicate(timeout=60)[0].split()
    assert killed.returncode == -signal.SIGKILL
    assert len(left) == 2
    with links(1):
        assert not set(left) & set(module._namespaces())
        assert not set(remove_stale()) & set(ours())
        assert len(ours()) == 2  # a live process keeps its own


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LinksUnavailableError, match="`ip` is not installed"), links(2):
        pass


def test_refusal_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for tool in ("ip", "tc"):
        (tmp_path / tool).write_text(
            "#!/bin/sh\necho 'RTNETLINK answers: Operation not permitted' >&2\nexit 2\n"
        )
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = unavailable_reason()
    assert reason is not None
    assert "Operation not permitted; namespaces need root" in reason
