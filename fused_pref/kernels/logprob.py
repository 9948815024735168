"""Log-softmax and gather in one read of the logits: online Σ exp(z − max) over the entries other than the target."""

# A launch takes arguments that the kernel does not declare (num_warps), and device code is not Python.
# pyright: reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.head.spec import Transform
from fused_pref.kernels import configs
from fused_pref.kernels.helpers import log1p, target_of, transform

MEANS = {None: 0, "completion": 1, "all": 2}


@triton.jit
def _finish(row, rows, x, scored, valid, top, others, inner, outer, logp, statistics, SOFTCAP: tl.constexpr):
    """Store logp and the statistics of a row from its maximum, its other entries' sum and its target's logit x."""
    zy = transform(x, inner, outer, SOFTCAP) - top
    ey = tl.exp(zy)
    # A label outside the vocabulary makes the log-prob and, by way of the sum, the row's gradient NaN.
    others = tl.where(valid, others, float("nan"))
    value = tl.where(others < ey, -log1p(others / ey), zy - tl.log(others + ey))
    tl.store(logp + row, tl.where(scored, value, 0.0))
    tl.store(statistics + row, tl.where(scored, top, 0.0))
    tl.store(statistics + rows + row, tl.where(scored, others + ey, 0.0))
    tl.store(statistics + 2 * rows + row, tl.where(scored, others, 0.0))


