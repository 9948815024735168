"""A slab of logits on a device: the statistics of its rows, their gradient written over it, and rows of its products.

The device twins of :mod:`fused_pref.head.slab`, under the same names. One program walks a row from left to right.
"""

# A launch gives values for constexpr arguments, and device code is not Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.head.slab import Label
from fused_pref.head.spec import Transform
from fused_pref.kernels import configs
from fused_pref.kernels.helpers import bend, exp, transform
from fused_pref.kernels.logprob import aligned, factors


@triton.jit
def _slab_statistics_kernel(
    slab,  # [n, v]
    targets,  # [n]
    statistics,  # [4, n], updated
    columns, first, slab_stride, targets_stride, statistics_stride, inner, outer,
    TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr, TOTALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row * targets_stride).to(tl.int64) - first
    WIDTH: tl.constexpr = 128 // slab.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    base = slab + tl.multiple_of(row * slab_stride, WIDTH)
    # The quotient tells the compiler that the end falls between two accesses.
    end = columns // WIDTH * WIDTH
    seen = statistics + row
    statistics_stride = tl.cast(statistics_stride, tl.int64)
    start_top = tl.load(seen)
    top = start_top
    # Kept apart per lane: only the maximum is reduced inside the loop.
    others = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(base + cols, mask=cols < end, other=0.0).to(tl.float32)
        z = transform(x, inner, outer, TRANSFORM)
        if TOTALS:
            total += z  # 0 beyond the end
        z = tl.where((cols < columns) & (cols != y), z, float("-inf"))
        risen = tl.maximum(top, tl.max(z, 0))
        others = others * exp(top - risen) + exp(z - risen)
        top = risen
    tl.store(seen + statistics_stride, tl.load(seen + statistics_stride) * exp(start_top - top) + tl.sum(others, 0))
    tl.store(seen, top)
    here = (y >= 0) & (y < columns)
    label = tl.load(base + y, mask=here, other=0.0).to(tl.float32)
    tl.store(seen + 2 * statistics_stride, transform(label, inner, outer, TRANSFORM), mask=here)
    if TOTALS:
        tl.store(seen + 3 * statistics_stride, tl.load(seen + 3 * statistics_stride) + tl.sum(total, 0))


@triton.jit
def _slab_gradient_kernel(
    slab,  # [n, v]
    targets,  # [n]
    statistics,  # [4, n]
    sink,  # [n, v], may start where the slab does, with narrower entries
    columns, first, slab_stride, targets_stride, statistics_stride, sink_stride, inner, outer,
    TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row * targets_stride).to(tl.int64) - first
    top = tl.load(statistics + row)
    inverse = 1.0 / tl.maximum(tl.load(statistics + statistics_stride + row), 0.5)
    WIDTH: tl.constexpr = 128 // slab.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    source = slab + tl.multiple_of(row * slab_stride, WIDTH)
    out = sink + tl.multiple_of(row * sink_stride, WIDTH)
    end = columns // WIDTH * WIDTH
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(source + cols, mask=cols < end, other=0.0).to(tl.float32)
        # Narrow entries are written where wide ones were read: not before every thread has read its own.
        tl.debug_barrier()
        q = exp(transform(x, inner, outer, TRANSFORM) - top) * inverse
        q = bend(tl.where(cols == y, -1.0, q), x, inner, outer, TRANSFORM)
        tl.store(out + cols, q.to(sink.dtype.element_ty), mask=cols < end)


