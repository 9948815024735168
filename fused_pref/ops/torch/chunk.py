"""Row statistics, gradient and rows of products of a chunk of logits; see :mod:`fused_pref.ops.interface`."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fused_pref.ops.blocks import block_rows, ranges
from fused_pref.ops.interface import LOGIT_SUM, ROW_MAX, SUM_EXP, TARGET_LOGIT, TargetRows, Transform


def new_statistics(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(4, n) of rows of which nothing was seen yet."""
    statistics = torch.zeros((4, rows), dtype=dtype, device=like.device)
    statistics[ROW_MAX] = torch.finfo(dtype).min
    return statistics


def merged(parts: Tensor) -> Tensor:
    """Statistics of whole rows from those of K parts of the vocabulary, (K, 4, n) → (4, n); or both without Σ z."""
    row_max = parts[:, ROW_MAX].amax(0)
    sum_exp = (parts[:, SUM_EXP] * (parts[:, ROW_MAX] - row_max).exp_()).sum(0)
    # Only its own part has a row's target.
    return torch.stack([row_max, sum_exp, *(parts[:, row].sum(0) for row in range(TARGET_LOGIT, parts.shape[1]))])


def update_statistics(
    statistics: Tensor,
    logits: Tensor,
    targets: Tensor,
    first: int,
    transform: Transform,
    *,
    logit_sum: bool,
    out: Tensor | None = None,
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.update_statistics`."""
    here, column = _local(targets, first, logits.shape[1])
    raw = logits.gather(1, column[:, None])[:, 0]
    target_logit = transform.apply_(raw.to(statistics.dtype, copy=True))
    without_target = target_logit.masked_fill(here, -torch.inf)
    # The targets are taken out: once and for all where that can be said in raw logits.
    at_once = not transform.nonlinear
    if at_once:
        _set_entries(logits, column, raw.masked_fill(here, -math.copysign(torch.inf, transform.slope)))
    new = torch.empty_like(statistics)
    least = torch.finfo(new.dtype).min
    rows = (new[ROW_MAX], new[SUM_EXP], new[LOGIT_SUM], here, column, without_target, logits if out is None else out)
    for z, x, row_max, sum_exp, sums, there, place, without, out_block in _blocks(logits, new.dtype, *rows):
        transform.apply_(z.copy_(x))
        if logit_sum:
            torch.sum(z, 1, out=sums)  # asked for with an activation only
        if not at_once:
            _set_entries(z, place, without)
        torch.amax(z, 1, out=row_max).clamp_(min=least)
        torch.sum(z.sub_(row_max[:, None]).exp_(), 1, out=sum_exp)
        if out is not None:
            _normalise(out_block, x, z, sum_exp, there, place, transform)
    if out is None:
        _set_entries(logits, column, raw)
    elif at_once:
        _mark(out, here, column)
    row_max = torch.maximum(statistics[ROW_MAX], new[ROW_MAX])
    statistics[SUM_EXP] *= (statistics[ROW_MAX] - row_max).exp_()
    statistics[SUM_EXP] += new[SUM_EXP] * (new[ROW_MAX] - row_max).exp_()
    statistics[ROW_MAX] = row_max
    statistics[TARGET_LOGIT] = torch.where(here, target_logit, statistics[TARGET_LOGIT])
    if logit_sum:
        statistics[LOGIT_SUM] += new[LOGIT_SUM]


def gradient(
    out: Tensor, logits: Tensor, statistics: Tensor, targets: Tensor, first: int, transform: Transform
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.gradient`."""
    here, column = _local(targets, first, logits.shape[1])
    rows = (out, statistics[ROW_MAX], statistics[SUM_EXP], here, column)
    for z, x, out_block, row_max, sum_exp, there, place in _blocks(logits, statistics.dtype, *rows):
        transform.apply_(z.copy_(x)).sub_(row_max[:, None]).exp_()
        _normalise(out_block, x, z, sum_exp, there, place, transform)
    if not transform.nonlinear:
        _mark(out, here, column)


def take_targets(q: Tensor, targets: Tensor, first: int) -> Tensor:
    """Set the targets' entries of Q to 0 and give what they were, (n,); 0 where the target is in another chunk.

    They are the largest entries of a row. Added to the product of the rest separately, they are not rounded with it.
    """
    here, column = _local(targets, first, q.shape[1])
    found = q.gather(1, column[:, None])[:, 0]
    _set_entries(q, column, found.masked_fill(here, 0))
    return found.masked_fill_(~here, 0).to(torch.promote_types(q.dtype, torch.float32))


def scatter_rows(
    out: Tensor, source: Tensor, factor: Tensor, indices: Tensor | None = None, target_rows: TargetRows | None = None
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.scatter_rows`."""
    for part in ranges(source.shape[0], block_rows(source)):
        # Operands of one dtype: a product of two is slow on a CPU.
        block = source[part].to(factor.dtype)
        if target_rows is not None:
            targets = target_rows.targets[part].long()
            valid = (targets >= 0) & (targets < target_rows.weight.shape[0])
            own = target_rows.weight.index_select(0, targets.where(valid, 0)).to(factor.dtype)
            block = own.mul_(target_rows.q[part, None]).add_(block)
        if indices is None:
            torch.mul(block, factor[part, None], out=out[part])
        else:
            out.index_copy_(0, indices[part], (block * factor[part, None]).to(out.dtype))


def add_target_rows(dw: Tensor, h: Tensor, factor: Tensor, targets: Tensor) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.add_target_rows`."""
    valid = (targets >= 0) & (targets < dw.shape[0])
    indices, runs = targets.long().where(valid, 0), None
    sums = dw
    if dw.dtype != factor.dtype:
        indices, runs = indices.unique(return_inverse=True)
        sums = factor.new_zeros(indices.shape[0], dw.shape[1])
    for part in ranges(h.shape[0], block_rows(h)):
        own = h[part].to(factor.dtype) * factor[part, None]
        sums.index_add_(0, indices[part] if runs is None else runs[part], own)
    if runs is not None:
        for part in ranges(indices.shape[0], block_rows(dw)):
            dw[indices[part]] = sums[part].add_(dw[indices[part]]).to(dw.dtype)


def finish(statistics: Tensor, targets: Tensor, columns: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(logp, 1 − p_y) of rows: (0, 0) where nothing is scored, NaN for a label outside the vocabulary."""
    row_max, sum_exp, target_logit, _ = statistics
    highest = torch.maximum(row_max, target_logit)
    target_exp, others_exp = (target_logit - highest).exp(), sum_exp * (row_max - highest).exp()
    far = target_logit - highest - torch.log(others_exp + target_exp)
    logp = torch.where(others_exp < target_exp, -torch.log1p(others_exp / target_exp), far)
    one_minus_p = others_exp / (others_exp + target_exp)
    scored, valid = targets != ignore_index, (targets >= 0) & (targets < columns)
    fill = torch.where(scored, torch.nan, 0).to(logp.dtype)
    return torch.where(scored & valid, logp, fill), torch.where(scored & valid, one_minus_p, fill)


def _blocks(logits: Tensor, dtype: torch.dtype, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A buffer in the dtype of the token math, the chunk's rows, and those of other tensors, a block at a time."""
    number, columns = logits.shape
    step = max(1, min(block_rows(logits), number))
    buffer = torch.empty((step, columns), dtype=dtype, device=logits.device)
    if number == 0:
        return
    for x, *parts in zip(logits.split(step), *(part.split(step) for part in rows), strict=True):
        yield buffer[: x.shape[0]], x, *parts


def _local(targets: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether a row's target is in these columns, (n,), and its column (n,), 0 where it is not."""
    column = targets.long() - first
    here = (column >= 0) & (column < columns)
    return here, column.where(here, 0)


def _normalise(
    out: Tensor, x: Tensor, z: Tensor, sum_exp: Tensor, here: Tensor, column: Tensor, transform: Transform
) -> None:
    """Write z/sum_exp; with an activation Q at once, times its slope at the raw x.

    ``others`` is at least 1, or 0 with all of z.
    """
    inverse = sum_exp.clamp(min=0.5).reciprocal_()[:, None]
    if not transform.nonlinear:
        if out.dtype == z.dtype:
            torch.mul(z, inverse, out=out)
        else:
            out.copy_(z.mul_(inverse))  # faster than a product that narrows
    else:
        _mark(z.mul_(inverse), here, column)
        out.copy_(transform.backward_(z, x))


def _mark(q: Tensor, here: Tensor, column: Tensor) -> None:
    """Write −1 to the targets' entries."""
    _set_entries(q, column, q.gather(1, column[:, None])[:, 0].masked_fill_(here, -1))


def _set_entries(x: Tensor, column: Tensor, values: Tensor) -> None:
    """x[i, column[i]] = values[i]; ``scatter_`` would copy the whole of x on a CPU."""
    x[torch.arange(x.shape[0], device=x.device), column] = values
