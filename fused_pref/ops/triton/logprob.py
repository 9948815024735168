"""Log-softmax and gather in one read of the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.interface import Transform
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.helpers import column_of, exp, row_offset, transform
from fused_pref.ops.triton.launch import cdiv, launch, next_power_of_2
from fused_pref.ops.triton.softmax import entr, joined, log_prob, row_softmax


@triton.jit
def _finish(
    row, rows, base, stride, column, scored, row_max, sum_exp, entropy, sum_sq, inner, outer, logp, statistics, metrics,
    TRANSFORM: tl.constexpr,
):  # fmt: skip
    """Store logp, statistics and metrics of a row from what is known of the entries other than its target's."""
    valid = column >= 0
    x = tl.load(base + column.to(tl.int64) * stride, mask=scored & valid, other=0.0).to(tl.float32)
    z = transform(x, inner, outer, TRANSFORM)
    risen = tl.where(valid, tl.maximum(row_max, z), row_max)
    sum_exp *= exp(tl.where(row_max == risen, 0.0, row_max - risen))
    # A label outside the vocabulary makes the log-prob and, by way of the sum, the row's gradient NaN.
    sum_exp = tl.where(valid, sum_exp, float("nan"))
    zy = z - risen
    ey = tl.where(valid, exp(zy), 0.0)
    value = log_prob(zy, ey, sum_exp)
    tl.store(logp + row, tl.where(scored, value, 0.0))
    tl.store(statistics + row, tl.where(scored, risen, 0.0))
    tl.store(statistics + (row + rows), tl.where(scored, sum_exp + ey, 0.0))
    tl.store(statistics + (row + rows + rows), tl.where(scored, sum_exp, 0.0))
    if metrics is not None:
        one_minus_p, p = sum_exp / (sum_exp + ey), ey / (sum_exp + ey)
        found = one_minus_p * entropy + entr(one_minus_p) - tl.where(p > 0, p * value, -p)
        tl.store(metrics + row, tl.where(scored, found, 0.0))
        correct = tl.where(value == value, tl.where(z >= row_max, 1.0, 0.0), float("nan"))
        tl.store(metrics + (row + rows), tl.where(scored, correct, 0.0))
        found = tl.log(one_minus_p * one_minus_p * sum_sq + p * p)
        tl.store(metrics + (row + rows + rows), tl.where(scored, found, 0.0))


