"""How a program walks its vocabulary tiles for the statistics of its rows, in two forms.

- :func:`nested`: a loop over the depth inside of one over tiles. The pipeline of loads is set up and drained for
  every tile.
- :func:`flattened`: one loop over all blocks of all tiles. The pipeline is set up once, and the first blocks of the
  next tile are under way while a tile's logits become statistics.

Both do the same arithmetic in the same order. :attr:`fused_pref.ops.triton.configs.Tile.flattened` says which is taken.
"""

import triton
import triton.language as tl

from fused_pref.ops.triton import gemm
from fused_pref.ops.triton.helpers import exp, transform
from fused_pref.ops.triton.softmax import updated_moments


@triton.jit
def nested(
    hidden, weight, bias, indices, y, row, begin, end, columns, features, hidden_stride, weight_stride, inner, outer,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, WITH_METRICS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The statistics of columns ``begin`` to ``end``, as :func:`nothing_seen` has them; y: see ``targets_at``."""
    seen = nothing_seen(ROWS)
    for column in range(begin, end, COLUMNS):
        x = gemm.logits_tile(
            hidden, weight, indices, row, column, columns, features, hidden_stride, weight_stride,
            HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        seen = with_tile(
            seen, x, bias, y, column, end, columns, inner, outer, TRANSFORM, WITH_LOGIT_SUM, WITH_METRICS, ROWS, COLUMNS
        )
    return seen


@triton.jit
def flattened(
    hidden, weight, bias, indices, y, row, begin, end, columns, features, hidden_stride, weight_stride, inner, outer,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, WITH_METRICS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The same as :func:`nested`."""
    seen = nothing_seen(ROWS)
    rows_of_hidden = gemm.hidden_rows(hidden, indices, hidden_stride, HIDDEN_DESCRIPTOR, DEPTH)
    steps = tl.cdiv(features, DEPTH)
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    column, step = begin, 0
    for _ in tl.range(0, tl.cdiv(end - begin, COLUMNS) * steps):
        rows_of_weight = gemm.weight_rows(weight, column, columns, weight_stride, WEIGHT_DESCRIPTOR, COLUMNS, DEPTH)
        a = gemm.block(rows_of_hidden, row, step * DEPTH, features, HIDDEN_DESCRIPTOR, WHOLE, DEPTH)
        b = gemm.block(rows_of_weight, column, step * DEPTH, features, WEIGHT_DESCRIPTOR, WHOLE, DEPTH)
        x = gemm.multiplied(a, b.T, x, PRECISION, UPCAST)
        last = step == steps - 1
        if last:
            seen = with_tile(
                seen, x, bias, y, column, end, columns, inner, outer, TRANSFORM, WITH_LOGIT_SUM, WITH_METRICS, ROWS,
                COLUMNS,
            )  # fmt: skip
            x = tl.zeros([ROWS, COLUMNS], tl.float32)
        # Not inside the branch: loads of blocks to come would have to wait for it.
        step = tl.where(last, 0, step + 1)
        column = tl.where(last, column + COLUMNS, column)
    return seen


@triton.jit
def nothing_seen(ROWS: tl.constexpr):
    """What a program knows of its rows before the first tile.

    The maximum and Σ exp(z − maximum) of the other entries and Σ z; then, for metrics, Σ (z − maximum) · exp and
    Σ exp² of the same entries, and the target's z, −inf until it is seen.
    """
    nothing, zero = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    return nothing, zero, zero, zero, zero, nothing


@triton.jit
def with_tile(
    seen, x, bias, y, column, end, columns, inner, outer, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr,
    WITH_METRICS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What is known with the tile of products x [ROWS, COLUMNS] at ``column``, too."""
    row_max, sum_exp, logit_sum, sum_exp_z, sum_exp_sq, target_seen = seen
    parts = gemm.quarters(x, ROWS, COLUMNS)
    for i in tl.static_range(4):
        cols, part = gemm.quarter(parts, i, bias, column, columns, COLUMNS)
        own, z, logit_sum = gemm.without_targets(part, cols, y, end, logit_sum, inner, outer, TRANSFORM, WITH_LOGIT_SUM)
        risen = tl.maximum(row_max, tl.max(z, 1))
        shift = tl.where(risen == float("-inf"), 0.0, risen)
        if WITH_METRICS:
            sum_exp_z, sum_exp_sq = updated_moments(z, shift, row_max, sum_exp, sum_exp_z, sum_exp_sq)
            target_seen = tl.maximum(target_seen, seen_targets(part, own, inner, outer, TRANSFORM))
        sum_exp = sum_exp * exp(row_max - shift) + tl.sum(exp(z - shift[:, None]), 1)
        row_max = risen
    return row_max, sum_exp, logit_sum, sum_exp_z, sum_exp_sq, target_seen


@triton.jit
def seen_targets(x, own, inner, outer, TRANSFORM: tl.constexpr):
    """z of the targets among part of a tile of logits, −inf in rows that have none there."""
    return tl.max(tl.where(own, transform(x, inner, outer, TRANSFORM), float("-inf")), 1)
