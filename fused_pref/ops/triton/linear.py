"""The linear head on a device: products whose logits never leave the chip.

The fused twins of :mod:`fused_pref.ops.torch.chunk`: what those read from a logits chunk, these make tile by tile.

- :func:`update_statistics`: the statistics of rows from a slice of the vocabulary; nothing of size N·V is written.
- :func:`gradient`: Q of a slice from the statistics of the whole rows, computed again.
- :func:`exponentials`: Q of the whole vocabulary, up to a factor for each row, and the statistics in the same product.
"""

# A launch gives values for constexpr arguments, and device code is not Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import LOGIT_SUM, ROW_MAX, SUM_EXP, TARGET_LOGIT, Operands, Transform
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.gemm import (
    arguments,
    logits_tile,
    quarter,
    quarters,
    store,
    tile_of,
    tile_order,
    vocabulary_splits,
)
from fused_pref.ops.triton.helpers import activation_backward, exp, transform
from fused_pref.ops.triton.launch import launch
from fused_pref.ops.triton.logprob import factors

# Columns whose maximum is the pivot of a row's exponentials, and how far above it (in nats) they may rise: far enough
# for any trained model, near enough that float32 sums and bfloat16 entries hold them.
PROBE, REACH = 1024, 40.0


@triton.jit
def _targets(targets, row, rows, first, ROWS: tl.constexpr):
    """Columns (int32) of the targets in this slice, outside of it for those of other slices.

    One of a label outside the vocabulary does not matter: such a row is NaN in any case.
    """
    r = row + tl.arange(0, ROWS)
    return (tl.load(targets + r, mask=r < rows, other=-1).to(tl.int64) - first).to(tl.int32)


@triton.jit
def _indices(indices, r, rows):
    """Rows (int64) of the hidden states that rows ``r`` stand for; those beyond the end stand for one that is there."""
    if indices is None:
        return tl.minimum(r, rows - 1).to(tl.int64)
    else:
        return tl.load(indices + r, mask=r < rows, other=0)


@triton.jit
def _without_targets(x, cols, y, end, logit_sum, inner, outer, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr):
    """Where part of a tile has the targets, its z with −inf there and beyond the end, and Σ z with it."""
    own = cols[None, :] == y[:, None]
    z = transform(x, inner, outer, TRANSFORM)
    if WITH_LOGIT_SUM:
        logit_sum += tl.sum(tl.where((cols < end)[None, :], z, 0.0), 1)
    return own, tl.where(own | (cols >= end)[None, :], float("-inf"), z), logit_sum


