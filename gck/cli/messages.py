"""How commands say what went wrong."""

from __future__ import annotations

from rich.console import Console

__all__ = ["stop"]


def stop(command: str, message: str, status: int) -> int:
    """Prints one line, "gck plan: ...", to standard error; returns `status`, for the process to end with."""
    console = Console(stderr=True)
    console.print(f"{command}:", style="bold red", end=" ")
    console.print(message, markup=False, highlight=False)
    return status
