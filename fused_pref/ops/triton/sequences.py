"""The label that each position scores, sums per sequence of what was computed per token, and the way back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_pref.ops.triton import configs
from fused_pref.ops.triton.helpers import sequence_of
from fused_pref.ops.triton.launch import cdiv, launch


@triton.jit
def _targets_kernel(
    labels,  # [S, T] or [N_total]
    cu_seqlens,  # [S+1] or None
    targets,  # [N_total]
    rows, length, sequences, steps, labels_stride_s, labels_stride_t, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if cu_seqlens is None:
        s = sequence_of(row, length)
        end = (s + 1) * length
    else:
        # The first boundary beyond the row, by bisection.
        high = tl.zeros([BLOCK], tl.int64) + sequences
        low = tl.minimum(high, 1)
        for _ in range(steps):
            middle = (low + high) // 2
            beyond = tl.load(cu_seqlens + middle).to(tl.int64) > row
            low = tl.where(beyond, low, tl.minimum(middle + 1, high))
            high = tl.where(beyond, middle, high)
        s = row * 0
        end = tl.load(cu_seqlens + low).to(tl.int64)
    inside = row < rows
    pointers = labels + s * labels_stride_s + (row - s * length + 1) * labels_stride_t
    tl.store(targets + row, tl.load(pointers, mask=inside & (row + 1 < end), other=ignore_index), mask=inside)


@triton.jit
def _sequence_scores_kernel(
    logp,  # [N_total]
    means,  # [N_total] or None
    targets,  # [N_total]
    cu_seqlens,  # [S+1] or None
    sums,  # [S] float64
    counts,  # [S] int64
    totals,  # [S] float64 or None
    positions,  # [S] int64 or None
    length, ignore_index,
    EVERYWHERE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + s).to(tl.int64)
        number = tl.load(cu_seqlens + s + 1).to(tl.int64) - start
    else:
        start = s * length
        number = length
    total = tl.zeros([BLOCK], tl.float64)
    mean = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int64)
    for block in range(0, number, BLOCK):
        t = block + tl.arange(0, BLOCK)
        total += tl.load(logp + start + t, mask=t < number, other=0.0).to(tl.float64)
        if means is not None:
            mean += tl.load(means + start + t, mask=t < number, other=0.0).to(tl.float64)
        y = tl.load(targets + start + t, mask=t < number, other=ignore_index)
        count += (y != ignore_index).to(tl.int64)
    counted = tl.sum(count, 0)
    tl.store(sums + s, tl.sum(total, 0))
    tl.store(counts + s, counted)
    if means is not None:
        tl.store(totals + s, tl.sum(mean, 0))
        tl.store(positions + s, number if EVERYWHERE else counted)


@triton.jit
def _expand_kernel(
    values,  # [S] float64
    upstream,  # 0-d or None: what they are multiplied by
    cu_seqlens,  # [S+1]
    tokens,  # [N_total] float32
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    value = tl.load(values + s)
    if upstream is not None:
        value *= tl.load(upstream).to(tl.float64)
    value = value.to(tl.float32)
    start = tl.load(cu_seqlens + s).to(tl.int64)
    number = tl.load(cu_seqlens + s + 1).to(tl.int64) - start
    for block in range(0, number, BLOCK):
        t = block + tl.arange(0, BLOCK)
        tl.store(tokens + start + t, value + tl.zeros([BLOCK], tl.float32), mask=t < number)


def targets_of(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """See :func:`fused_pref.layout.targets_of`, with ``shift``. One launch."""
    packed = cu_seqlens is not None
    targets = torch.empty(labels.shape, dtype=labels.dtype, device=labels.device)
    sequences = cu_seqlens.shape[0] - 1 if packed else labels.shape[0]
    if labels.numel():
        launch(
            _targets_kernel, (cdiv(labels.numel(), configs.REDUCTION.block),), labels.device,
            labels, cu_seqlens, targets, rows=labels.numel(), length=labels.shape[-1], sequences=sequences,
            steps=sequences.bit_length(), labels_stride_s=0 if packed else labels.stride(0),
            labels_stride_t=labels.stride(-1), ignore_index=ignore_index,
            BLOCK=configs.REDUCTION.block, **configs.REDUCTION.options,
        )  # fmt: skip
    return targets


def sequence_scores(
    logp: Tensor,
    means: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    logits_mean: str | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :func:`fused_pref.losses.scores.sequence_scores`. One launch."""
    sequences = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = torch.empty(sequences, dtype=torch.float64, device=logp.device)
    counts = torch.empty(sequences, dtype=torch.int64, device=logp.device)
    totals = positions = None
    if logits_mean is not None:
        totals, positions = torch.empty_like(sums), torch.empty_like(counts)
    if sequences:
        launch(
            _sequence_scores_kernel, (sequences,), logp.device,
            logp, None if logits_mean is None else means, targets, cu_seqlens, sums, counts, totals, positions,
            length=targets.shape[-1], ignore_index=ignore_index, EVERYWHERE=logits_mean == "all",
            BLOCK=configs.REDUCTION.block, **configs.REDUCTION.options,
        )  # fmt: skip
    return sums, counts, totals, positions


def expand(tokens: Tensor, values: Tensor, upstream: Tensor | None, cu_seqlens: Tensor) -> None:
    """Write each sequence's value (times ``upstream``, 0-d) to its positions of (N_total,) float32. One launch."""
    if values.shape[0]:
        launch(
            _expand_kernel, (values.shape[0],), values.device,
            values, upstream, cu_seqlens, tokens, BLOCK=configs.REDUCTION.block, **configs.REDUCTION.options,
        )  # fmt: skip
