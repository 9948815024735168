"""Rows and blocks: how elementwise work on a large tensor is cut so that no copy of it is made."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of a block: small enough for the second-level cache on a CPU, large enough to fill a GPU.
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**22


def block_entries(device: torch.device) -> int:
    """Entries that elementwise work takes at a time."""
    return CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def block_rows(x: Tensor) -> int:
    """Rows of x that elementwise work takes at a time."""
    return max(1, block_entries(x.device) // max(x.shape[-1], 1))


def ranges(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size``."""
    for start in range(0, length, max(size, 1)):
        yield slice(start, min(start + size, length))


class Rows:
    """The rows of a tensor (..., n) of any strides, read and written by row numbers, never copied as a whole."""

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.columns = source.shape[-1]
        self.count = source.shape[:-1].numel()
        try:
            self.flat: Tensor | None = source.view(self.count, self.columns)
        except RuntimeError:
            self.flat = None

    def _indices(self, rows: Tensor) -> tuple[Tensor, ...]:
        if self.source.dim() == 2:
            return (rows,)
        length = self.source.shape[1]
        return torch.div(rows, length, rounding_mode="floor"), rows % length

    def read(self, rows: Tensor) -> Tensor:
        """Copy of these rows, (number, n)."""
        return self.flat.index_select(0, rows) if self.flat is not None else self.source[self._indices(rows)]

    def write(self, rows: Tensor, block: Tensor) -> None:
        """Overwrite these rows; a 0-d block fills them."""
        if self.flat is not None:
            self.flat[rows] = block
        else:
            self.source[self._indices(rows)] = block


def padded(columns: int) -> int:
    """Columns of a chunk of Q in memory: its rows begin on multiples of 32 bytes."""
    return -(-columns // 16) * 16
