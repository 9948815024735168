"""A tile of logits in registers: rows of the hidden states times rows of the head's weight.

:func:`logits_tile` is the product that the fused kernels of the head put their epilogues to;
:class:`~fused_pref.ops.interface.Operands` is what a launch gives it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_pref.ops.interface import Operands, Transform
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.helpers import transform
from fused_pref.ops.triton.launch import cdiv


@triton.jit
def tile_order(number, row_blocks, splits, GROUP: tl.constexpr):
    """Row block and split of a program: GROUP row blocks in a row share a split of the weight in the cache."""
    band = number // (GROUP * splits)
    place = number - band * (GROUP * splits)
    height = tl.minimum(row_blocks - band * GROUP, GROUP)
    return band * GROUP + place % height, place // height


@triton.jit
def logits_tile(
    hidden,  # [N_total, D], or the descriptor of its blocks [ROWS, DEPTH]
    weight,  # [V, D], or the descriptor of its blocks [COLUMNS, DEPTH]
    indices,  # [ROWS] int64 rows of hidden
    row, column, columns, features, hidden_stride, weight_stride,
    HIDDEN_DESCRIPTOR: tl.constexpr, WEIGHT_DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, COLUMNS] float32, the rows at ``indices`` (from ``row`` on with a descriptor)."""
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    rows_of_hidden = hidden_rows(hidden, indices, hidden_stride, HIDDEN_DESCRIPTOR, DEPTH)
    rows_of_weight = weight_rows(weight, column, columns, weight_stride, WEIGHT_DESCRIPTOR, COLUMNS, DEPTH)
    for start in range(0, features, DEPTH):
        a = block(rows_of_hidden, row, start, features, HIDDEN_DESCRIPTOR, WHOLE, DEPTH)
        b = block(rows_of_weight, column, start, features, WEIGHT_DESCRIPTOR, WHOLE, DEPTH)
        x = multiplied(a, b.T, x, PRECISION, UPCAST)
    return x


@triton.jit
def hidden_rows(hidden, indices, stride, DESCRIPTOR: tl.constexpr, DEPTH: tl.constexpr):
    """Pointers [ROWS, DEPTH] to the first block of the rows at ``indices``; or their descriptor."""
    if DESCRIPTOR:
        return hidden
    else:
        return hidden + indices[:, None] * stride + tl.arange(0, DEPTH)[None, :]


