"""Every exception that the library raises on purpose; the command line adds its own beside its code.

All derive from `GckError`, so ``except gck.errors.GckError`` catches whatever gck reports; each also
derives from the built-in class a caller would expect (ValueError, TypeError, RuntimeError). They are
raised before anything is written, or after everything was put back: gradients and residuals are
unchanged after any of them.
"""

__all__ = [
    "AllocationError",
    "ArgumentError",
    "AutogradError",
    "BackendUnavailableError",
    "CollectiveError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "CorruptPayloadError",
    "DeviceMismatchError",
    "DtypeError",
    "GckError",
    "GroupUnusableError",
    "LayoutError",
    "PayloadVersionError",
    "PeerLostError",
    "ShapeMismatchError",
    "StateMismatchError",
    "WaitTimeoutError",
]


class GckError(Exception):
    """Base of every error raised by gck."""


class ArgumentError(GckError, ValueError):
    """An argument has a value that the function does not accept."""


class DtypeError(ArgumentError, TypeError):
    """A tensor or array has a dtype, or an argument a type, that the function does not accept."""


class ShapeMismatchError(ArgumentError):
    """Two tensors that must have the same number of elements do not."""


class DeviceMismatchError(ArgumentError):
    """Two tensors that must be on one device are not, or no kernel exists for that device."""


class LayoutError(ArgumentError):
    """A tensor is not contiguous, is read-only, or overlaps another that it must not overlap."""


class AutogradError(ArgumentError):
    """A tensor is part of a recorded autograd graph; compression is not differentiable."""


class AllocationError(GckError, MemoryError):
    """A result has more elements than fit into memory, such as a payload from elsewhere may claim."""


class BackendUnavailableError(GckError, RuntimeError):
    """The compiled module, Triton or another optional component is missing; the text says what to do."""


class CorruptPayloadError(GckError, ValueError):
    """A payload contradicts itself: indices out of range or out of order, wrong lengths.

    Attributes:
        on_all_ranks: raised by a collective on every rank, so that the group is in step.
    """

    on_all_ranks = False


class PayloadVersionError(CorruptPayloadError):
    """A message is of a version of the wire format that this gck cannot read; the text names both."""


class StateMismatchError(GckError, ValueError):
    """A saved residual state does not fit the model, the compressor or the world that loads it."""


class CollectiveError(GckError, RuntimeError):
    """A collective failed; residuals and gradients were put back."""


class CollectiveMismatchError(CollectiveError):
    """Ranks called different collectives, or the same one with different configurations."""


class CollectiveTimeoutError(CollectiveError, TimeoutError):
    """A peer did not answer within the group's timeout."""


class PeerLostError(CollectiveError, ConnectionError):
    """A peer closed its connection or died."""


class GroupUnusableError(CollectiveError):
    """An earlier failure left the group in an unknown state; make a new one."""


class WaitTimeoutError(GckError, TimeoutError):
    """An asynchronous collective did not end within the timeout of `wait`; it goes on, nothing is spoilt."""
