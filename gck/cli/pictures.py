"""What the commands' pictures have in common."""

from __future__ import annotations

from typing import Any

from gck.errors import BackendUnavailableError

__all__ = ["canvas", "require_matplotlib"]


def require_matplotlib() -> None:
    """Raises before anything is done if the picture could not be drawn afterwards.

    Raises:
        BackendUnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"the picture needs matplotlib, which cannot be imported ({error}); "
            '`pip install ".[demo]"` in the sources of gck'
        ) from error


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """(figure, its axes), of so many inches; no display is asked for, and no state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