@triton.jit
def _place_rows_kernel(
    source,  # [n, D]
    factor,  # [n]
    places,  # [n] or None
    targets, label_q,  # [n] or None
    weight,  # [v, D] or None, with the targets
    sink,  # [P, D], may be the source
    features, source_row, source_column, sink_stride, columns, targets_stride, weight_row, weight_column,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row
    if places is not None:
        place = tl.load(places + row)
    a = tl.load(factor + row)
    WIDTH: tl.constexpr = 128 // sink.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    base = source + tl.multiple_of(row * source_row, WIDTH)
    out = sink + tl.multiple_of(place * sink_stride, WIDTH)
    end = features // WIDTH * WIDTH
    if weight is not None:
        y = tl.load(targets + row * targets_stride).to(tl.int64)
        here = (y >= 0) & (y < columns)
        q = tl.load(label_q + row)
        own = weight + tl.multiple_of(tl.where(here, y, 0) * weight_row, WIDTH)
        last = tl.where(here, end, 0)
    for start in range(0, features, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(base + cols.to(tl.int64) * source_column, mask=cols < end, other=0.0).to(tl.float32)
        if weight is not None:
            x += q * tl.load(own + cols.to(tl.int64) * weight_column, mask=cols < last, other=0.0).to(tl.float32)
        tl.store(out + cols, (x * a).to(sink.dtype.element_ty), mask=cols < end)


@triton.jit
def _add_labels_kernel(
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


def absorb(
    statistics: Tensor,
    slab: Tensor,
    targets: Tensor,
    first: int,
    transform: Transform,
    *,
    total: bool,
    sink: Tensor | None = None,
) -> None:
    """See :func:`fused_pref.head.slab.absorb`. One launch, two with a sink."""
    rows, columns = slab.shape
    if rows == 0:
        return
    config = configs.choose(configs.FORWARD, slab.device, slab.dtype, columns)
    _slab_statistics_kernel[rows,](
        slab, targets, statistics, columns, first, slab.stride(0), targets.stride(0), statistics.stride(0),
        **factors(transform), ALIGNED=aligned(slab), TOTALS=total, BLOCK=config.block, **config.options,
    )  # fmt: skip
    if sink is not None:
        gradient(sink, slab, statistics, targets, first, transform)


def gradient(sink: Tensor, slab: Tensor, statistics: Tensor, targets: Tensor, first: int, transform: Transform) -> None:
    """See :func:`fused_pref.head.slab.gradient`. One launch."""
    rows, columns = slab.shape
    if rows == 0:
        return
    config = configs.choose(configs.BACKWARD, slab.device, slab.dtype, columns)
    _slab_gradient_kernel[rows,](
        slab, targets, statistics, sink, columns, first, slab.stride(0), targets.stride(0), statistics.stride(0),
        sink.stride(0), **factors(transform), ALIGNED=aligned(slab) and aligned(sink), BLOCK=config.block,
        **config.options,
    )  # fmt: skip


def place_rows(
    sink: Tensor, source: Tensor, factor: Tensor, places: Tensor | None = None, label: Label | None = None
) -> None:
    """See :func:`fused_pref.head.slab.place_rows`. One launch."""
    rows, features = source.shape
    if rows == 0:
        return
    targets, label_q, weight = label or (None, None, None)
    sizes = (0, 0, 0, 0) if label is None else (label.weight.shape[0], label.targets.stride(0), *label.weight.stride())
    config = configs.choose(configs.BACKWARD, sink.device, sink.dtype, features)
    _place_rows_kernel[rows,](
        source, factor, places, targets, label_q, weight, sink, features, *source.stride(), sink.stride(0), *sizes,
        ALIGNED=all(aligned(x) for x in (source, sink, weight) if x is not None), BLOCK=config.block,
        **config.options,
    )  # fmt: skip


def add_labels(dw: Tensor, h: Tensor, factor: Tensor, targets: Tensor) -> None:
    """See :func:`fused_pref.head.slab.add_labels`. One launch after a sort; sums are in the order of the rows."""
    rows, features = h.shape
    if rows == 0:
        return
    ordered, order = targets.sort(stable=True)
    ends = torch.searchsorted(ordered, ordered, right=True)
    config = configs.choose(configs.BACKWARD, dw.device, dw.dtype, features)
    _add_labels_kernel[rows, triton.cdiv(features, config.block)](
        dw, h, factor, ordered, ends, order, features, dw.shape[0], dw.stride(0), *h.stride(), BLOCK=config.block,
        **config.options,
    )  # fmt: skip
