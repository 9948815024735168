"""The softmax of a row, in one read: online Σ exp(z − max) over the entries other than the target."""

import triton
import triton.language as tl

from fused_pref.ops.triton.helpers import exp, transform


@triton.jit
def row_softmax(
    base,  # pointer to the first entry of the row
    stride, column, first, last, columns, inner, outer,
    TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum of z, Σ exp(z − maximum) and Σ z of the entries ``first`` to ``last``, a multiple of BLOCK or the end.

    The entry at ``column`` enters Σ z alone; −1 for none. Where there is no other entry the maximum is −inf.
    """
    WIDTH: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    # Kept apart per group of entries: nothing is exchanged between threads inside the loop.
    row_max = tl.full([BLOCK // WIDTH], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK // WIDTH], tl.float32)
    logit_sum = tl.zeros([BLOCK // WIDTH], tl.float32)
    # Entries that are read one by one have addresses a constant apart from one that moves with the block.
    moving = base + _columns(0, BLOCK, WIDTH, ALIGNED).to(tl.int64) * stride
    # The quotient tells the compiler that the end falls between two accesses.
    end = columns // WIDTH * WIDTH if ALIGNED else columns
    for start in range(first, last, BLOCK):
        cols = _columns(start, BLOCK, WIDTH, ALIGNED)
        pointers = base + cols if ALIGNED else moving + tl.cast(start, tl.int64) * stride
        x = tl.load(pointers, mask=cols < end, other=0.0).to(tl.float32)
        z = transform(x, inner, outer, TRANSFORM)
        if WITH_LOGIT_SUM:
            logit_sum += tl.sum(z, 1)  # z is 0 beyond the end
        if (start + BLOCK > columns) | ((start <= column) & (column < start + BLOCK)):
            z = tl.where((cols < columns) & (cols != column), z, float("-inf"))
        risen = tl.maximum(row_max, tl.max(z, 1))
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        sum_exp = sum_exp * exp(row_max - shift) + tl.sum(exp(z - shift[:, None]), 1)
        row_max = risen
    highest, remainder = joined(row_max, sum_exp)
    return highest, remainder, tl.sum(logit_sum, 0)


@triton.jit
def _columns(start, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns of the block at ``start`` in groups that a thread holds whole: [BLOCK // WIDTH, WIDTH].

    A group is what one access reads; where entries are read one by one, it is spread so that a warp's accesses adjoin.
    """
    group = tl.arange(0, BLOCK // WIDTH)[:, None]
    entry = tl.arange(0, WIDTH)[None, :]
    if ALIGNED:
        return start + group * WIDTH + entry
    else:
        return start + group + entry * (BLOCK // WIDTH)


@triton.jit
def joined(row_maxes, sum_exp):
    """Maximum and sum of parts that have a maximum and a sum of exp(z − maximum) each."""
    row_max = tl.max(row_maxes, 0)
    # Where every entry is −inf there is nothing to scale.
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    return row_max, tl.sum(sum_exp * exp(row_maxes - shift), 0)
