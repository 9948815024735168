"""Row statistics of fused products: the softmax of rows of logits that never leave the chip."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import ENTROPY, LOGIT_SUM, ROW_MAX, SUM_EXP, TARGET_LOGIT, Operands, Transform
from fused_pref.ops.metrics import merged_metrics
from fused_pref.ops.triton import configs, gemm, mainloop
from fused_pref.ops.triton.helpers import transform
from fused_pref.ops.triton.launch import cdiv, launch, next_power_of_2
from fused_pref.ops.triton.logprob import factors
from fused_pref.ops.triton.softmax import normalised


@triton.jit
def _linear_statistics_kernel(
    hidden, weight, bias, indices,  # see logits_tile
    targets,  # [N]
    partials,  # [splits, 3, N]: maximum and Σ exp(z − maximum) of the other entries, Σ z; [splits, 6, N]: metrics, too
    rows, columns, features, hidden_stride, weight_stride, first, splits, split_columns, inner, outer,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, WITH_METRICS: tl.constexpr,
    FLATTENED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block, split = gemm.tile_order(tl.program_id(0), tl.cdiv(rows, ROWS), splits, GROUP)
    row = block * ROWS
    r = row + tl.arange(0, ROWS)
    place = gemm.indices_at(indices, r, rows)
    y = gemm.targets_at(targets, row, rows, first, ROWS)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, columns)
    walk: tl.constexpr = mainloop.flattened if FLATTENED else mainloop.nested
    row_max, sum_exp, logit_sum, sum_exp_z, sum_exp_sq, target_seen = walk(
        hidden, weight, bias, place, y, row, begin, end, columns, features, hidden_stride, weight_stride, inner, outer,
        HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST, TRANSFORM, WITH_LOGIT_SUM, WITH_METRICS,
        ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    entropy, sum_sq = normalised(sum_exp, sum_exp_z, sum_exp_sq)
    found = (row_max, sum_exp, logit_sum, entropy, sum_sq, target_seen)
    store_partials(partials, split, r, rows, r < rows, found, WITH_METRICS)


@triton.jit
def store_partials(partials, split, r, rows, inside, found, WITH_METRICS: tl.constexpr):
    """What a program found of rows ``r`` in its split: the first three, or all six."""
    NUMBER: tl.constexpr = 6 if WITH_METRICS else 3
    part = tl.cast(split, tl.int64) * NUMBER * rows
    for i in tl.static_range(NUMBER):
        tl.store(partials + part + r, found[i], mask=inside)
        part += rows


@triton.jit
def _linear_target_logit_kernel(
    hidden,  # [N_total, D]
    weight,  # [v, D]
    bias,  # [v] or None
    indices,  # [N] or None
    targets,  # [N]
    target_logits,  # [N], written where the target is in this slice
    columns, features, hidden_stride, weight_stride, first, inner, outer,
    TRANSFORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The target's z of each row, by itself: the tiles need not look for it."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row).to(tl.int64) - first
    if (y >= 0) & (y < columns):
        x = target_logit(hidden, weight, bias, indices, row, y, features, hidden_stride, weight_stride, BLOCK)
        tl.store(target_logits + row, transform(x, inner, outer, TRANSFORM))


@triton.jit
def target_logit(hidden, weight, bias, indices, row, y, features, hidden_stride, weight_stride, BLOCK: tl.constexpr):
    """The raw logit of a row at its target y (int64), a column of the weight."""
    place = row
    if indices is not None:
        place = tl.load(indices + row)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, features, BLOCK):
        depth = start + tl.arange(0, BLOCK)
        h = tl.load(hidden + place * hidden_stride + depth, mask=depth < features, other=0.0).to(tl.float32)
        w = tl.load(weight + y * weight_stride + depth, mask=depth < features, other=0.0).to(tl.float32)
        sums += h * w
    x = tl.sum(sums, 0)
    if bias is not None:
        x += tl.load(bias + y).to(tl.float32)
    return x


def update_statistics(
    statistics: Tensor,
    operands: Operands,
    targets: Tensor,
    first: int,
    transform: Transform,
    *,
    logit_sum: bool,
    split_columns: int | None = None,
) -> Tensor:
    """As :meth:`fused_pref.ops.interface.RowOps.update_statistics`; gives those of each split, (splits, ≥ 3, N).

    ``split_columns`` is the width of the parts that a row is split into; None: what keeps the device busy.
    """
    if operands.rows == 0 or operands.columns == 0:
        return statistics.new_empty((0, 3, operands.rows))
    target_logits(statistics, operands, targets, first, transform)

    metrics, tile = len(statistics) > ENTROPY, configs.defaults(statistics.device).statistics

    def with_tile(tile: configs.Tile) -> Tensor:
        asked = (logit_sum, metrics)
        return statistics_partials(operands, targets, first, transform, *asked, tile, split_columns)

    tile = gemm.tuned_tile("linear_statistics", operands, tile, transform, with_tile, metrics=metrics, flattened=True)
    partials = with_tile(tile)
    row_max = torch.maximum(statistics[ROW_MAX], partials[:, 0].amax(0))
    statistics[SUM_EXP] *= (statistics[ROW_MAX] - row_max).exp_()
    sums = partials[:, 1] * (partials[:, 0] - row_max).exp_()
    before = statistics[SUM_EXP].clone() if metrics else None
    statistics[SUM_EXP] += sums.sum(0)
    statistics[ROW_MAX] = row_max
    if logit_sum:
        statistics[LOGIT_SUM] += partials[:, 2].sum(0)
    if before is not None:
        join_metrics(statistics, partials, torch.cat((before[None], sums)))
    return partials


def join_metrics(statistics: Tensor, partials: Tensor, sums: Tensor) -> None:
    """Update the metrics in statistics (8, N) by those of the splits (splits, 6, N).

    ``sums`` (1 + splits, N) are Σ exp(z − maximum) of what was seen before and of each split, by one maximum.
    """
    splits = torch.stack((partials[:, 3], partials[:, 4], partials[:, 0], partials[:, 5]), 1)
    parts = torch.cat((statistics[None, ENTROPY:], splits))
    statistics[ENTROPY:] = merged_metrics(parts, sums / statistics[SUM_EXP].clamp(min=0.5))


def statistics_partials(
    operands: Operands,
    targets: Tensor,
    first: int,
    transform: Transform,
    logit_sum: bool,
    metrics: bool,
    tile: configs.Tile,
    split_columns: int | None = None,
) -> Tensor:
    """Maximum and Σ exp(z − maximum) of the other entries and Σ z of each split of the slice, (splits, 3, N).

    With ``metrics`` (splits, 6, N): entropy and Σ q² of the softmax q over those entries, and the target's z, −inf
    where it is in another split.
    """
    rows, device = operands.rows, operands.hidden.device
    split_columns = split_columns or columns_of_a_split(operands, tile)
    splits = cdiv(operands.columns, split_columns)
    partials = torch.empty((splits, 6 if metrics else 3, rows), dtype=torch.float32, device=device)
    launch(
        _linear_statistics_kernel, (cdiv(rows, tile.rows) * splits,), device,
        indices=operands.indices, targets=targets, partials=partials, first=first, splits=splits,
        split_columns=split_columns, WITH_LOGIT_SUM=logit_sum, WITH_METRICS=metrics, FLATTENED=tile.flattened,
        **gemm.arguments(operands, tile), **factors(transform), **tile.options,
    )  # fmt: skip
    return partials


def columns_of_a_split(operands: Operands, tile: configs.Tile) -> int:
    """Columns that a program walks, whole tiles: what keeps the device busy."""
    device, width = operands.hidden.device, operands.hidden.shape[1] * operands.hidden.itemsize
    blocks, tiles = cdiv(operands.rows, tile.rows), cdiv(operands.columns, tile.columns)
    sizes = (tile.group, tile.rows * width, tile.columns * width, configs.defaults(device).cache)
    return cdiv(tiles, gemm.vocabulary_splits(blocks, tiles, configs.processors(device), *sizes)) * tile.columns


def target_logits(statistics: Tensor, operands: Operands, targets: Tensor, first: int, transform: Transform) -> None:
    """Launch the targets' z."""
    hidden, weight = operands.hidden, operands.weight
    launch(
        _linear_target_logit_kernel, (operands.rows,), hidden.device,
        hidden, weight, operands.bias, operands.indices, targets, statistics[TARGET_LOGIT], operands.columns,
        hidden.shape[1], hidden.stride(0), weight.stride(0), first, **factors(transform),
        **target_options(operands),
    )  # fmt: skip


def target_options(operands: Operands) -> dict[str, Any]:
    """BLOCK of the device function ``target_logit``, and the options of its launch."""
    block = min(configs.TARGET_PRODUCT.block, next_power_of_2(operands.hidden.shape[1]))
    return {"BLOCK": block, **configs.TARGET_PRODUCT.options}
