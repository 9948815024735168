"""Q of the whole vocabulary and the row statistics in one fused product: exponentials with a pivot for each row."""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import ENTROPY, LOGIT_SUM, ROW_MAX, SUM_EXP, Operands, Transform
from fused_pref.ops.triton import configs, gemm
from fused_pref.ops.triton.helpers import activation_backward, exp
from fused_pref.ops.triton.launch import launch
from fused_pref.ops.triton.logprob import factors
from fused_pref.ops.triton.mainloop import seen_targets
from fused_pref.ops.triton.softmax import first_moment, normalised
from fused_pref.ops.triton.statistics import (
    columns_of_a_split,
    join_metrics,
    statistics_partials,
    store_metrics,
    store_partials,
    target_logits,
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
    """Write the exponentials of columns ``begin`` to ``end``; their maximum and sum without the targets, and Σ z.

    The last three are the metrics of :func:`store_metrics`, 0 without ``WITH_METRICS``.
    """
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
            e = activation_backward(tl.where(own, -1.0, e), part, inner, outer, TRANSFORM)
            gemm.store(out, e, row, r < rows, cols, width, out_stride, ROWS)
    entropy, sum_sq = 0.0, 0.0
    if WITH_METRICS:
        entropy, _ = normalised(sum_exp, sum_exp_z, sum_exp_z)
        _, sum_sq = normalised(sum_exp * SCALE, sum_exp_z, sum_exp_sq)
    return row_max, sum_exp, logit_sum, entropy, sum_sq, target_seen


@triton.jit
def _linear_exponentials_kernel(
    hidden, weight, bias, indices,  # see logits_tile
    targets,  # [N]
    partials,  # [splits, 3, N]: maximum and Σ exp(z − pivot) of the other entries, Σ z; [splits, 6, N]: metrics, too
    pivots,  # [N]
    out,  # [N, width]: exp(z − pivot), −1 at the targets, times the activation's slope; 0 beyond V
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
    row_max, sum_exp, logit_sum, entropy, sum_sq, target_seen = _exponentials_of(
        hidden, weight, bias, indices, targets, pivot, out, row, begin, end, rows, columns, features, hidden_stride,
        weight_stride, width, out_stride, inner, outer, HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST,
        TRANSFORM, WITH_LOGIT_SUM, WITH_METRICS, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    store_partials(partials, split, r, rows, r < rows, row_max, sum_exp, logit_sum, WITH_METRICS)
    if WITH_METRICS:
        store_metrics(partials, split, r, rows, r < rows, entropy, sum_sq, target_seen)


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
    row_max, sum_exp, logit_sum, entropy, sum_sq, target_seen = _exponentials_of(
        hidden, weight, bias, indices, targets, pivot, out, row, begin, end, rows, columns, features, hidden_stride,
        weight_stride, width, out_stride, inner, outer, HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST,
        TRANSFORM, WITH_LOGIT_SUM, WITH_METRICS, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    inside = r < tl.where(moved, rows, 0)
    store_partials(partials, split, r, rows, inside, row_max, sum_exp, logit_sum, WITH_METRICS)
    if WITH_METRICS:
        store_metrics(partials, split, r, rows, inside, entropy, sum_sq, target_seen)


def exponentials(
    out: Tensor, operands: Operands, statistics: Tensor, targets: Tensor, transform: Transform, *, logit_sum: bool
) -> Tensor:
    """Write exp(z − pivot) of whole rows into ``out`` (N, V), and their statistics, in one product.

    A row's pivot is the maximum of its first columns. Rows that rise too far above it for the dtype are computed again
    with their own maximum: the device decides, nothing waits for it.

    Args:
        out: (N, V) or wider, of a dtype with the range of float32; receives Q times the result. Rows of whole 32
            bytes are written faster: what is beyond V becomes 0 (or finite, with an activation).
        operands: the whole vocabulary.
        statistics: (4, N) of rows of which nothing was seen yet; written, with the pivot in place of the maximum.
        targets: (N,) labels of the rows.
        transform: the logits transform.
        logit_sum: whether Σ z is wanted.

    Returns:
        (N,) what each row of Q was multiplied by, exactly as the targets' entries say it.
    """
    metrics = len(statistics) > ENTROPY
    flags = {"WITH_LOGIT_SUM": logit_sum, "WITH_METRICS": metrics}
    probe = Operands(
        operands.hidden,
        operands.weight[:PROBE],
        None if operands.bias is None else operands.bias[:PROBE],
        operands.indices,
    )
    if operands.rows:
        target_logits(statistics, operands, targets, 0, transform)
        # The maximum of nothing is the least finite number, as in other statistics.
        probe_tile = gemm.tile_of(probe, configs.STATISTICS_TILE, transform)
        low = statistics_partials(probe, targets, 0, transform, False, False, probe_tile)[:, 0].amax(0)
        low.clamp_(min=torch.finfo(torch.float32).min)

        def with_tile(tile: configs.Tile) -> Tensor:
            split_columns = columns_of_a_split(operands, tile)
            splits = triton.cdiv(operands.columns, split_columns)
            partials = torch.empty((splits, 6 if metrics else 3, operands.rows), dtype=torch.float32, device=out.device)
            launch(
                _linear_exponentials_kernel, (triton.cdiv(operands.rows, tile.rows) * splits,), out.device,
                indices=operands.indices, targets=targets, partials=partials, pivots=low, out=out, splits=splits,
                split_columns=split_columns, width=out.shape[1], out_stride=out.stride(0), **flags,
                **gemm.arguments(operands, tile), **factors(transform), **tile.options,
            )  # fmt: skip
            return partials

        table = configs.EXPONENTIALS_TILE
        tile = gemm.tuned_tile("linear_exponentials", operands, table, transform, with_tile, metrics=metrics)
        partials = with_tile(tile)
        row_max = partials[:, 0].amax(0)
        high = torch.where(row_max - low > REACH, row_max, low)
        # This kernel also holds what tells it whether to do anything: smaller tiles leave registers for that.
        small, splits = replace(tile, rows=min(tile.rows, 64)), partials.shape[0]
        launch(
            _linear_exponentials_again_kernel, (triton.cdiv(operands.rows, small.rows) * splits,), out.device,
            indices=operands.indices, targets=targets, partials=partials, pivots=high, before=low, out=out,
            splits=splits, split_columns=columns_of_a_split(operands, tile), width=out.shape[1],
            out_stride=out.stride(0), **flags, **gemm.arguments(operands, small), **factors(transform),
            **small.options,
        )  # fmt: skip
        statistics[ROW_MAX], statistics[SUM_EXP] = high, partials[:, 1].sum(0)
        if logit_sum:
            statistics[LOGIT_SUM] = partials[:, 2].sum(0)
        if metrics:
            join_metrics(statistics, partials, torch.cat((torch.zeros_like(high)[None], partials[:, 1])))
    sum_exp = statistics[SUM_EXP].to(out.dtype)
    scale = torch.where(sum_exp == 0, 1, sum_exp)
    here = (targets >= 0) & (targets < operands.columns)
    row, column = torch.arange(operands.rows, device=out.device), targets.long().where(here, 0)
    out[row, column] *= torch.where(here, scale, 1)
    return scale.to(statistics.dtype)
