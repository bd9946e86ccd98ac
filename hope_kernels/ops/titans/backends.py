"""Who serves the self-modifying memory, ``scan.titans_chunk`` and its step in place, in order of preference."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...backend import BY_ALL, NO_GRADIENT, Entry, Request, choose, gradient
from ...config import TitansConfig
from ..shared import cpu_library, cuda_library, triton_library
from . import cpp
from .scan import titans_chunk

DEVICE_DECIDES = ("triton", "cuda")  # those whose kernels ask the device, not the host, where a row stands


def _reference(request: Request) -> Callable:
    from .reference_backend import titans_reference

    return titans_reference


def _triton(request: Request) -> Callable:
    if request.gradient != NO_GRADIENT:
        from .triton.training import titans_triton_training

        return titans_triton_training
    from .triton.operator import titans_triton

    return titans_triton


def _triton_unserved(request: Request) -> str | None:
    from .triton.operator import unserved

    return unserved(request.config, request.dtype, request.device)


def _triton_in_place(request: Request) -> Callable:
    from .triton.operator import titans_advance_

    return titans_advance_


def _cuda(request: Request) -> Callable:
    from .cuda import titans_cuda

    return titans_cuda


def _cuda_unserved(request: Request) -> str | None:
    from .cuda import unserved

    return unserved(request.config, request.dtype, request.device)


def _cuda_in_place(request: Request) -> Callable:
    from .cuda import titans_advance_

    return titans_advance_


def _cpp(request: Request) -> Callable:
    if request.gradient == BY_ALL:
        from .cpp_training import titans_cpp_training

        return titans_cpp_training
    return cpp.titans_cpp


ENTRIES = (
    Entry("reference", _reference),
    Entry("cpp", _cpp, cpp.unserved, cpu_library.unavailable, default=True),
    Entry("chunked", lambda request: titans_chunk, default=True),
    Entry("triton", _triton, _triton_unserved, triton_library.unavailable),
    Entry("cuda", _cuda, _cuda_unserved, cuda_library.unavailable),
)
IN_PLACE = (
    Entry("triton", _triton_in_place, _triton_unserved, triton_library.unavailable),
    Entry("cuda", _cuda_in_place, _cuda_unserved, cuda_library.unavailable),
)


def resolve(
    config: TitansConfig, dtype: torch.dtype, device: torch.device, backend: str | None = None,
    constant_memory: bool = False, entries: tuple[Entry, ...] = ENTRIES,
) -> Callable:
    """The function that serves, called as ``scan.titans_chunk``. constant_memory: the gradients asked for are
    those of reads by their queries alone. Raises ValueError where ``backend`` cannot serve."""
    return choose("titans", entries, Request(config, dtype, device, gradient(constant_memory)), backend)