@triton.jit
def weight_rows(
    weight, column, columns, stride, DESCRIPTOR: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Pointers [COLUMNS, DEPTH] to the first block of the rows from ``column`` on; or their descriptor.

    Columns beyond the end repeat the last: what they give is not used.
    """
    if DESCRIPTOR:
        return weight
    else:
        own = tl.minimum(tl.arange(0, COLUMNS), columns - 1 - column)
        return weight + tl.cast(column, tl.int64) * stride + own[:, None] * stride + tl.arange(0, DEPTH)[None, :]


@triton.jit
def block(rows, row, start, features, DESCRIPTOR: tl.constexpr, WHOLE: tl.constexpr, DEPTH: tl.constexpr):
    """The block from ``start`` on of rows (those from ``row`` on with a descriptor), 0 beyond the last feature."""
    if DESCRIPTOR:
        return rows.load([row, start])
    elif WHOLE:
        return tl.load(rows + start)
    else:
        return tl.load(rows + start, mask=(start + tl.arange(0, DEPTH) < features)[None, :], other=0.0)


@triton.jit
def multiplied(a, b, x, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """x + a · b."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, x, input_precision=PRECISION)


@triton.jit
def targets_at(targets, row, rows, first, ROWS: tl.constexpr):
    """Columns (int32) of the targets in this slice, outside of it for those of other slices.

    One of a label outside the vocabulary does not matter: such a row is NaN in any case.
    """
    r = row + tl.arange(0, ROWS)
    return (tl.load(targets + r, mask=r < rows, other=-1).to(tl.int64) - first).to(tl.int32)


@triton.jit
def indices_at(indices, r, rows):
    """Rows (int64) of the hidden states that rows ``r`` stand for; those beyond the end stand for one that is there."""
    if indices is None:
        return tl.minimum(r, rows - 1).to(tl.int64)
    else:
        return tl.load(indices + r, mask=r < rows, other=0)


@triton.jit
def quarters(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile in four, from left to right: an epilogue that takes one after another needs fewer registers."""
    left, right = x.reshape([ROWS, 2, COLUMNS // 2]).permute(0, 2, 1).split()
    a, b = left.reshape([ROWS, 2, COLUMNS // 4]).permute(0, 2, 1).split()
    c, d = right.reshape([ROWS, 2, COLUMNS // 4]).permute(0, 2, 1).split()
    return a, b, c, d


@triton.jit
def quarter(parts, NUMBER: tl.constexpr, bias, column, columns, COLUMNS: tl.constexpr):
    """Columns of one of the quarters of the tile at ``column``, and the quarter with their bias."""
    cols = column + NUMBER * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    x = parts[NUMBER]
    if bias is not None:
        x += tl.load(bias + tl.minimum(cols, columns - 1)).to(tl.float32)[None, :]
    return cols, x


@triton.jit
def without_targets(x, cols, y, end, logit_sum, inner, outer, TRANSFORM: tl.constexpr, WITH_LOGIT_SUM: tl.constexpr):
    """Where part of a tile has the targets, its z with −inf there and beyond the end, and Σ z with it."""
    own = cols[None, :] == y[:, None]
    z = transform(x, inner, outer, TRANSFORM)
    if WITH_LOGIT_SUM:
        logit_sum += tl.sum(tl.where((cols < end)[None, :], z, 0.0), 1)
    return own, tl.where(own | (cols >= end)[None, :], float("-inf"), z), logit_sum


@triton.jit
def store(out, x, row, inside, cols, end, stride, ROWS: tl.constexpr):
    """Part of a tile to its place in ``out``: offsets inside a tile are int32, which spares registers."""
    offsets = tl.arange(0, ROWS)[:, None] * stride + cols[None, :]
    pointers = out + tl.cast(row, tl.int64) * stride + offsets
    tl.store(pointers, x.to(out.dtype.element_ty), mask=inside[:, None] & (cols < end)[None, :])


def tile_of(operands: Operands, tile: configs.Tile, transform: Transform, *, metrics: bool = False) -> configs.Tile:
    """The tile of 16-bit entries, or what suits these operands, their transform and what is asked for better."""
    hidden, weight, own = operands.hidden, operands.weight, configs.defaults(operands.hidden.device)
    if configs.interpreted(hidden.device):
        return configs.INTERPRETER_TILE
    if hidden.dtype.itemsize == 4:
        tile = own.exact
    elif transform.nonlinear or operands.bias is not None or metrics or operands.columns % 16:
        tile = own.high_pressure
    aligned = configs.rows_aligned(hidden) and configs.rows_aligned(weight)
    return tile if aligned and hidden.shape[1] % tile.depth == 0 else configs.UNALIGNED_TILE


def tuned_tile(
    kernel: str,
    operands: Operands,
    tile: configs.Tile,
    transform: Transform,
    with_tile: Callable[[configs.Tile], object],
    *,
    metrics: bool = False,
    flattened: bool = False,
) -> configs.Tile:
    """What :func:`tile_of` or a search prefers; ``flattened``: the kernel has that form, too."""
    default, hidden = tile_of(operands, tile, transform, metrics=metrics), operands.hidden
    chooser = configs.chooser
    if chooser is None:
        return default
    flags = {
        transform.activation: transform.nonlinear,
        "bias": operands.bias is not None,
        "by index": operands.indices is not None,
        "metrics": metrics,
    }
    name = ", ".join([kernel, *(flag for flag, value in flags.items() if value)])
    candidates = configs.tile_candidates(default, hidden.dtype, flattened=flattened)
    return chooser(name, hidden.device, hidden.dtype, hidden.shape[1], default, candidates, with_tile)


def arguments(operands: Operands, tile: configs.Tile) -> dict[str, Any]:
    """Keywords of a kernel that calls :func:`logits_tile`."""
    hidden, weight, features = operands.hidden, operands.weight, operands.hidden.shape[1]
    hidden_descriptor = tile.descriptors and operands.indices is None and describable(hidden)
    weight_descriptor = tile.descriptors and describable(weight)
    return {
        "hidden": TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]) if hidden_descriptor else hidden,
        "weight": TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if weight_descriptor else weight,
        "bias": operands.bias,
        "rows": operands.rows,
        "columns": operands.columns,
        "features": features,
        "hidden_stride": hidden.stride(0),
        "weight_stride": weight.stride(0),
        "HIDDEN_DESCRIPTOR": hidden_descriptor,
        "WEIGHT_DESCRIPTOR": weight_descriptor,
        "WHOLE": features % tile.depth == 0,
        **constants(hidden, tile),
    }


@functools.lru_cache(maxsize=1024)
def vocabulary_splits(
    blocks: int, tiles: int, processors: int, group: int, row_bytes: int, column_bytes: int, cache: int
) -> int:
    """Into how many parts the vocabulary's tiles go.

    So many that the last processor finishes nearly as early as possible, and little memory is read: of the numbers
    within 2% of the fewest tile steps, the one that reads the least, by an estimate. A program reads its row block
    again for every tile: from the cache, if that holds the row blocks at work and a tile for each split.
    ``benchmarks/static.md`` has what a simulation of the cache says of the choice.

    Args:
        blocks: row blocks.
        tiles: of the vocabulary, which each row block is multiplied with.
        processors: of the device.
        group: row blocks that share a split before the next ones begin.
        row_bytes: of a row block of the hidden states.
        column_bytes: of a tile of the weight.
        cache: bytes of the device's last cache.
    """

    def steps(splits: int) -> int:
        return cdiv(blocks * splits, processors) * cdiv(tiles, splits)

    def moved(splits: int) -> float:
        # Those at work may begin and end within a group.
        rows = min(blocks, cdiv(processors, splits) + group)
        weight = tiles * column_bytes * max(1.0, blocks * splits / processors)
        fits = rows * row_bytes + splits * column_bytes <= cache
        return weight + row_bytes * (blocks if fits else rows * steps(splits))

    most = max(cdiv(8 * processors, blocks), cdiv(processors, min(group, blocks)))
    counts = range(1, max(1, min(tiles, most)) + 1)
    enough = 1.02 * min(map(steps, counts))
    return min((n for n in counts if steps(n) <= enough), key=moved)


def describable(x: Tensor) -> bool:
    """Whether blocks of x can be read through a descriptor: rows of whole 16 bytes."""
    stride, step = x.stride()
    apart = stride * x.element_size()
    return step == 1 and 0 < apart < 2**40 and apart % 16 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0


def constants(x: Tensor, tile: configs.Tile) -> dict[str, Any]:
    """What a kernel needs to know of products of x and another of its dtype, and of the tile, to be compiled."""
    return {
        "PRECISION": precision(x.dtype),
        # The interpreter multiplies the bits of 16-bit entries.
        "UPCAST": configs.interpreted(x.device) and x.dtype.itemsize == 2,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
    }


def precision(dtype: torch.dtype) -> str:
    """Of float32 products: exact unless PyTorch was told otherwise."""
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
