"""What a failure of torch.distributed means.

torch reports failures as RuntimeError with a text; gloo's texts, seen with torch 2.13, are:

    a peer's process ended    "... Connection closed by peer [address]", "Connection reset by peer",
                              "Broken pipe", "Connection refused"; at once, on every operation
    our wait expired          "Operation timed out!"
    the group's own timeout   "Timed out waiting 3000ms for recv operation to complete" (or send)
    any call after a timeout  "Application timeout caused pair closure"; of any operation of this rank
"""

from __future__ import annotations

import re

from gck.errors import CollectiveError, CollectiveTimeoutError, PeerLostError

__all__ = ["typed_error"]

TIMEOUT_TEXT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)
PEER_TEXT = re.compile(
    r"closed by peer|reset by peer|closed by remote|broken pipe"
    r"|connection (was )?(refused|closed|reset|aborted)|remote process exited|socket closed"
    r"|peer .*(closed|lost)|ncclRemoteError|unexpectedly exited",
    re.IGNORECASE,
)


def typed_error(where: str, error: BaseException, elapsed: float) -> CollectiveError | None:
    """The gck error for what torch raised, or None where it is no failure of the group."""
    if not isinstance(error, RuntimeError | OSError):
        return None
    text = str(error).partition(". This is typically caused")[0].strip()
    if PEER_TEXT.search(text) or isinstance(error, ConnectionError):
        return PeerLostError(f"{where}: a peer was lost after {elapsed:.1f} s ({text})")
    if "pair closure" in text:
        return CollectiveTimeoutError(f"{where}: another operation had no answer in time ({text})")
    if TIMEOUT_TEXT.search(text):
        return CollectiveTimeoutError(f"{where}: no answer within {elapsed:.1f} s ({text})")
    return CollectiveError(f"{where}: failed after {elapsed:.1f} s ({text})")
