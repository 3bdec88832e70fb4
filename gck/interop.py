"""Arrays of other libraries, borrowed as tensors: NumPy, CuPy and whatever speaks DLPack.

Nothing is copied (but a read-only NumPy array, which torch cannot represent), so an in-place result
lands in the caller's array. CuPy arrays are worked on in CuPy's current stream.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.utils.dlpack
from torch import Tensor

from gck.errors import DtypeError, LayoutError
from gck.values import shown

__all__ = ["borrowed", "stream_at"]

# Of DLPack's dlpack.h.
CPU = 1  # kDLCPU
VERSIONED = b"dltensor_versioned"
READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY


@contextmanager
def borrowed(function: str, mutable: tuple[str, ...], **arrays: Any) -> Iterator[list[Tensor]]:
    """Yields the arrays as tensors, in order; inside, torch's current stream is the arrays' own.

    Args:
        function: for error texts.
        mutable: names of the arrays that will be written to.
        arrays: tensors or arrays by argument name.

    Raises:
        DtypeError: something that is no array, or of a dtype that torch lacks.
        LayoutError: a read-only array in `mutable`, or memory that torch cannot view.
    """
    with _stream_of(*arrays.values()):
        yield [_as_tensor(function, name, array, name in mutable) for name, array in arrays.items()]


def _stream_of(*arrays: Any) -> Any:
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return nullcontext()
    devices = [array.device.id for array in arrays if isinstance(array, cupy.ndarray)]
    if not devices:
        return nullcontext()
    return torch.cuda.stream(stream_at(cupy.cuda.get_current_stream().ptr, torch.device("cuda", devices[0])))


def stream_at(handle: int, device: torch.device) -> torch.cuda.Stream:
    """torch's stream for a cudaStream_t of a device; 0 is its default stream.

    Not ExternalStream(0), for which torch takes a stream of its own.
    """
    return torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)


def _as_tensor(function: str, name: str, array: Any, mutable: bool) -> Tensor:
    if isinstance(array, Tensor):
        return array
    numpy = sys.modules.get("numpy")
    try:
        if numpy is not None and isinstance(array, numpy.ndarray):
            if array.flags.writeable:
                return torch.from_numpy(array)
            if mutable:
                raise LayoutError(f"{function}: {name} is a read-only array and would be written to")
            return torch.from_numpy(array.copy())
        if hasattr(array, "__dlpack__"):
            if mutable and _says_read_only(array):
                raise LayoutError(f"{function}: {name} is a read-only array and would be written to")
            return torch.utils.dlpack.from_dlpack(array)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        if isinstance(error, LayoutError):
            raise
        kind = DtypeError if isinstance(error, TypeError) else LayoutError
        raise kind(f"{function}: {name} cannot be used as a tensor: {error}") from error
    raise DtypeError(
        f"{function}: {name} must be a tensor or an array (NumPy, CuPy, DLPack), got {shown(array)}"
    )


def _says_read_only(array: Any) -> bool:
    """Whether an array on the CPU has DLPack's flag for that, which torch does not look at. Libraries older
    than DLPack 1.0 have none; CuPy's arrays never are."""
    if array.__dlpack_device__()[0] != CPU:
        return False
    try:
        capsule = array.__dlpack__(max_version=(1, 0))
    except TypeError:
        return False
    if not _IS_CAPSULE(capsule, VERSIONED):
        return False
    managed = ctypes.cast(_POINTER(capsule, VERSIONED), ctypes.POINTER(_Managed)).contents
    return managed.major == 1 and bool(managed.flags & READ_ONLY)


class _Managed(ctypes.Structure):
    """The beginning of DLManagedTensorVersioned."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    ]


# By prototypes of one's own: attributes of pythonapi are anybody's to change.
_IS_CAPSULE = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_POINTER = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
