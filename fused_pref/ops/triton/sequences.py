"""Sums per sequence of what was computed per token, and the way back: one launch each.

A batch has N_total positions, S·T where it is padded.
"""

# A launch gives values for constexpr arguments, and device code is not Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.triton import configs
from fused_pref.ops.triton.launch import launch


@triton.jit
def _sequence_scores_kernel(
    logp,  # [N_total]
    means,  # [N_total] or None
    labels,  # [S, T] or [N_total]
    cu_seqlens,  # [S+1] or None
    sums,  # [S] float64
    counts,  # [S] int64
    totals,  # [S] float64 or None
    positions,  # [S] int64 or None
    length, labels_stride_s, labels_stride_t, ignore_index,
    PACKED: tl.constexpr, SHIFT: tl.constexpr, EVERYWHERE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    if PACKED:
        start = tl.load(cu_seqlens + s).to(tl.int64)
        number = tl.load(cu_seqlens + s + 1).to(tl.int64) - start
        row_labels = labels + start * labels_stride_t
    else:
        start = s * length
        number = length
        row_labels = labels + s * labels_stride_s
    total = tl.zeros([BLOCK], tl.float64)
    mean = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int64)
    for block in range(0, number, BLOCK):
        t = block + tl.arange(0, BLOCK)
        total += tl.load(logp + start + t, mask=t < number, other=0.0).to(tl.float64)
        if means is not None:
            mean += tl.load(means + start + t, mask=t < number, other=0.0).to(tl.float64)
        target = t + 1 if SHIFT else t
        y = tl.load(row_labels + target.to(tl.int64) * labels_stride_t, mask=target < number, other=ignore_index)
        count += (y != ignore_index).to(tl.int64)
    counted = tl.sum(count, 0)
    tl.store(sums + s, tl.sum(total, 0))
    tl.store(counts + s, counted)
    if means is not None:
        tl.store(totals + s, tl.sum(mean, 0))
        if EVERYWHERE:
            tl.store(positions + s, number)
        else:
            tl.store(positions + s, counted)


@triton.jit
def _expand_kernel(
    values,  # [S] float64
    cu_seqlens,  # [S+1]
    tokens,  # [N_total] float32
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    value = tl.load(values + s).to(tl.float32)
    start = tl.load(cu_seqlens + s).to(tl.int64)
    number = tl.load(cu_seqlens + s + 1).to(tl.int64) - start
    for block in range(0, number, BLOCK):
        t = block + tl.arange(0, BLOCK)
        tl.store(tokens + start + t, value + tl.zeros([BLOCK], tl.float32), mask=t < number)


def sequence_scores(
    logp: Tensor,
    means: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    logits_mean: str | None,
    shift: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.losses.scores.sequence_scores`. One launch."""
    packed = cu_seqlens is not None
    sequences = cu_seqlens.shape[0] - 1 if packed else labels.shape[0]
    sums = torch.empty(sequences, dtype=torch.float64, device=logp.device)
    counts = torch.empty(sequences, dtype=torch.int64, device=logp.device)
    totals, positions = torch.empty_like(sums), torch.empty_like(counts)
    asked = logits_mean is not None
    if sequences:
        launch(
            _sequence_scores_kernel, (sequences,), logp.device,
            logp, means if asked else None, labels, cu_seqlens,
            sums, counts, totals if asked else None, positions if asked else None,
            length=labels.shape[-1], labels_stride_s=0 if packed else labels.stride(0),
            labels_stride_t=labels.stride(-1), ignore_index=ignore_index,
            PACKED=packed, SHIFT=shift, EVERYWHERE=logits_mean == "all",
            BLOCK=configs.REDUCTION.block, **configs.REDUCTION.options,
        )  # fmt: skip
    return sums, counts, totals, positions


def expand(values: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Each sequence's value at its positions, (N_total,) float32. One launch."""
    tokens = torch.empty(total, dtype=torch.float32, device=values.device)
    if values.shape[0]:
        launch(
            _expand_kernel, (values.shape[0],), values.device,
            values, cu_seqlens, tokens, BLOCK=configs.REDUCTION.block, **configs.REDUCTION.options,
        )  # fmt: skip
    return tokens
