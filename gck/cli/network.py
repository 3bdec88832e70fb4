"""Where workers run: each behind a slow link, or, where links cannot be made, all on bare loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from gck.cli.links import LinksUnavailableError, Node, links

__all__ = ["Network", "join"]


@dataclass(frozen=True)
class Network:
    """Where the workers run: in a node each, or, without nodes, side by side on the loopback interface."""

    nodes: list[Node]
    rate: str | None
    reason: str | None  # why there are no nodes

    def command(self, rank: int, argv: list[str]) -> list[str]:
        return self.nodes[rank].command(argv) if self.nodes else argv

    @property
    def interface(self) -> str:
        return self.nodes[0].interface if self.nodes else "lo"


@contextmanager
def join(
    workers: int, rate: str | None, reason: str | None = None, *, burst: int | None = None
) -> Iterator[Network]:
    """A network of `workers` nodes, in one way or the other.

    Args:
        rate: of each direction of each link, "100mbit"; None: no links, for that `reason`.
        burst: bytes that a link may send at once; see `gck.cli.links.links`.
    """
    with ExitStack() as stack:
        network = Network([], None, reason)
        if rate is not None:
            try:
                network = Network(stack.enter_context(links(workers, rate, burst=burst)), rate, None)
            except LinksUnavailableError as error:
                network = Network([], None, str(error))
        yield network
