"""The Triton twin of :mod:`fused_pref.ops.torch.chunk`, under the same names."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import ENTROPY, FinishedRows, TargetRows, Transform
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.helpers import activation_backward, column_of, exp, transform
from fused_pref.ops.triton.launch import cdiv, launch
from fused_pref.ops.triton.logprob import aligned, factors
from fused_pref.ops.triton.softmax import entr, finished, row_softmax


@triton.jit
def _chunk_statistics_kernel(
    logits,  # [n, v]
    targets,  # [n]
    statistics,  # [4, n], or [8, n] with metrics, updated
    columns, first, logits_stride, targets_stride, statistics_stride, inner, outer,
    TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr, WITH_METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row * targets_stride).to(tl.int64) - first
    column = column_of(y, columns)
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    base = logits + tl.multiple_of(row * logits_stride, WIDTH)
    seen = statistics + row
    statistics_stride = tl.cast(statistics_stride, tl.int64)
    # Volatile loads are waited for where they stand: every thread has read the statistics before one of them writes.
    start_max = tl.load(seen, volatile=True)
    start_sum = tl.load(seen + statistics_stride, volatile=True)
    start_logit_sum = tl.load(seen + 3 * statistics_stride, volatile=True) if WITH_LOGIT_SUM else 0.0
    if WITH_METRICS:
        start_entropy = tl.load(seen + 4 * statistics_stride, volatile=True)
        start_sum_sq = tl.load(seen + 5 * statistics_stride, volatile=True)
    highest, sum_exp, logit_sum, entropy, sum_sq = row_softmax(
        base, 1, column, 0, columns, columns, inner, outer, TRANSFORM, ALIGNED, WITH_LOGIT_SUM, WITH_METRICS, BLOCK
    )
    row_max = tl.maximum(start_max, highest)
    target_logit = tl.load(base + column, mask=column >= 0, other=0.0).to(tl.float32)
    tl.debug_barrier()
    before, here = start_sum * exp(start_max - row_max), sum_exp * exp(highest - row_max)
    z = transform(target_logit, inner, outer, TRANSFORM)
    tl.store(seen, row_max)
    tl.store(seen + statistics_stride, before + here)
    tl.store(seen + 2 * statistics_stride, z, mask=column >= 0)
    if WITH_LOGIT_SUM:
        tl.store(seen + 3 * statistics_stride, start_logit_sum + logit_sum)
    if WITH_METRICS:
        total = tl.where(before + here == 0, 1.0, before + here)
        before, here = before / total, here / total
        tl.store(seen + 4 * statistics_stride, before * start_entropy + here * entropy + entr(before) + entr(here))
        tl.store(seen + 5 * statistics_stride, before * before * start_sum_sq + here * here * sum_sq)
        tl.store(seen + 6 * statistics_stride, row_max)
        tl.store(seen + 7 * statistics_stride, z, mask=column >= 0)


@triton.jit
def _chunk_gradient_kernel(
    logits,  # [n, v]
    targets,  # [n]
    statistics,  # [4, n]
    out,  # [n, v], may start where the chunk does, with narrower entries
    columns, first, logits_stride, targets_stride, statistics_stride, out_stride, inner, outer,
    TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row * targets_stride).to(tl.int64) - first
    row_max = tl.load(statistics + row)
    inverse = 1.0 / tl.maximum(tl.load(statistics + statistics_stride + row), 0.5)
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    source = logits + tl.multiple_of(row * logits_stride, WIDTH)
    out_row = out + tl.multiple_of(row * out_stride, WIDTH)
    end = columns // WIDTH * WIDTH
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(source + cols, mask=cols < end, other=0.0).to(tl.float32)
        # Narrow entries are written where wide ones were read: not before every thread has read its own.
        tl.debug_barrier()
        if start == 0:
            # Only the first block lies over itself. A barrier does not wait for loads under way, a sum of what was
            # loaded does: of NaNs there. The count never exceeds BLOCK, but the compiler does not know that, so it must
            # wait for the loads.
            y -= tl.sum((x != x).to(tl.int32), 0) > BLOCK
        q = exp(transform(x, inner, outer, TRANSFORM) - row_max) * inverse
        q = activation_backward(tl.where(cols == y, -1.0, q), x, inner, outer, TRANSFORM)
        tl.store(out_row + cols, q.to(out.dtype.element_ty), mask=cols < end)


@triton.jit
def _take_targets_kernel(
    q,  # [n, v], updated
    targets,  # [n]
    taken,  # [n]
    rows, columns, first, q_stride, targets_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    y = tl.load(targets + row * targets_stride, mask=inside, other=-1).to(tl.int64) - first
    here = inside & (y >= 0) & (y < columns)
    entry = q + row * q_stride + y
    tl.store(taken + row, tl.load(entry, mask=here, other=0.0).to(tl.float32), mask=inside)
    tl.store(entry, tl.zeros([BLOCK], q.dtype.element_ty), mask=here)


@triton.jit
def _finish_kernel(
    statistics,  # [4, n]
    targets,  # [n]
    logp, one_minus_p,  # [n]
    rows, columns, ignore_index, statistics_stride, targets_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    y = tl.load(targets + row * targets_stride, mask=inside, other=0).to(tl.int64)
    seen = statistics + row
    statistics_stride = tl.cast(statistics_stride, tl.int64)
    row_max = tl.load(seen, mask=inside, other=0.0)
    sum_exp = tl.load(seen + statistics_stride, mask=inside, other=1.0)
    target_logit = tl.load(seen + 2 * statistics_stride, mask=inside, other=0.0)
    value, others = finished(row_max, sum_exp, target_logit, y, columns, ignore_index)
    tl.store(logp + row, value, mask=inside)
    tl.store(one_minus_p + row, others, mask=inside)


@triton.jit
def _scatter_rows_kernel(
    source,  # [n, D]
    factor,  # [n]
    indices,  # [n] or None
    targets, target_q,  # [n] or None
    weight,  # [v, D] or None, with the targets
    out,  # [P, D], may be the source
    features, source_row, source_column, out_stride, columns, targets_stride, weight_row, weight_column,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row
    if indices is not None:
        place = tl.load(indices + row)
    a = tl.load(factor + row)
    WIDTH: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    base = source + tl.multiple_of(row * source_row, WIDTH)
    out_row = out + tl.multiple_of(place * out_stride, WIDTH)
    end = features // WIDTH * WIDTH
    if weight is not None:
        y = tl.load(targets + row * targets_stride).to(tl.int64)
        here = (y >= 0) & (y < columns)
        q = tl.load(target_q + row)
        own = weight + tl.multiple_of(tl.where(here, y, 0) * weight_row, WIDTH)
        last = tl.where(here, end, 0)
    for start in range(0, features, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(base + cols.to(tl.int64) * source_column, mask=cols < end, other=0.0).to(tl.float32)
        if weight is not None:
            x += q * tl.load(own + cols.to(tl.int64) * weight_column, mask=cols < last, other=0.0).to(tl.float32)
        tl.store(out_row + cols, (x * a).to(out.dtype.element_ty), mask=cols < end)


@triton.jit
def _add_target_rows_kernel(
    dw,  # [v, D], updated
    h,  # [n, D]
    factor,  # [n]
    targets, ends, order,  # [n]: targets in rising order, where the run of each ends, and which rows they are of
    features, columns, dw_stride, h_row, h_column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + first).to(tl.int64)
    before = tl.load(targets + first - 1, mask=first > 0, other=-1).to(tl.int64)
    # The first row of a target adds those of all.
    if (y != before) & (y >= 0) & (y < columns):
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        out = dw + y * dw_stride + cols
        total = tl.load(out, mask=cols < features, other=0.0).to(tl.float32)
        for place in range(first, tl.load(ends + first)):
            row = tl.load(order + place)
            source = h + row * h_row + cols.to(tl.int64) * h_column
            total += tl.load(factor + row) * tl.load(source, mask=cols < features, other=0.0).to(tl.float32)
        tl.store(out, total.to(dw.dtype.element_ty), mask=cols < features)


def update_statistics(
    statistics: Tensor, logits: Tensor, targets: Tensor, first: int, transform: Transform, *, logit_sum: bool
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.update_statistics`. One launch."""
    rows, columns = logits.shape
    if rows == 0:
        return
    config = configs.choose(configs.defaults(logits.device).forward, logits.device, logits.dtype, columns)
    launch(
        _chunk_statistics_kernel, (rows,), logits.device,
        logits, targets, statistics, columns, first, logits.stride(0), targets.stride(0), statistics.stride(0),
        **factors(transform), ALIGNED=aligned(logits), WITH_LOGIT_SUM=logit_sum,
        WITH_METRICS=len(statistics) > ENTROPY, BLOCK=config.block, **config.options,
    )  # fmt: skip


