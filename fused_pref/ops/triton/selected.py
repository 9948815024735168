"""Products of selected rows, of which the device alone knows how many there are.

A list of row numbers begins with those that are selected, and a count says how many: programs beyond it return at once,
and loops end there, so that the host need not wait. Used by :mod:`fused_pref.head.plans.skipping`.
"""

import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.triton import configs
from fused_pref.ops.triton.gemm import constants, multiplied, tile_order
from fused_pref.ops.triton.launch import cdiv, launch


# Counts are entries of one tensor: their differing alignment must not compile the kernel again.
@triton.jit(do_not_specialize_on_alignment=["count"])
def _selected_weight_kernel(
    q,  # [N, v], row i belongs to the i-th of the indices
    hidden,  # [N_total, D]
    indices,  # [N] int64 rows of hidden, the selected ones first
    count,  # 0-d int, how many are selected
    scale,  # 0-d or None, factor on the result
    out,  # [v, D], written
    columns, features, q_stride, hidden_stride, out_stride,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Qᵀ hidden over the selected rows."""
    block, part = tile_order(tl.program_id(0), tl.cdiv(columns, ROWS), tl.cdiv(features, COLUMNS), GROUP)
    v, d = block * ROWS + tl.arange(0, ROWS), part * COLUMNS + tl.arange(0, COLUMNS)
    selected = tl.load(count).to(tl.int32)
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, selected, DEPTH):
        n = start + tl.arange(0, DEPTH)
        there = (n < selected)[:, None]
        place = tl.load(indices + n, mask=n < selected, other=0)
        a = tl.load(q + n.to(tl.int64)[:, None] * q_stride + v[None, :], mask=there & (v < columns)[None, :], other=0.0)
        b = tl.load(
            hidden + place[:, None] * hidden_stride + d[None, :], mask=there & (d < features)[None, :], other=0.0
        )
        x = multiplied(a.T, b, x, PRECISION, UPCAST)
    if scale is not None:
        x *= tl.load(scale)
    inside = (v < columns)[:, None] & (d < features)[None, :]
    tl.store(out + v.to(tl.int64)[:, None] * out_stride + d[None, :], x.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["count"])
def _selected_hidden_kernel(
    q,  # [N, v], see above
    weight,  # [v, D]
    indices,  # [N] int64 rows of sums, no row twice
    count,  # 0-d int
    sums,  # [N_total, D], added to
    rows, columns, features, q_stride, weight_stride, sums_stride,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Q weight, each row added at its place."""
    block, part = tile_order(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(features, COLUMNS), GROUP)
    selected = tl.load(count).to(tl.int32)
    if block * ROWS >= selected:
        return
    n, d = block * ROWS + tl.arange(0, ROWS), part * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, columns, DEPTH):
        v = start + tl.arange(0, DEPTH)
        a = tl.load(
            q + n.to(tl.int64)[:, None] * q_stride + v[None, :],
            mask=(n < selected)[:, None] & (v < columns)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            weight + v.to(tl.int64)[:, None] * weight_stride + d[None, :],
            mask=(v < columns)[:, None] & (d < features)[None, :], other=0.0,
        )  # fmt: skip
        x = multiplied(a, b, x, PRECISION, UPCAST)
    place = tl.load(indices + n, mask=n < selected, other=0)
    pointers = sums + place[:, None] * sums_stride + d[None, :]
    inside = (n < selected)[:, None] & (d < features)[None, :]
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + x, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["count"])
def _selected_bias_kernel(
    q,  # [N, v], see above
    factor,  # [N_total]
    indices,  # [N] int64 entries of factor
    count,  # 0-d int
    out,  # [v], written
    columns, q_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Qᵀ factor over the selected rows."""
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    selected = tl.load(count).to(tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, selected, ROWS):
        n = start + tl.arange(0, ROWS)
        f = tl.load(factor + tl.load(indices + n, mask=n < selected, other=0), mask=n < selected, other=0.0)
        inside = (n < selected)[:, None] & (v < columns)[None, :]
        x = tl.load(q + n.to(tl.int64)[:, None] * q_stride + v[None, :], mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32) * f[:, None], 0)
    tl.store(out + v, total, mask=v < columns)


def weight_product(
    out: Tensor, q: Tensor, hidden: Tensor, indices: Tensor, count: Tensor, scale: Tensor | None
) -> None:
    """Write Qᵀ hidden of the selected rows, times ``scale`` (0-d), into ``out`` (v, D). One launch.

    Args:
        out: a slice of dW, of any float dtype.
        q: (N, v) of the dtype of ``hidden``; what is beyond the selected rows is not read.
        hidden: (N_total, D).
        indices: (N,) int64 rows of ``hidden``.
        count: 0-d, how many of them are selected.
        scale: None for 1.
    """
    columns, features = out.shape
    tile = _tile(q, hidden)
    grid = (cdiv(columns, tile.rows) * cdiv(features, tile.columns),)
    launch(
        _selected_weight_kernel, grid, out.device,
        q, hidden, indices, count, scale, out, columns, features, q.stride(0), hidden.stride(0), out.stride(0),
        **constants(q, tile), **tile.options,
    )  # fmt: skip


def hidden_product(sums: Tensor, q: Tensor, weight: Tensor, indices: Tensor, count: Tensor) -> None:
    """Add Q weight of the selected rows to the rows ``indices`` of ``sums`` (N_total, D) float32. One launch."""
    columns, features = weight.shape
    tile = _tile(q, weight)
    grid = (cdiv(q.shape[0], tile.rows) * cdiv(features, tile.columns),)
    launch(
        _selected_hidden_kernel, grid, sums.device,
        q, weight, indices, count, sums, q.shape[0], columns, features, q.stride(0), weight.stride(0), sums.stride(0),
        **constants(q, tile), **tile.options,
    )  # fmt: skip


def bias_product(out: Tensor, q: Tensor, factor: Tensor, indices: Tensor, count: Tensor) -> None:
    """Write Qᵀ factor of the selected rows into ``out`` (v,) float32; factor (N_total,) float32. One launch."""
    config = configs.SELECTED_BIAS
    launch(
        _selected_bias_kernel, (cdiv(out.shape[0], config.block),), out.device,
        q, factor, indices, count, out, out.shape[0], q.stride(0), ROWS=16, BLOCK=config.block, **config.options,
    )  # fmt: skip


def _tile(q: Tensor, other: Tensor) -> configs.Tile:
    if configs.interpreted(q.device):
        return configs.INTERPRETER_TILE
    if not (configs.rows_aligned(q) and configs.rows_aligned(other)):
        return configs.UNALIGNED_TILE
    own = configs.defaults(q.device)
    return own.exact if q.dtype.itemsize == 4 else own.selected
