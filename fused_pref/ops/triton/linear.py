"""The linear head on a device: products whose logits never leave the chip.

The fused twins of :mod:`fused_pref.ops.torch.chunk`: what those read from a logits chunk, these make tile by tile.

- :func:`~fused_pref.ops.triton.statistics.update_statistics`: the statistics of rows from a slice of the vocabulary;
  nothing of size N·V is written.
- :func:`gradient`: Q of a slice from the statistics of the whole rows, computed again.
- :func:`~fused_pref.ops.triton.exponentials.exponentials`: Q of the whole vocabulary, up to a factor for each row, and
  the statistics in the same product.
"""

import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import Operands, Transform
from fused_pref.ops.triton import configs, gemm
from fused_pref.ops.triton.exponentials import exponentials
from fused_pref.ops.triton.helpers import activation_backward, exp, transform
from fused_pref.ops.triton.launch import cdiv, launch
from fused_pref.ops.triton.logprob import factors
from fused_pref.ops.triton.statistics import update_statistics

__all__ = ["exponentials", "gradient", "update_statistics"]


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
    block, tile = gemm.tile_order(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    row, column = block * ROWS, tile * COLUMNS
    if count is not None:
        rows = tl.load(count).to(tl.int32)
        if row >= rows:
            return
    r = row + tl.arange(0, ROWS)
    place = gemm.indices_at(indices, r, rows)
    x = gemm.logits_tile(
        hidden, weight, place, row, column, columns, features, hidden_stride,
        weight_stride, HIDDEN_DESCRIPTOR, WEIGHT_DESCRIPTOR, WHOLE, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    y = gemm.targets_at(targets, row, rows, first, ROWS)
    row_max = tl.load(statistics + r, mask=r < rows, other=0.0)
    inverse = 1.0 / tl.maximum(tl.load(statistics + statistics_stride + r, mask=r < rows, other=1.0), 0.5)
    parts = gemm.quarters(x, ROWS, COLUMNS)
    for i in tl.static_range(4):
        cols, part = gemm.quarter(parts, i, bias, column, columns, COLUMNS)
        q = exp(transform(part, inner, outer, TRANSFORM) - row_max[:, None]) * inverse[:, None]
        q = activation_backward(tl.where(cols[None, :] == y[:, None], -1.0, q), part, inner, outer, TRANSFORM)
        gemm.store(out, q, row, r < rows, cols, columns, out_stride, ROWS)


def gradient(
    out: Tensor,
    operands: Operands,
    statistics: Tensor,
    targets: Tensor,
    first: int,
    transform: Transform,
    count: Tensor | None = None,
) -> None:
    """As :meth:`fused_pref.ops.interface.RowOps.gradient`, of the first ``count`` rows (0-d; None: all). One launch."""
    rows, columns = operands.rows, operands.columns
    if rows == 0 or columns == 0:
        return

    def with_tile(tile: configs.Tile) -> None:
        launch(
            _linear_gradient_kernel, (cdiv(rows, tile.rows) * cdiv(columns, tile.columns),), out.device,
            indices=operands.indices, count=count, targets=targets, statistics=statistics, out=out, first=first,
            statistics_stride=statistics.stride(0), out_stride=out.stride(0), **gemm.arguments(operands, tile),
            **factors(transform), **tile.options,
        )  # fmt: skip

    default = configs.defaults(out.device).statistics
    with_tile(gemm.tuned_tile("linear_gradient", operands, default, transform, with_tile))
