"""Q of the whole vocabulary and the row statistics in one fused product: exponentials with a pivot for each row."""

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import ENTROPY, FinishedRows, Operands, Transform
from fused_pref.ops.triton import configs, gemm
from fused_pref.ops.triton.helpers import activation_backward, exp, transform
from fused_pref.ops.triton.launch import cdiv, launch, next_power_of_2
from fused_pref.ops.triton.logprob import factors
from fused_pref.ops.triton.mainloop import seen_targets
from fused_pref.ops.triton.softmax import finished, first_moment, normalised
from fused_pref.ops.triton.statistics import (
    columns_of_a_split,
    join_metrics,
    statistics_partials,
    store_partials,
    target_logit,
    target_options,
)

# Columns whose maximum is the pivot of a row's exponentials, and how far above it (in nats) they may rise: far enough
# for any trained model, near enough that float32 sums and bfloat16 entries hold them.
PROBE, REACH = 1024, 40.0
SCALE = tl.constexpr(math.exp(-REACH / 2))


@triton.jit
def _exponentials_of(
    hidden, weight, bias, indices, targets, pivot, out, row, begin, end, rows, columns, features, hidden_stride,
    weight_stride, width, out_stride, inner, outer,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, WITH_METRICS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the exponentials of columns ``begin`` to ``end``; what :func:`store_partials` stores of them."""
    r = row + tl.arange(0, ROWS)
    place = gemm.indices_at(indices, r, rows)
    y = gemm.targets_at(targets, row, rows, 0, ROWS)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    logit_sum = tl.zeros([ROWS], tl.float32)
    sum_exp_z = tl.zeros([ROWS], tl.float32)
    sum_exp_sq = tl.zeros([ROWS], tl.float32)
    target_seen = tl.full([ROWS], float("-inf"), tl.float32)
    for column in range(begin, end, COLUMNS):
        x = gemm.logits_tile(
            hidden, weight, place, row, column, columns, features, hidden_stride, weight_stride,
            HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        parts = gemm.quarters(x, ROWS, COLUMNS)
        for i in tl.static_range(4):
            cols, part = gemm.quarter(parts, i, bias, column, columns, COLUMNS)
            own, z, logit_sum = gemm.without_targets(
                part, cols, y, end, logit_sum, inner, outer, TRANSFORM, WITH_LOGIT_SUM
            )
            row_max = tl.maximum(row_max, tl.max(z, 1))
            e = exp(z - pivot[:, None])
            sum_exp += tl.sum(e, 1)
            if WITH_METRICS:
                # Squares of entries far above the pivot would overflow: they are scaled down.
                sum_exp_z += first_moment(z - pivot[:, None], e)
                sum_exp_sq += tl.sum((e * SCALE) * (e * SCALE), 1)
                target_seen = tl.maximum(target_seen, seen_targets(part, own, inner, outer, TRANSFORM))
            e = activation_backward(tl.where(own, 0.0, e), part, inner, outer, TRANSFORM)
            gemm.store(out, e, row, r < rows, cols, width, out_stride, ROWS)
    entropy, _ = normalised(sum_exp, sum_exp_z, sum_exp_z)
    _, sum_sq = normalised(sum_exp * SCALE, sum_exp_z, sum_exp_sq)
    return row_max, sum_exp, logit_sum, entropy, sum_sq, target_seen


@triton.jit
def _linear_exponentials_kernel(
    hidden, weight, bias, indices,  # see logits_tile
    targets,  # [N]
    partials,  # [splits, 3, N]: maximum and Σ exp(z − pivot) of the other entries, Σ z; [splits, 6, N]: metrics, too
    pivots,  # [N]
    out,  # [N, width]: exp(z − pivot), 0 at the targets, times the activation's slope; 0 beyond V
    rows, columns, features, hidden_stride, weight_stride, splits, split_columns, width, out_stride, inner, outer,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, WITH_METRICS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block, split = gemm.tile_order(tl.program_id(0), tl.cdiv(rows, ROWS), splits, GROUP)
    row = block * ROWS
    r = row + tl.arange(0, ROWS)
    pivot = tl.load(pivots + r, mask=r < rows, other=0.0)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, columns)
    found = _exponentials_of(
        hidden, weight, bias, indices, targets, pivot, out, row, begin, end, rows, columns, features, hidden_stride,
        weight_stride, width, out_stride, inner, outer, HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST,
        TRANSFORM, WITH_LOGIT_SUM, WITH_METRICS, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    store_partials(partials, split, r, rows, r < rows, found, WITH_METRICS)


@triton.jit
def _linear_exponentials_again_kernel(
    hidden, weight, bias, indices, targets,
    partials,  # of the first pass, updated
    pivots, before,  # [N]: those of now and of the first pass; a block of rows where none differs is left as it is
    out,
    rows, columns, features, hidden_stride, weight_stride, splits, split_columns, width, out_stride, inner, outer,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, WITH_METRICS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Repeat :func:`_linear_exponentials_kernel` where a pivot has moved."""
    block, split = gemm.tile_order(tl.program_id(0), tl.cdiv(rows, ROWS), splits, GROUP)
    row = block * ROWS
    r = row + tl.arange(0, ROWS)
    pivot = tl.load(pivots + r, mask=r < rows, other=0.0)
    moved = tl.max((pivot != tl.load(before + r, mask=r < rows, other=0.0)).to(tl.int32), 0) > 0
    begin = split * split_columns
    end = tl.where(moved, tl.minimum(begin + split_columns, columns), begin)
    found = _exponentials_of(
        hidden, weight, bias, indices, targets, pivot, out, row, begin, end, rows, columns, features, hidden_stride,
        weight_stride, width, out_stride, inner, outer, HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST,
        TRANSFORM, WITH_LOGIT_SUM, WITH_METRICS, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    store_partials(partials, split, r, rows, r < tl.where(moved, rows, 0), found, WITH_METRICS)


@triton.jit
def _linear_finish_kernel(
    hidden, weight, bias, indices,  # see logits_tile, none of them a descriptor
    targets,  # [N]
    partials,  # [splits, 3 or 6, N], of both passes
    pivots,  # [N]
    statistics,  # [4, N], or [8, N] with metrics, of which this writes the first four
    logp, one_minus_p, factor, target_q,  # [N], see FinishedRows
    rows, columns, features, hidden_stride, weight_stride, splits, parts, statistics_stride, ignore_index, inner, outer,
    TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the splits of each row, with its target's logit."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row).to(tl.int64)
    here = (y >= 0) & (y < columns)
    x = tl.full([], 0.0, tl.float32)
    if here:
        x = target_logit(hidden, weight, bias, indices, row, y, features, hidden_stride, weight_stride, BLOCK)
    z = transform(x, inner, outer, TRANSFORM)
    split = tl.arange(0, SPLITS)
    part = partials + split.to(tl.int64) * parts * rows + row
    row_max = tl.load(pivots + row)
    sum_exp = tl.sum(tl.load(part + rows, mask=split < splits, other=0.0), 0)
    seen, statistics_stride = statistics + row, tl.cast(statistics_stride, tl.int64)
    tl.store(seen, row_max)
    tl.store(seen + statistics_stride, sum_exp)
    tl.store(seen + 2 * statistics_stride, z)
    if WITH_LOGIT_SUM:
        tl.store(seen + 3 * statistics_stride, tl.sum(tl.load(part + rows + rows, mask=split < splits, other=0.0), 0))
    value, others = finished(row_max, sum_exp, z, y, columns, ignore_index)
    multiple = tl.where(sum_exp == 0, 1.0, sum_exp)
    tl.store(logp + row, value)
    tl.store(one_minus_p + row, others)
    tl.store(factor + row, others / multiple)
    tl.store(target_q + row, tl.where(here, activation_backward(-multiple, x, inner, outer, TRANSFORM), 0.0))


def exponentials(
    out: Tensor,
    operands: Operands,
    statistics: Tensor,
    targets: Tensor,
    transform: Transform,
    ignore_index: int,
    *,
    logit_sum: bool,
) -> FinishedRows:
    """As :meth:`fused_pref.ops.interface.RowOps.exponentials`, in one product: exp(z − pivot) with 0 at the targets.

    A row's pivot is the maximum of its first columns. Rows that rise too far above it for the dtype are computed again
    with their own maximum: the device decides, nothing waits for it.

    Args:
        out: (N, V) or wider, of a dtype with the range of float32; receives Q, 0 at the targets, times a factor of
            each row. Rows of whole 32 bytes are written faster: what is beyond V becomes 0 (or finite, with an
            activation).
        operands: the whole vocabulary.
        statistics: (4, N), or (8, N) with metrics, of rows of which nothing was seen yet; written, with the pivot in
            place of the maximum.
        targets: (N,) labels of the rows.
        transform: the logits transform.
        ignore_index: label of rows that are not scored.
        logit_sum: whether Σ z is wanted.
    """
    rows, metrics = operands.rows, len(statistics) > ENTROPY
    done = FinishedRows(*torch.empty((4, rows), dtype=torch.float32, device=out.device).unbind())
    if rows == 0:
        return done
    partials, pivots = _two_passes(out, operands, targets, transform, logit_sum, metrics)
    launch(
        _linear_finish_kernel, (rows,), out.device,
        operands.hidden, operands.weight, operands.bias, operands.indices, targets, partials, pivots, statistics, *done,
        rows, operands.columns, operands.hidden.shape[1], operands.hidden.stride(0), operands.weight.stride(0),
        *partials.shape[:2], statistics.stride(0), ignore_index, **factors(transform), WITH_LOGIT_SUM=logit_sum,
        SPLITS=max(2, next_power_of_2(partials.shape[0])), **target_options(operands),
    )  # fmt: skip
    if metrics:
        join_metrics(statistics, partials, torch.cat((torch.zeros_like(pivots)[None], partials[:, 1])))
    return done


def _two_passes(
    out: Tensor, operands: Operands, targets: Tensor, transform: Transform, logit_sum: bool, metrics: bool
) -> tuple[Tensor, Tensor]:
    """Launch the exponentials, and again those that need another pivot; partials of the splits, and the pivots."""
    bias = None if operands.bias is None else operands.bias[:PROBE]
    probe = replace(operands, weight=operands.weight[:PROBE], bias=bias)
    # The maximum of nothing is the least finite number, as in other statistics.
    defaults = configs.defaults(out.device)
    probe_tile = gemm.tile_of(probe, defaults.statistics, transform)
    low = statistics_partials(probe, targets, 0, transform, False, False, probe_tile)[:, 0].amax(0)
    low.clamp_(min=torch.finfo(torch.float32).min)

    def run(kernel: Any, tile: configs.Tile, partials: Tensor, split_columns: int, **pivots: Tensor) -> Tensor:
        splits = partials.shape[0]
        launch(
            kernel, (cdiv(operands.rows, tile.rows) * splits,), out.device,
            indices=operands.indices, targets=targets, partials=partials, out=out, splits=splits,
            split_columns=split_columns, width=out.shape[1], out_stride=out.stride(0), WITH_LOGIT_SUM=logit_sum,
            WITH_METRICS=metrics, **pivots, **gemm.arguments(operands, tile), **factors(transform), **tile.options,
        )  # fmt: skip
        return partials

    def with_tile(tile: configs.Tile) -> Tensor:
        split_columns = columns_of_a_split(operands, tile)
        shape = (cdiv(operands.columns, split_columns), 6 if metrics else 3, operands.rows)
        partials = torch.empty(shape, dtype=torch.float32, device=out.device)
        return run(_linear_exponentials_kernel, tile, partials, split_columns, pivots=low)

    default = defaults.exponentials
    tile = gemm.tuned_tile("linear_exponentials", operands, default, transform, with_tile, metrics=metrics)
    partials = with_tile(tile)
    row_max = partials[:, 0].amax(0)
    high = torch.where(row_max - low > REACH, row_max, low)
    # Checking for moved pivots needs registers, too: hence smaller tiles.
    small, split_columns = replace(tile, rows=min(tile.rows, 64)), columns_of_a_split(operands, tile)
    return run(_linear_exponentials_again_kernel, small, partials, split_columns, pivots=high, before=low), high