@triton.jit
def _linear_statistics_kernel(
    hidden, weight, bias, indices,  # see logits_tile
    targets,  # [N]
    partials,  # [splits, 3, N]: maximum and Σ exp(z − maximum) of the other entries, Σ z
    pivots,  # [N] or None: the exponentials are exp(z − pivot)
    before,  # [N] or None: pivots of an earlier pass, which a block of rows repeats only if one of its own has risen
    out,  # [N, width] or None: receives the exponentials, −1 at the targets, times the activation's slope; 0 beyond v
    rows, columns, features, hidden_stride, weight_stride, first, splits, split_columns,
    width, out_stride, inner, outer,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block, split = tile_order(tl.program_id(0), tl.cdiv(rows, ROWS), splits, GROUP)
    row = block * ROWS
    r = row + tl.arange(0, ROWS)
    if pivots is not None:
        pivot = tl.load(pivots + r, mask=r < rows, other=0.0)
    place = _indices(indices, r, rows)
    y = _targets(targets, row, rows, first, ROWS)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    logit_sum = tl.zeros([ROWS], tl.float32)
    begin = split * split_columns
    end = tl.minimum(begin + split_columns, columns)
    there = r < rows
    if before is not None:
        moved = tl.max((pivot != tl.load(before + r, mask=there, other=0.0)).to(tl.int32), 0)
        there = r < tl.where(moved > 0, rows, 0)
        end = tl.where(moved > 0, end, begin)
    for column in range(begin, end, COLUMNS):
        x = logits_tile(
            hidden, weight, place, row, column, columns, features, hidden_stride, weight_stride,
            HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        parts = quarters(x, ROWS, COLUMNS)
        for i in tl.static_range(4):
            cols, part = quarter(parts, i, bias, column, columns, COLUMNS)
            own, z, logit_sum = _without_targets(part, cols, y, end, logit_sum, inner, outer, TRANSFORM, WITH_LOGIT_SUM)
            risen = tl.maximum(row_max, tl.max(z, 1))
            if pivots is None:
                shift = tl.where(risen == float("-inf"), 0.0, risen)
                sum_exp = sum_exp * exp(row_max - shift) + tl.sum(exp(z - shift[:, None]), 1)
            else:
                e = exp(z - pivot[:, None])
                sum_exp += tl.sum(e, 1)
                e = activation_backward(tl.where(own, -1.0, e), part, inner, outer, TRANSFORM)
                store(out, e, row, r < rows, cols, width, out_stride, ROWS)
            row_max = risen
    part = tl.cast(split, tl.int64) * 3 * rows
    tl.store(partials + part + r, row_max, mask=there)
    tl.store(partials + (part + rows) + r, sum_exp, mask=there)
    tl.store(partials + (part + rows + rows) + r, logit_sum, mask=there)


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
    place = row
    if indices is not None:
        place = tl.load(indices + row)
    if (y >= 0) & (y < columns):
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, features, BLOCK):
            depth = start + tl.arange(0, BLOCK)
            h = tl.load(hidden + place * hidden_stride + depth, mask=depth < features, other=0.0).to(tl.float32)
            w = tl.load(weight + y * weight_stride + depth, mask=depth < features, other=0.0).to(tl.float32)
            sums += h * w
        x = tl.sum(sums, 0)
        if bias is not None:
            x += tl.load(bias + y).to(tl.float32)
        tl.store(target_logits + row, transform(x, inner, outer, TRANSFORM))


@triton.jit(do_not_specialize_on_alignment=["count"])
def _linear_gradient_kernel(
    hidden, weight, bias, indices,  # see logits_tile
    count,  # 0-d int or None: how many of the rows are wanted, the first ones
    targets,  # [N]
    statistics,  # [4, N]
    out,  # [N, v], receives Q
    rows, columns, features, hidden_stride, weight_stride, first, statistics_stride, out_stride, inner, outer,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block, tile = tile_order(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    row, column = block * ROWS, tile * COLUMNS
    if count is not None:
        rows = tl.load(count).to(tl.int32)
        if row >= rows:
            return
    r = row + tl.arange(0, ROWS)
    place = _indices(indices, r, rows)
    x = logits_tile(
        hidden, weight, place, row, column, columns, features, hidden_stride,
        weight_stride, HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    y = _targets(targets, row, rows, first, ROWS)
    row_max = tl.load(statistics + r, mask=r < rows, other=0.0)
    inverse = 1.0 / tl.maximum(tl.load(statistics + statistics_stride + r, mask=r < rows, other=1.0), 0.5)
    parts = quarters(x, ROWS, COLUMNS)
    for i in tl.static_range(4):
        cols, part = quarter(parts, i, bias, column, columns, COLUMNS)
        q = exp(transform(part, inner, outer, TRANSFORM) - row_max[:, None]) * inverse[:, None]
        q = activation_backward(tl.where(cols[None, :] == y[:, None], -1.0, q), part, inner, outer, TRANSFORM)
        store(out, q, row, r < rows, cols, columns, out_stride, ROWS)


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
    """See :meth:`fused_pref.ops.interface.FusedOps.update_statistics`.

    ``split_columns`` is the width of the parts that a row is split into; None: what keeps the device busy.
    """
    if operands.rows == 0 or operands.columns == 0:
        return statistics.new_empty((0, 3, operands.rows))
    _target_logits(statistics, operands, targets, first, transform)

    def with_tile(tile: configs.Tile) -> Tensor:
        return _partials(operands, targets, first, transform, logit_sum, tile, split_columns=split_columns)

    partials = with_tile(_tuned("linear_statistics", operands, configs.STATISTICS_TILE, transform, with_tile))
    row_max = torch.maximum(statistics[ROW_MAX], partials[:, 0].amax(0))
    statistics[SUM_EXP] *= (statistics[ROW_MAX] - row_max).exp_()
    statistics[SUM_EXP] += (partials[:, 1] * (partials[:, 0] - row_max).exp_()).sum(0)
    statistics[ROW_MAX] = row_max
    if logit_sum:
        statistics[LOGIT_SUM] += partials[:, 2].sum(0)
    return partials


def gradient(
    out: Tensor,
    operands: Operands,
    statistics: Tensor,
    targets: Tensor,
    first: int,
    transform: Transform,
    count: Tensor | None = None,
) -> None:
    """See :meth:`fused_pref.ops.interface.FusedOps.gradient`. One launch."""
    rows, columns = operands.rows, operands.columns
    if rows == 0 or columns == 0:
        return

    def with_tile(tile: configs.Tile) -> None:
        launch(
            _linear_gradient_kernel, (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),), out.device,
            indices=operands.indices, count=count, targets=targets, statistics=statistics, out=out, first=first,
            statistics_stride=statistics.stride(0), out_stride=out.stride(0), **arguments(operands, tile),
            **factors(transform), **tile.options,
        )  # fmt: skip

    with_tile(_tuned("linear_gradient", operands, configs.GRADIENT_TILE, transform, with_tile))


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
    probe = Operands(
        operands.hidden,
        operands.weight[:PROBE],
        None if operands.bias is None else operands.bias[:PROBE],
        operands.indices,
    )
    if operands.rows:
        _target_logits(statistics, operands, targets, 0, transform)
        # The maximum of nothing is the least finite number, as in other statistics.
        probe_tile = tile_of(probe, configs.STATISTICS_TILE, transform)
        low = _partials(probe, targets, 0, transform, False, probe_tile)[:, 0].amax(0)
        low.clamp_(min=torch.finfo(torch.float32).min)

        def with_tile(tile: configs.Tile) -> Tensor:
            return _partials(operands, targets, 0, transform, logit_sum, tile, Exponentials(out, low))

        tile = _tuned("linear_exponentials", operands, configs.EXPONENTIALS_TILE, transform, with_tile)
        partials = with_tile(tile)
        row_max = partials[:, 0].amax(0)
        high = torch.where(row_max - low > REACH, row_max, low)
        _partials(operands, targets, 0, transform, logit_sum, tile, Exponentials(out, high, low, partials))
        statistics[ROW_MAX], statistics[SUM_EXP] = high, partials[:, 1].sum(0)
        if logit_sum:
            statistics[LOGIT_SUM] = partials[:, 2].sum(0)
    sum_exp = statistics[SUM_EXP].to(out.dtype)
    scale = torch.where(sum_exp == 0, 1, sum_exp)
    here = (targets >= 0) & (targets < operands.columns)
    row, column = torch.arange(operands.rows, device=out.device), targets.long().where(here, 0)
    out[row, column] *= torch.where(here, scale, 1)
    return scale.to(statistics.dtype)


@dataclass(frozen=True)
class Exponentials:
    """Where a pass over the vocabulary leaves exp(z − pivot).

    Attributes:
        out: (N, V) or wider.
        pivots: (N,).
        before: (N,) pivots of an earlier pass: only where they differ is there something to do.
        partials: what the earlier pass gave, updated there.
    """

    out: Tensor
    pivots: Tensor
    before: Tensor | None = None
    partials: Tensor | None = None


def _partials(
    operands: Operands,
    targets: Tensor,
    first: int,
    transform: Transform,
    logit_sum: bool,
    tile: configs.Tile,
    exponentials: Exponentials | None = None,
    split_columns: int | None = None,
) -> Tensor:
    """Maximum, Σ exp(z − maximum or pivot) of the other entries and Σ z of each split of the slice, (splits, 3, N)."""
    rows, device = operands.rows, operands.hidden.device
    blocks, chunks = triton.cdiv(rows, tile.rows), triton.cdiv(operands.columns, tile.columns)
    if split_columns is None:
        width = operands.hidden.shape[1] * operands.hidden.itemsize
        sizes = (tile.group, tile.rows * width, tile.columns * width, configs.cache(device))
        parts = vocabulary_splits(blocks, chunks, configs.processors(device), *sizes)
        split_columns = triton.cdiv(chunks, parts) * tile.columns
    splits = triton.cdiv(operands.columns, split_columns)
    out = pivots = before = partials = None
    if exponentials is not None:
        out, pivots = exponentials.out, exponentials.pivots
        before, partials = exponentials.before, exponentials.partials
    if before is not None:
        # The kernel also holds what tells it whether to do anything: smaller tiles leave registers for that.
        tile = replace(tile, rows=min(tile.rows, 64))
    if partials is None:
        partials = torch.empty((splits, 3, rows), dtype=torch.float32, device=device)
    launch(
        _linear_statistics_kernel, (triton.cdiv(rows, tile.rows) * splits,), device,
        indices=operands.indices, targets=targets, partials=partials, pivots=pivots, before=before, out=out,
        first=first, splits=splits, split_columns=split_columns, width=0 if out is None else out.shape[1],
        out_stride=0 if out is None else out.stride(0), WITH_LOGIT_SUM=logit_sum, **arguments(operands, tile),
        **factors(transform), **tile.options,
    )  # fmt: skip
    return partials


def _tuned(
    kernel: str,
    operands: Operands,
    table: dict[tuple[str, int], configs.Tile],
    transform: Transform,
    with_tile: Callable[[configs.Tile], object],
) -> configs.Tile:
    """The tile of a table, or what a search prefers."""
    default, hidden = tile_of(operands, table, transform), operands.hidden
    flags = {
        transform.activation: transform.nonlinear,
        "bias": operands.bias is not None,
        "by index": operands.indices is not None,
    }
    name = ", ".join([kernel, *(flag for flag, value in flags.items() if value)])
    candidates = configs.tile_candidates(default, hidden.dtype)
    return configs.chosen(name, hidden.device, hidden.dtype, hidden.shape[1], default, candidates, with_tile)


def _target_logits(statistics: Tensor, operands: Operands, targets: Tensor, first: int, transform: Transform) -> None:
    """Launch the targets' z."""
    hidden, weight = operands.hidden, operands.weight
    launch(
        _linear_target_logit_kernel, (operands.rows,), hidden.device,
        hidden, weight, operands.bias, operands.indices, targets, statistics[TARGET_LOGIT], operands.columns,
        hidden.shape[1], hidden.stride(0), weight.stride(0), first, **factors(transform),
        BLOCK=min(configs.TARGET_PRODUCT.block, triton.next_power_of_2(hidden.shape[1])),
        **configs.TARGET_PRODUCT.options,
    )  # fmt: skip
