"""Many ranks on one GPU, for tests: each claims to be a host of its own. Times of such runs are artefacts."""

from __future__ import annotations

__all__ = ["environment"]


def environment(rank: int) -> dict[str, str]:
    """What NCCL must find in a rank's environment when it starts: ranks talk by sockets of the loopback."""
    return {
        "NCCL_HOSTID": f"gck-rank-{rank}",
        "NCCL_NET": "Socket",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "=lo",
        "NCCL_MAX_CTAS": "1",
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_RAS_ENABLE": "0",
    }