@triton.jit
def _token_logps_fwd_kernel(
    logits,  # [S, T, V] or [N_total, V]
    labels,  # [S, T] or [N_total]
    cu_seqlens,  # [S+1] or None
    logp,  # [N]
    statistics,  # [3, N]
    means,  # [N] or None
    partials,  # [splits, 3, N] or None
    rows, length, columns, sequences, split_columns,
    logits_stride_s, logits_stride_t, logits_stride_v, labels_stride_s, labels_stride_t,
    ignore_index, inner, outer,
    PACKED: tl.constexpr, SHIFT: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
    MEANS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * split_columns
    y = target_of(
        row, labels, cu_seqlens, length, sequences, labels_stride_s, labels_stride_t, ignore_index, PACKED, SHIFT
    )
    scored = y != ignore_index
    valid = (y >= 0) & (y < columns)
    base = logits + (row // length) * logits_stride_s + (row % length) * logits_stride_t
    top = float("-inf")
    # Kept apart per lane: only the maximum is reduced inside the loop.
    others = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if scored | (MEANS == 2):
        for start in range(first, tl.minimum(first + split_columns, columns), BLOCK):
            cols = start + tl.arange(0, BLOCK)
            offsets = cols if UNIT else cols.to(tl.int64) * logits_stride_v
            x = tl.load(base + offsets, mask=cols < columns, other=float("-inf")).to(tl.float32)
            z = transform(x, inner, outer, SOFTCAP)
            if MEANS > 0:
                total += tl.where(cols < columns, z, 0.0)
            # Scale and softcap may lift the filler above −inf.
            z = tl.where(cols < columns, z, float("-inf"))
            risen = tl.maximum(top, tl.max(z, 0))
            # While every entry is −inf there is nothing to scale.
            shift = tl.where(risen == float("-inf"), 0.0, risen)
            others = others * tl.exp(top - shift) + tl.where(cols == y, 0.0, tl.exp(z - shift))
            top = risen
    others = tl.sum(others, 0)
    total = tl.sum(total, 0)
    if SPLIT:
        part = partials + (tl.program_id(1).to(tl.int64) * 3) * rows + row
        tl.store(part, top)
        tl.store(part + rows, others)
        tl.store(part + 2 * rows, total)
    else:
        x = tl.load(base + y * logits_stride_v, mask=scored & valid, other=0.0).to(tl.float32)
        _finish(row, rows, x, scored, valid, top, others, inner, outer, logp, statistics, SOFTCAP)
        if MEANS > 0:
            tl.store(means + row, tl.where(scored | (MEANS == 2), total / columns, 0.0))


@triton.jit
def _token_logps_combine_kernel(
    logits, labels, cu_seqlens, logp, statistics, means, partials,
    rows, length, columns, sequences, splits,
    logits_stride_s, logits_stride_t, logits_stride_v, labels_stride_s, labels_stride_t,
    ignore_index, inner, outer,
    PACKED: tl.constexpr, SHIFT: tl.constexpr, SOFTCAP: tl.constexpr,
    MEANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the splits of each row, in their order."""
    row = tl.program_id(0).to(tl.int64)
    y = target_of(
        row, labels, cu_seqlens, length, sequences, labels_stride_s, labels_stride_t, ignore_index, PACKED, SHIFT
    )
    scored = y != ignore_index
    valid = (y >= 0) & (y < columns)
    split = tl.arange(0, BLOCK)
    part = partials + (split.to(tl.int64) * 3) * rows + row
    tops = tl.load(part, mask=split < splits, other=float("-inf"))
    sums = tl.load(part + rows, mask=split < splits, other=0.0)
    totals = tl.load(part + 2 * rows, mask=split < splits, other=0.0)
    top = tl.max(tops, 0)
    others = tl.sum(sums * tl.exp(tops - top), 0)
    base = logits + (row // length) * logits_stride_s + (row % length) * logits_stride_t
    x = tl.load(base + y * logits_stride_v, mask=scored & valid, other=0.0).to(tl.float32)
    _finish(row, rows, x, scored, valid, top, others, inner, outer, logp, statistics, SOFTCAP)
    if MEANS > 0:
        tl.store(means + row, tl.where(scored | (MEANS == 2), tl.sum(totals, 0) / columns, 0.0))


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


def factors(constants: Transform) -> dict[str, float | bool]:
    """``inner``, ``outer`` and SOFTCAP of the device function ``transform``."""
    if constants.softcap is None:
        return {"inner": constants.logit_scale / constants.temperature, "outer": 1.0, "SOFTCAP": False}
    inner, outer = constants.logit_scale / constants.softcap, constants.softcap / constants.temperature
    return {"inner": inner, "outer": outer, "SOFTCAP": True}


def token_logps_fwd(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    logits_mean: str | None,
    shift: bool,
    ignore_index: int,
    constants: Transform,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.head.ops.token_logps_fwd`. One launch, and one to combine where rows are split."""
    rows, columns, device = labels.numel(), logits.shape[-1], logits.device
    logp = torch.empty(labels.shape, dtype=torch.float32, device=device)
    statistics = torch.empty((3, *labels.shape), dtype=torch.float32, device=device)
    means = torch.empty_like(logp)
    if rows == 0:
        return logp, statistics, means
    batch = geometry(logits, labels, cu_seqlens)
    flags = {"PACKED": cu_seqlens is not None, "SHIFT": shift, "MEANS": MEANS[logits_mean], **factors(constants)}

    def launch(config: configs.Config) -> None:
        chunks = triton.cdiv(columns, config.block)
        # Two programs for every processor, each with at least two blocks.
        splits = max(1, min(triton.cdiv(2 * configs.processors(device), rows), chunks // 2))
        split_columns = triton.cdiv(chunks, splits) * config.block
        splits = triton.cdiv(columns, split_columns)
        partials = torch.empty((splits, 3, rows), dtype=torch.float32, device=device) if splits > 1 else None
        arguments = (logits, labels, cu_seqlens, logp, statistics, means if logits_mean else None, partials)
        _token_logps_fwd_kernel[rows, splits](
            *arguments, rows=rows, split_columns=split_columns, ignore_index=ignore_index, **batch, **flags,
            UNIT=batch["logits_stride_v"] == 1, SPLIT=splits > 1, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
        if splits > 1:
            _token_logps_combine_kernel[rows,](
                *arguments, rows=rows, splits=splits, ignore_index=ignore_index, **batch, **flags,
                BLOCK=triton.next_power_of_2(splits), num_warps=1,
            )  # fmt: skip

    default = configs.choose(configs.FORWARD, device, logits.dtype, columns)
    launch(configs.tuned(("token_logps_fwd", logits.dtype, columns), default, launch))
    return logp, statistics, means
