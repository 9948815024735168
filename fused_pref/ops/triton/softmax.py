"""The softmax of a row, in one read: online Σ exp(z − max) over the entries other than the target, and its metrics.

Metrics are the entropy and the sum of squares of the softmax q over those entries: see
:mod:`fused_pref.ops.metrics`, whose arithmetic this is.
"""

import triton
import triton.language as tl

from fused_pref.ops.triton.helpers import exp, log1p, transform


@triton.jit
def row_softmax(
    base,  # pointer to the first entry of the row
    stride, column, first, last, columns, inner, outer,
    TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, WITH_METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum of z, Σ exp(z − maximum) and Σ z of the entries ``first`` to ``last``, a multiple of BLOCK or the end.

    The entry at ``column`` enters Σ z alone; −1 for none. Where there is no other entry the maximum is −inf. The last
    two are the metrics of q, 0 without ``WITH_METRICS``.
    """
    WIDTH: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    # Kept apart per group of entries: nothing is exchanged between threads inside the loop.
    row_max = tl.full([BLOCK // WIDTH], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK // WIDTH], tl.float32)
    logit_sum = tl.zeros([BLOCK // WIDTH], tl.float32)
    sum_exp_z = tl.zeros([BLOCK // WIDTH], tl.float32)
    sum_exp_sq = tl.zeros([BLOCK // WIDTH], tl.float32)
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
        if WITH_METRICS:
            sum_exp_z, sum_exp_sq = updated_moments(z, shift, row_max, sum_exp, sum_exp_z, sum_exp_sq)
        sum_exp = sum_exp * exp(row_max - shift) + tl.sum(exp(z - shift[:, None]), 1)
        row_max = risen
    highest, remainder = joined(row_max, sum_exp)
    entropy = 0.0
    sum_sq = 0.0
    if WITH_METRICS:
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        sum_exp_z, sum_exp_sq = moved_moments(sum_exp, sum_exp_z, sum_exp_sq, row_max - shift)
        entropy, sum_sq = normalised(remainder, tl.sum(sum_exp_z, 0), tl.sum(sum_exp_sq, 0))
    return highest, remainder, tl.sum(logit_sum, 0), entropy, sum_sq


@triton.jit
def first_moment(d, e):
    """Σ e·d along rows of d and e = exp(d), which is 0 far above −128."""
    return tl.sum(e * tl.maximum(d, -128.0), 1)


@triton.jit
def updated_moments(z, shift, row_max, sum_exp, sum_exp_z, sum_exp_sq):
    """Σ exp(x) x and Σ exp(2x), x = z − shift, of rows of z and of entries before, whose sums are by ``row_max``."""
    sum_exp_z, sum_exp_sq = moved_moments(sum_exp, sum_exp_z, sum_exp_sq, row_max - shift)
    d = z - shift[:, None]
    e = exp(d)
    return sum_exp_z + first_moment(d, e), sum_exp_sq + tl.sum(e * e, 1)


@triton.jit
def moved_moments(sum_exp, sum_exp_z, sum_exp_sq, by):
    """Σ exp(x) x and Σ exp(2x) of entries x that all move by this much, −inf where there is none."""
    factor = exp(by)
    return factor * (sum_exp_z + tl.where(factor > 0, by, 0.0) * sum_exp), factor * factor * sum_exp_sq


@triton.jit
def normalised(sum_exp, sum_exp_z, sum_exp_sq):
    """Entropy and Σ q² of q = exp(x) / Σ exp(x) from Σ exp(x), Σ exp(x) x and Σ exp(2x); any where Σ exp(x) is 0."""
    total = tl.where(sum_exp == 0, 1.0, sum_exp)
    return tl.log(total) - sum_exp_z / total, sum_exp_sq / total / total


@triton.jit
def entr(p):
    """−p log p, 0 for 0."""
    return -p * tl.log(tl.where(p == 0, 1.0, p))


@triton.jit
def log_prob(z, target_exp, others_exp):
    """A target's log-prob from its z below the maximum, exp(z), and the sum of the other exponentials: at most 0."""
    return tl.where(others_exp < target_exp, -log1p(others_exp / target_exp), z - tl.log(others_exp + target_exp))


@triton.jit
def finished(row_max, sum_exp, target_logit, y, columns, ignore_index):
    """Log-prob and 1 − p_y of rows with labels y (int64), see :meth:`fused_pref.ops.interface.RowOps.finish`."""
    highest = tl.maximum(row_max, target_logit)
    target_exp, others_exp = exp(target_logit - highest), sum_exp * exp(row_max - highest)
    logp = log_prob(target_logit - highest, target_exp, others_exp)
    valid = (y != ignore_index) & (y >= 0) & (y < columns)
    fill = tl.where(y == ignore_index, 0.0, float("nan"))
    return tl.where(valid, logp, fill), tl.where(valid, others_exp / (others_exp + target_exp), fill)


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
