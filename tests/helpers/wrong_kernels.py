"""Kernels that are wrong on purpose: the checks of the others have to notice."""

import triton
import triton.language as tl


@triton.jit
def narrow_kernel(source, out, stride, columns, BLOCK: tl.constexpr):
    """Copies rows of ``source`` whose offsets are computed in 32 bits."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    x = tl.load(source + row * stride + cols, mask=cols < columns, other=0.0)
    tl.store(out + row * columns + cols, x, mask=cols < columns)


@triton.jit
def late_kernel(indices, source, out, stride):
    """Widens a product of a number from memory after it was computed in 32 bits."""
    row = tl.program_id(0)
    offset = (tl.load(indices + row) * stride).to(tl.int64)
    tl.store(out + row, tl.load(source + offset))


@triton.jit
def overlap_kernel(out, BLOCK: tl.constexpr):
    """Every program writes the first entry of the next one's block."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out + place, place.to(tl.float32), mask=tl.arange(0, 2 * BLOCK) <= BLOCK)


@triton.jit
def chase_kernel(values, number):
    """Every program reads what the next one writes."""
    row = tl.program_id(1)
    following = tl.load(values + row + 1, mask=row + 1 < number, other=0.0)
    tl.store(values + row, following + 1.0)