def exponentials(
    out: Tensor,
    logits: Tensor,
    statistics: Tensor,
    targets: Tensor,
    transform: Transform,
    ignore_index: int,
    *,
    logit_sum: bool,
    apart: bool,
) -> FinishedRows:
    """See :meth:`fused_pref.ops.interface.RowOps.exponentials`. Three launches; Q has its targets."""
    update_statistics(statistics, logits, targets, 0, transform, logit_sum=logit_sum)
    gradient(out, logits, statistics, targets, 0, transform)
    logp, one_minus_p = finish(statistics, targets, logits.shape[1], ignore_index)
    return FinishedRows(logp, one_minus_p, one_minus_p, None)


def gradient(
    out: Tensor, logits: Tensor, statistics: Tensor, targets: Tensor, first: int, transform: Transform
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.gradient`. One launch."""
    rows, columns = logits.shape
    if rows == 0:
        return
    config = configs.choose(configs.defaults(logits.device).backward, logits.device, logits.dtype, columns)
    launch(
        _chunk_gradient_kernel, (rows,), logits.device,
        logits, targets, statistics, out, columns, first, logits.stride(0), targets.stride(0), statistics.stride(0),
        out.stride(0), **factors(transform), ALIGNED=aligned(logits) and aligned(out), BLOCK=config.block,
        **config.options,
    )  # fmt: skip


def take_targets(q: Tensor, targets: Tensor, first: int) -> Tensor:
    """See :meth:`fused_pref.ops.interface.RowOps.take_targets`. One launch."""
    rows, columns = q.shape
    taken = torch.empty(rows, dtype=torch.float32, device=q.device)
    if rows:
        launch(
            _take_targets_kernel, (cdiv(rows, configs.ROWS.block),), q.device,
            q, targets, taken, rows, columns, first, q.stride(0), targets.stride(0), BLOCK=configs.ROWS.block,
            **configs.ROWS.options,
        )  # fmt: skip
    return taken


def finish(statistics: Tensor, targets: Tensor, columns: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """See :meth:`fused_pref.ops.interface.RowOps.finish`. One launch."""
    rows = targets.shape[0]
    logp, one_minus_p = torch.empty((2, rows), dtype=torch.float32, device=targets.device).unbind()
    if rows:
        launch(
            _finish_kernel, (cdiv(rows, configs.ROWS.block),), targets.device,
            statistics, targets, logp, one_minus_p, rows, columns, ignore_index, statistics.stride(0),
            targets.stride(0), BLOCK=configs.ROWS.block, **configs.ROWS.options,
        )  # fmt: skip
    return logp, one_minus_p


def scatter_rows(
    out: Tensor, source: Tensor, factor: Tensor, indices: Tensor | None = None, target_rows: TargetRows | None = None
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.scatter_rows`. One launch."""
    rows, features = source.shape
    if rows == 0:
        return
    targets, target_q, weight = target_rows or (None, None, None)
    sizes = (
        (0, 0, 0, 0)
        if target_rows is None
        else (target_rows.weight.shape[0], target_rows.targets.stride(0), *target_rows.weight.stride())
    )
    config = configs.choose(configs.defaults(out.device).backward, out.device, out.dtype, features)
    launch(
        _scatter_rows_kernel, (rows,), out.device,
        source, factor, indices, targets, target_q, weight, out, features, *source.stride(), out.stride(0), *sizes,
        ALIGNED=all(aligned(x) for x in (source, out, weight) if x is not None), BLOCK=config.block,
        **config.options,
    )  # fmt: skip


def add_target_rows(dw: Tensor, h: Tensor, factor: Tensor, targets: Tensor) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.add_target_rows`. A sort, and one launch."""
    rows, features = h.shape
    if rows == 0:
        return
    ordered, order = targets.sort(stable=True)
    ends = torch.searchsorted(ordered, ordered, right=True)
    config = configs.choose(configs.defaults(dw.device).backward, dw.device, dw.dtype, features)
    launch(
        _add_target_rows_kernel, (rows, cdiv(features, config.block)), dw.device,
        dw, h, factor, ordered, ends, order, features, dw.shape[0], dw.stride(0), *h.stride(), BLOCK=config.block,
        **config.options,
    )  # fmt: skip