@triton.jit
def _token_logps_fwd_kernel(
    logits,  # [S, T, V] or [N_total, V]
    targets,  # [N_total]
    logp,  # [N_total]
    statistics,  # [3, N_total]
    means,  # [N_total] or None
    metrics,  # [3, N_total] or None: entropy, whether no logit is above the target's, log Σ p²
    partials,  # [splits, 3, N_total], with metrics [splits, 5, N_total], or None
    rows, length, columns, split_columns, logits_stride_s, logits_stride_t, logits_stride_v, ignore_index, inner, outer,
    TRANSFORM: tl.constexpr, ALIGNED: tl.constexpr, MEANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * split_columns
    y = tl.load(targets + row).to(tl.int64)
    scored = y != ignore_index
    column = column_of(y, columns)
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    base = logits + row_offset(row, length, logits_stride_s, logits_stride_t, WIDTH if ALIGNED else 1)
    last = tl.where(scored | (MEANS == "all"), tl.minimum(first + split_columns, columns), first)
    row_max, sum_exp, logit_sum, entropy, sum_sq = row_softmax(
        base, logits_stride_v, column, first, last, columns, inner, outer, TRANSFORM, ALIGNED, means is not None,
        metrics is not None, BLOCK,
    )  # fmt: skip
    if partials is not None:
        part = tl.program_id(1).to(tl.int64) * (5 if metrics is not None else 3) * rows + row
        tl.store(partials + part, row_max)
        tl.store(partials + (part + rows), sum_exp)
        tl.store(partials + (part + rows + rows), logit_sum)
        if metrics is not None:
            tl.store(partials + (part + rows + rows + rows), entropy)
            tl.store(partials + (part + rows + rows + rows + rows), sum_sq)
    else:
        _finish(
            row, rows, base, logits_stride_v, column, scored, row_max, sum_exp, entropy, sum_sq, inner, outer, logp,
            statistics, metrics, TRANSFORM,
        )  # fmt: skip
        if means is not None:
            tl.store(means + row, tl.where(scored | (MEANS == "all"), logit_sum / columns, 0.0))


@triton.jit
def _token_logps_combine_kernel(
    logits, targets, logp, statistics, means, metrics, partials,  # see _token_logps_fwd_kernel
    rows, length, columns, splits, logits_stride_s, logits_stride_t, logits_stride_v, ignore_index, inner, outer,
    TRANSFORM: tl.constexpr, MEANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the splits of each row, in their order."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + row).to(tl.int64)
    scored = y != ignore_index
    split = tl.arange(0, BLOCK)
    part = split.to(tl.int64) * (5 if metrics is not None else 3) * rows + row
    row_maxes = tl.load(partials + part, mask=split < splits, other=float("-inf"))
    sums = tl.load(partials + (part + rows), mask=split < splits, other=0.0)
    logit_sums = tl.load(partials + (part + rows + rows), mask=split < splits, other=0.0)
    row_max, sum_exp = joined(row_maxes, sums)
    entropy, sum_sq = 0.0, 0.0
    if metrics is not None:
        entropies = tl.load(partials + (part + rows + rows + rows), mask=split < splits, other=0.0)
        sum_sqs = tl.load(partials + (part + rows + rows + rows + rows), mask=split < splits, other=0.0)
        share = sums * exp(row_maxes - tl.where(row_max == float("-inf"), 0.0, row_max))
        share /= tl.where(sum_exp == 0, 1.0, sum_exp)
        entropy = tl.sum(share * entropies + entr(share), 0)
        sum_sq = tl.sum(share * share * sum_sqs, 0)
    base = logits + row_offset(row, length, logits_stride_s, logits_stride_t, 1)
    _finish(
        row, rows, base, logits_stride_v, column_of(y, columns), scored, row_max, sum_exp, entropy, sum_sq, inner,
        outer, logp, statistics, metrics, TRANSFORM,
    )  # fmt: skip
    if means is not None:
        tl.store(means + row, tl.where(scored | (MEANS == "all"), tl.sum(logit_sums, 0) / columns, 0.0))


def geometry(logits: Tensor) -> dict[str, int]:
    """Sizes and strides of logits (S, T, V) or (N_total, V), as the kernels take them."""
    return {
        "length": logits.shape[-2],
        "columns": logits.shape[-1],
        "logits_stride_s": logits.stride(0) if logits.dim() == 3 else 0,
        "logits_stride_t": logits.stride(-2),
        "logits_stride_v": logits.stride(-1),
    }


def aligned(x: Tensor) -> bool:
    """Whether every row of x begins and ends on a multiple of 16 bytes, so that it can be read 16 bytes at a time."""
    *sizes, columns = x.shape
    *strides, last = x.stride()
    whole = 16 // x.element_size()
    uneven = [stride for size, stride in zip(sizes, strides, strict=True) if size > 1 and stride % whole]
    return last == 1 and x.data_ptr() % 16 == 0 and columns % whole == 0 and not uneven


def factors(transform: Transform) -> dict[str, float | str]:
    """``inner``, ``outer`` and TRANSFORM of the device function ``transform``."""
    return {
        "inner": transform.inner,
        "outer": transform.outer,
        "TRANSFORM": "identity" if transform.identity else transform.activation,
    }


def token_logps_fwd(
    logits: Tensor,
    targets: Tensor,
    logits_mean: str | None,
    ignore_index: int,
    transform: Transform,
    metrics: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.head.autograd.token_logps_fwd`. One launch, and one to combine where rows are split."""
    rows, columns, device = targets.numel(), logits.shape[-1], logits.device
    logp = torch.empty(targets.shape, dtype=torch.float32, device=device)
    statistics = torch.empty((3, *targets.shape), dtype=torch.float32, device=device)
    means, found = torch.empty_like(logp), logp.new_empty((3, *targets.shape) if metrics else (3, 0))
    if rows == 0:
        return logp, statistics, means, found
    sizes, flags = geometry(logits), {"MEANS": logits_mean, **factors(transform)}

    def with_config(config: configs.Config) -> None:
        chunks = cdiv(columns, config.block)
        # Four programs for every processor keep its memory busy; each has at least two blocks.
        splits = max(1, min(cdiv(4 * configs.processors(device), rows), chunks // 2))
        split_columns = cdiv(chunks, splits) * config.block
        splits = cdiv(columns, split_columns)
        shape = (splits, 5 if metrics else 3, rows)
        partials = torch.empty(shape, dtype=torch.float32, device=device) if splits > 1 else None
        asked = (means if logits_mean else None, found if metrics else None)
        arguments = (logits, targets, logp, statistics, *asked, partials)
        launch(
            _token_logps_fwd_kernel, (rows, splits), device,
            *arguments, rows=rows, split_columns=split_columns, ignore_index=ignore_index, **sizes, **flags,
            ALIGNED=aligned(logits), BLOCK=config.block, **config.options,
        )  # fmt: skip
        if splits > 1:
            combine = configs.Config(next_power_of_2(splits), 1)
            launch(
                _token_logps_combine_kernel, (rows,), device,
                *arguments, rows=rows, splits=splits, ignore_index=ignore_index, **sizes, **flags,
                BLOCK=combine.block, **combine.options,
            )  # fmt: skip

    default = configs.choose(configs.defaults(device).forward, device, logits.dtype, columns)
    key = ("token_logps_fwd", device, logits.dtype, columns)
    with_config(configs.chosen(*key, default, configs.CANDIDATES, with_config))
    return logp, statistics, means, found
