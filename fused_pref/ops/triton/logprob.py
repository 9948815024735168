"""Log-softmax and gather in one read of the logits: online Σ exp(z − max) over the entries other than the target.

A batch has N_total positions, S·T where it is padded.
"""

# A launch gives values for constexpr arguments, and device code is not Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import Transform
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.helpers import column_of, exp, log1p, row_offset, target_of, transform
from fused_pref.ops.triton.launch import launch


@triton.jit
def _columns(start, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns of the block at ``start`` in groups that a thread holds whole: [BLOCK // WIDTH, WIDTH].

    A group is what one access reads; where entries are read one by one, it is spread so that a warp's accesses adjoin.
    """
    group = tl.arange(0, BLOCK // WIDTH)[:, None]
    entry = tl.arange(0, WIDTH)[None, :]
    if ALIGNED:
        return start + group * WIDTH + entry
    else:
        return start + group + entry * (BLOCK // WIDTH)


@triton.jit
def _joined(row_maxes, sum_exp):
    """Maximum and sum of parts that have a maximum and a sum of exp(z − maximum) each."""
    row_max = tl.max(row_maxes, 0)
    # Where every entry is −inf there is nothing to scale.
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    return row_max, tl.sum(sum_exp * exp(row_maxes - shift), 0)


@triton.jit
def _finish(
    row, rows, base, stride, column, scored, row_max, sum_exp, inner, outer, logp, statistics, TRANSFORM: tl.constexpr
):
    """Store logp and the statistics of a row from the maximum and the sum of the entries other than its target's."""
    valid = column >= 0
    x = tl.load(base + column.to(tl.int64) * stride, mask=scored & valid, other=0.0).to(tl.float32)
    z = transform(x, inner, outer, TRANSFORM)
    risen = tl.where(valid, tl.maximum(row_max, z), row_max)
    sum_exp *= exp(tl.where(row_max == risen, 0.0, row_max - risen))
    # A label outside the vocabulary makes the log-prob and, by way of the sum, the row's gradient NaN.
    sum_exp = tl.where(valid, sum_exp, float("nan"))
    zy = z - risen
    ey = tl.where(valid, exp(zy), 0.0)
    value = tl.where(sum_exp < ey, -log1p(sum_exp / ey), zy - tl.log(sum_exp + ey))
    tl.store(logp + row, tl.where(scored, value, 0.0))
    tl.store(statistics + row, tl.where(scored, risen, 0.0))
    tl.store(statistics + (row + rows), tl.where(scored, sum_exp + ey, 0.0))
    tl.store(statistics + (row + rows + rows), tl.where(scored, sum_exp, 0.0))


@triton.jit
def _token_logps_fwd_kernel(
    logits,  # [S, T, V] or [N_total, V]
    labels,  # [S, T] or [N_total]
    cu_seqlens,  # [S+1] or None
    logp,  # [N_total]
    statistics,  # [3, N_total]
    means,  # [N_total] or None
    partials,  # [splits, 3, N_total] or None
    rows, length, columns, sequences, split_columns,
    logits_stride_s, logits_stride_t, logits_stride_v, labels_stride_s, labels_stride_t,
    ignore_index, inner, outer,
    PACKED: tl.constexpr, SHIFT: tl.constexpr, TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr,
    MEANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * split_columns
    y = target_of(
        row, labels, cu_seqlens, length, sequences, labels_stride_s, labels_stride_t, ignore_index, PACKED, SHIFT
    )
    scored = y != ignore_index
    column = column_of(y, columns)
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    base = logits + row_offset(row, length, logits_stride_s, logits_stride_t, WIDTH if ALIGNED else 1)
    # Kept apart per group of entries: nothing is exchanged between threads inside the loop.
    row_max = tl.full([BLOCK // WIDTH], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK // WIDTH], tl.float32)
    total = tl.zeros([BLOCK // WIDTH], tl.float32)
    if scored | (MEANS == "all"):
        # Entries that are read one by one have addresses a constant apart from one that moves with the block.
        moving = base + _columns(0, BLOCK, WIDTH, ALIGNED).to(tl.int64) * logits_stride_v
        # The quotient tells the compiler that the end falls between two accesses.
        end = columns // WIDTH * WIDTH if ALIGNED else columns
        for start in range(first, tl.minimum(first + split_columns, columns), BLOCK):
            cols = _columns(start, BLOCK, WIDTH, ALIGNED)
            pointers = base + cols if ALIGNED else moving + tl.cast(start, tl.int64) * logits_stride_v
            x = tl.load(pointers, mask=cols < end, other=0.0).to(tl.float32)
            z = transform(x, inner, outer, TRANSFORM)
            if means is not None:
                total += tl.sum(z, 1)  # z is 0 beyond the end
            if (start + BLOCK > columns) | ((start <= column) & (column < start + BLOCK)):
                z = tl.where((cols < columns) & (cols != column), z, float("-inf"))
            risen = tl.maximum(row_max, tl.max(z, 1))
            shift = tl.where(risen == float("-inf"), 0.0, risen)
            sum_exp = sum_exp * exp(row_max - shift) + tl.sum(exp(z - shift[:, None]), 1)
            row_max = risen
    highest, remainder = _joined(row_max, sum_exp)
    if partials is not None:
        part = (tl.program_id(1).to(tl.int64) * 3) * rows + row
        tl.store(partials + part, highest)
        tl.store(partials + (part + rows), remainder)
        tl.store(partials + (part + rows + rows), tl.sum(total, 0))
    else:
        _finish(
            row, rows, base, logits_stride_v, column, scored, highest, remainder, inner, outer, logp, statistics,
            TRANSFORM,
        )  # fmt: skip
        if means is not None:
            tl.store(means + row, tl.where(scored | (MEANS == "all"), tl.sum(total, 0) / columns, 0.0))


@triton.jit
def _token_logps_combine_kernel(
    logits, labels, cu_seqlens, logp, statistics, means, partials,
    rows, length, columns, sequences, splits,
    logits_stride_s, logits_stride_t, logits_stride_v, labels_stride_s, labels_stride_t,
    ignore_index, inner, outer,
    PACKED: tl.constexpr, SHIFT: tl.constexpr, TRANSFORM: tl.constexpr,
    MEANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the splits of each row, in their order."""
    row = tl.program_id(0).to(tl.int64)
    y = target_of(
        row, labels, cu_seqlens, length, sequences, labels_stride_s, labels_stride_t, ignore_index, PACKED, SHIFT
    )
    scored = y != ignore_index
    split = tl.arange(0, BLOCK)
    part = (split.to(tl.int64) * 3) * rows + row
    row_maxes = tl.load(partials + part, mask=split < splits, other=float("-inf"))
    sums = tl.load(partials + (part + rows), mask=split < splits, other=0.0)
    totals = tl.load(partials + (part + rows + rows), mask=split < splits, other=0.0)
    row_max, sum_exp = _joined(row_maxes, sums)
    base = logits + row_offset(row, length, logits_stride_s, logits_stride_t, 1)
    _finish(
        row, rows, base, logits_stride_v, column_of(y, columns), scored, row_max, sum_exp, inner, outer, logp,
        statistics, TRANSFORM,
    )  # fmt: skip
    if means is not None:
        tl.store(means + row, tl.where(scored | (MEANS == "all"), tl.sum(totals, 0) / columns, 0.0))


def geometry(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> dict[str, int]:
    """Sizes and strides of a batch, packed or padded, as the kernels take them."""
    packed = cu_seqlens is not None
    return {
        "length": labels.shape[-1],
        "columns": logits.shape[-1],
        "sequences": cu_seqlens.shape[0] - 1 if packed else labels.shape[0],
        "logits_stride_s": 0 if packed else logits.stride(0),
        "logits_stride_t": logits.stride(-2),
        "logits_stride_v": logits.stride(-1),
        "labels_stride_s": 0 if packed else labels.stride(0),
        "labels_stride_t": labels.stride(-1),
    }


def aligned(x: Tensor) -> bool:
    """Whether every row of x begins and ends on a multiple of 16 bytes, so that it can be read 16 bytes at a time."""
    apart = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    sizes = (x.shape[-1], *apart)
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(n * x.element_size() % 16 == 0 for n in sizes)


def factors(transform: Transform) -> dict[str, float | str]:
    """``inner``, ``outer`` and TRANSFORM of the device function ``transform``."""
    return {
        "inner": transform.inner,
        "outer": transform.outer,
        "TRANSFORM": "identity" if transform.identity else transform.activation,
    }


def token_logps_fwd(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    logits_mean: str | None,
    shift: bool,
    ignore_index: int,
    transform: Transform,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.head.custom_ops.token_logps_fwd`. One launch, and one to combine where rows are split."""
    rows, columns, device = labels.numel(), logits.shape[-1], logits.device
    logp = torch.empty(labels.shape, dtype=torch.float32, device=device)
    statistics = torch.empty((3, *labels.shape), dtype=torch.float32, device=device)
    means = torch.empty_like(logp)
    if rows == 0:
        return logp, statistics, means
    batch = geometry(logits, labels, cu_seqlens)
    flags = {"PACKED": cu_seqlens is not None, "SHIFT": shift, "MEANS": logits_mean, **factors(transform)}

    def with_config(config: configs.Config) -> None:
        chunks = triton.cdiv(columns, config.block)
        # Four programs for every processor keep its memory busy; each has at least two blocks.
        splits = max(1, min(triton.cdiv(4 * configs.processors(device), rows), chunks // 2))
        split_columns = triton.cdiv(chunks, splits) * config.block
        splits = triton.cdiv(columns, split_columns)
        partials = torch.empty((splits, 3, rows), dtype=torch.float32, device=device) if splits > 1 else None
        arguments = (logits, labels, cu_seqlens, logp, statistics, means if logits_mean else None, partials)
        launch(
            _token_logps_fwd_kernel, (rows, splits), device,
            *arguments, rows=rows, split_columns=split_columns, ignore_index=ignore_index, **batch, **flags,
            ALIGNED=aligned(logits), BLOCK=config.block, **config.options,
        )  # fmt: skip
        if splits > 1:
            combine = configs.Config(triton.next_power_of_2(splits), 1)
            launch(
                _token_logps_combine_kernel, (rows,), device,
                *arguments, rows=rows, splits=splits, ignore_index=ignore_index, **batch, **flags,
                BLOCK=combine.block, **combine.options,
            )  # fmt: skip

    default = configs.choose(configs.FORWARD, device, logits.dtype, columns)
    key = ("token_logps_fwd", device, logits.dtype, columns)
    with_config(configs.chosen(*key, default, configs.CANDIDATES, with_config))
    return logp, statistics, means
