"""Memory for large temporary tensors."""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 4096
HUGE = 2**21
# Linux: back this range by huge pages.
MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None
    except (AttributeError, OSError):
        return None


def new_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised, as ``torch.empty``; on Linux's CPU in huge pages, as advice that may be ignored.

    A slab is written once and given back: to fault in its small pages would take a third of the time of its product.
    """
    memory = torch.empty(shape, dtype=dtype, device=device)
    size = memory.numel() * memory.element_size()
    advise = _madvise() if device.type == "cpu" and size >= 4 * HUGE else None
    if advise is not None:
        start = -(-memory.data_ptr() // PAGE) * PAGE
        advise(ctypes.c_void_p(start), ctypes.c_size_t(memory.data_ptr() + size - start), MADV_HUGEPAGE)
    return memory
