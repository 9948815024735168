"""The PyTorch backend: token log-probs of logits, and what the head does with a chunk of them, a block at a time.

See :mod:`fused_pref.ops.interface`. Elementwise work is cut into blocks, so that no copy of a large tensor is made.
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_pref.ops.interface import (
    ACCUMULATOR,
    ENTROPY,
    HIGHEST,
    LOGIT_SUM,
    ROW_MAX,
    SUM_EXP,
    SUM_SQ,
    TARGET_LOGIT,
    TARGET_SEEN,
    FinishedRows,
    TargetRows,
    Transform,
)
from fused_pref.ops.metrics import merged_metrics, softmax_metrics, token_metrics

# Entries of a block: small enough for the second-level cache on a CPU, large enough to fill a GPU.
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**22


def block_rows(device: torch.device, columns: int = 1) -> int:
    """Rows of this many entries that elementwise work takes at a time."""
    return max(1, (CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK) // max(columns, 1))


def ranges(length: int, size: int, first: int = 0) -> Iterator[slice]:
    """Consecutive slices of at most ``size``, from ``first`` to ``length``."""
    for start in range(first, length, max(size, 1)):
        yield slice(start, min(start + size, length))


class Rows:
    """The rows of a tensor (..., n) of any strides, read and written by row numbers, never copied as a whole."""

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.columns = source.shape[-1]
        self.count = source.shape[:-1].numel()
        try:
            self.flat: Tensor | None = source.view(self.count, self.columns)
        except RuntimeError:
            self.flat = None

    def read(self, rows: Tensor) -> Tensor:
        """Copy of these rows, (number, n)."""
        return self.source[self._index(rows)] if self.flat is None else self.flat.index_select(0, rows)

    def write(self, rows: Tensor, block: Tensor) -> None:
        """Overwrite these rows; a 0-d block fills them."""
        if self.flat is None:
            self.source[self._index(rows)] = block
        else:
            self.flat[rows] = block

    def _index(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        length = self.source.shape[1]
        return torch.div(rows, length, rounding_mode="floor"), rows % length


def padded(columns: int) -> int:
    """Columns of a chunk of Q in memory: its rows begin on multiples of 32 bytes."""
    return -(-columns // 16) * 16


def row_stride(columns: int) -> int:
    """Entries from one row of a chunk to the next where columns of it are read, in a CPU's cache.

    An odd number of 64 bytes of bfloat16: rows whole pages apart would all lie in the same few lines of a cache.
    """
    return columns if columns < 1024 else 32 * (-(-columns // 32) | 1)


class Activation(NamedTuple):
    """An elementwise function of a block of any shape and floating dtype, and its backward, both in place."""

    apply_: Callable[[Tensor], Tensor]  # t → f(t), over t
    backward_: Callable[[Tensor, Tensor], Tensor]  # (d, t) → d · f'(t), over d; t may be overwritten


def _tanh_backward_(d: Tensor, t: Tensor) -> Tensor:
    """1 − tanh² as 4u/(1+u)² with u = exp(−2|t|), which does not cancel where tanh saturates."""
    u = t.abs_().mul_(-2).exp_()
    return d.mul_(u).div_(u.add_(1).square_()).mul_(4)


# Activations of the logits; the device twins are in ops/triton/helpers.py. "linear" is none of them: z = inner · x.
ACTIVATIONS = {"tanh": Activation(Tensor.tanh_, _tanh_backward_)}


def transform_(x: Tensor, transform: Transform) -> Tensor:
    """Transform a block of raw logits in place."""
    if transform.nonlinear:
        return ACTIVATIONS[transform.activation].apply_(x.mul_(transform.inner)).mul_(transform.outer)
    return x if transform.identity else x.mul_(transform.inner)


def transform_backward_(dz: Tensor, x: Tensor, transform: Transform) -> Tensor:
    """Turn a block of ∂/∂z into ∂/∂x in place; ``x`` holds the raw block, of any dtype, and is left alone."""
    if transform.nonlinear:
        t = x.to(dz.dtype, copy=True).mul_(transform.inner)
        return ACTIVATIONS[transform.activation].backward_(dz, t).mul_(transform.outer * transform.inner)
    return dz if transform.identity else dz.mul_(transform.inner)


def new_statistics(rows: int, like: Tensor, dtype: torch.dtype, *, metrics: bool = False) -> Tensor:
    """(4, n) of rows of which nothing was seen yet, (8, n) with ``metrics`` of the tokens."""
    statistics = torch.zeros((8 if metrics else 4, rows), dtype=dtype, device=like.device)
    statistics[ROW_MAX].fill_(torch.finfo(dtype).min)
    if metrics:
        statistics[HIGHEST], statistics[TARGET_SEEN] = torch.finfo(dtype).min, -torch.inf
    return statistics


def merged(parts: Tensor) -> Tensor:
    """Statistics of whole rows from those of K parts of the vocabulary, (K, 4, n) → (4, n); of 8, or 3 without Σ z."""
    row_max = parts[:, ROW_MAX].amax(0)
    sums = parts[:, SUM_EXP] * (parts[:, ROW_MAX] - row_max).exp_()
    sum_exp = sums.sum(0)
    # Only its own part has a row's target.
    rows = [row_max, sum_exp, *parts[:, TARGET_LOGIT:ENTROPY].sum(0)]
    if parts.shape[1] > ENTROPY:
        rows += merged_metrics(parts[:, ENTROPY:], sums / sum_exp.clamp(min=0.5))
    return torch.stack(rows)


def softmax_(z: Tensor, row_max: Tensor, sum_exp: Tensor) -> None:
    """Turn rows of z (n, v) into exp(z − maximum), in place; write their maximum and their sum, (n,) each.

    The maximum of nothing is the least finite number.
    """
    torch.amax(z, 1, out=row_max).clamp_(min=torch.finfo(z.dtype).min)
    torch.sum(z.sub_(row_max[:, None]).exp_(), 1, out=sum_exp)


def update_statistics(
    statistics: Tensor, logits: Tensor, targets: Tensor, first: int, transform: Transform, *, logit_sum: bool
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.update_statistics`."""
    here, column = _local(targets, first, logits.shape[1])
    raw = _update(statistics, logits, here, column, transform, logit_sum)
    _set_targets(logits, here, column, raw)


def exponentials(
    out: Tensor,
    logits: Tensor,
    statistics: Tensor,
    targets: Tensor,
    transform: Transform,
    ignore_index: int,
    *,
    logit_sum: bool,
    apart: bool,
) -> FinishedRows:
    """See :meth:`fused_pref.ops.interface.RowOps.exponentials`: exp(z − maximum), at the targets minus their sum."""
    here, column = _local(targets, 0, logits.shape[1])
    # A 16-bit Q that holds its targets is divided by the sum at once: they are exact as −1 alone.
    divided = out.dtype != statistics.dtype and not apart
    raw = _update(statistics, logits, here, column, transform, logit_sum, out, divided=divided)
    logp, one_minus_p = finish(statistics, targets, logits.shape[1], ignore_index)
    sums = torch.ones_like(logp) if divided else statistics[SUM_EXP].clamp(min=0.5)
    target_q = transform_backward_(-sums, raw, transform) if transform.nonlinear else -sums
    if not apart:
        _set_targets(out, here, column, target_q.to(out.dtype))
    return FinishedRows(logp, one_minus_p, one_minus_p / sums, target_q.where(here, 0) if apart else None)


def _update(
    statistics: Tensor,
    logits: Tensor,
    here: Tensor,
    column: Tensor,
    transform: Transform,
    logit_sum: bool,
    out: Tensor | None = None,
    *,
    divided: bool = False,
) -> Tensor:
    """Update the statistics by a chunk, whose targets may be taken out; gives their raw logits, (n,).

    ``out`` receives exp(z − maximum), 0 at the targets, times the slope of an activation; ``divided``: over its sum.
    """
    raw = logits.gather(1, column[:, None])[:, 0]
    target_logit = transform_(raw.to(statistics.dtype, copy=True), transform)
    # The targets are taken out: once and for all where that can be said in raw logits.
    at_once, metrics = not transform.nonlinear, len(statistics) > ENTROPY
    if at_once:
        _set_targets(logits, here, column, -math.copysign(torch.inf, transform.slope))
    new = torch.zeros_like(statistics)
    rows = (new.t(), here, column, logits if out is None else out)
    # Raw logits that nobody asks for again are written over where they stand.
    over = out is not None and at_once and out.dtype == new.dtype and out.data_ptr() == logits.data_ptr()
    for buffer, x, row, there, place, out_block in _blocks(logits, new.dtype, *rows):
        row_max, sum_exp = row[:, ROW_MAX], row[:, SUM_EXP]
        z = transform_(x if over else buffer.copy_(x), transform)
        if logit_sum:
            row[:, LOGIT_SUM] = z.sum(1)  # asked for with an activation only
        if not at_once:
            _set_targets(z, there, place, -torch.inf)
        softmax_(z, row_max, sum_exp)
        if metrics:
            row[:, ENTROPY], row[:, SUM_SQ] = softmax_metrics(z, sum_exp)
        if divided:
            z.div_(sum_exp.clamp(min=0.5)[:, None])
        if out is not None and not over:
            out_block.copy_(z if at_once else transform_backward_(z, x, transform))
    new[TARGET_LOGIT] = target_logit.masked_fill(~here, 0)
    if metrics:
        new[HIGHEST], new[TARGET_SEEN] = new[ROW_MAX], target_logit.masked_fill(~here, -torch.inf)
    statistics.copy_(merged(torch.stack((statistics, new))))
    return raw


def gradient(
    out: Tensor, logits: Tensor, statistics: Tensor, targets: Tensor, first: int, transform: Transform
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.gradient`."""
    here, column = _local(targets, first, logits.shape[1])
    # A row's sum is at least 1, or 0 with all of its exponentials.
    rows = (out, statistics[ROW_MAX], statistics[SUM_EXP].clamp(min=0.5).reciprocal(), here, column)
    for z, x, out_block, row_max, inverse, there, place in _blocks(logits, statistics.dtype, *rows):
        transform_(z.copy_(x), transform).sub_(row_max[:, None]).exp_()
        if transform.nonlinear:
            _set_targets(z.mul_(inverse[:, None]), there, place, -1.0)
            out_block.copy_(transform_backward_(z, x, transform))
        elif out.dtype == z.dtype:
            torch.mul(z, inverse[:, None], out=out_block)
        else:
            out_block.copy_(z.mul_(inverse[:, None]))  # faster than a product that narrows
    if not transform.nonlinear:
        _set_targets(out, here, column, -1.0)


def take_targets(q: Tensor, targets: Tensor, first: int) -> Tensor:
    """See :meth:`fused_pref.ops.interface.RowOps.take_targets`."""
    here, column = _local(targets, first, q.shape[1])
    found = q.gather(1, column[:, None])[:, 0]
    _set_targets(q, here, column, 0.0)
    return found.masked_fill_(~here, 0).to(torch.promote_types(q.dtype, torch.float32))


def scatter_rows(
    out: Tensor, source: Tensor, factor: Tensor, indices: Tensor | None = None, target_rows: TargetRows | None = None
) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.scatter_rows`."""
    for part in ranges(source.shape[0], block_rows(source.device, source.shape[1])):
        # Operands of one dtype: a product of two is slow on a CPU. No more than two blocks are alive at once.
        if target_rows is None:
            block = source[part].to(factor.dtype)
        else:
            _, own = _local(target_rows.targets[part], 0, target_rows.weight.shape[0])
            block = target_rows.weight.index_select(0, own).to(factor.dtype)
            block.mul_(target_rows.q[part, None]).add_(source[part].to(factor.dtype))
        if indices is None:
            torch.mul(block, factor[part, None], out=out[part])
        else:
            block = block * factor[part, None]
            out.index_copy_(0, indices[part], block.to(out.dtype))
        del block


def add_target_rows(dw: Tensor, h: Tensor, factor: Tensor, targets: Tensor) -> None:
    """See :meth:`fused_pref.ops.interface.RowOps.add_target_rows`."""
    _, indices = _local(targets, 0, dw.shape[0])
    runs, sums = None, dw
    if dw.dtype != factor.dtype:
        indices, runs = indices.unique(return_inverse=True)
        sums = factor.new_zeros(indices.shape[0], dw.shape[1])
    for part in ranges(h.shape[0], block_rows(h.device, h.shape[1])):
        own = h[part].to(factor.dtype) * factor[part, None]
        sums.index_add_(0, indices[part] if runs is None else runs[part], own)
    if runs is not None:
        for part in ranges(indices.shape[0], block_rows(dw.device, dw.shape[1])):
            dw[indices[part]] = sums[part].add_(dw[indices[part]]).to(dw.dtype)


def finish(statistics: Tensor, targets: Tensor, columns: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """See :meth:`fused_pref.ops.interface.RowOps.finish`."""
    row_max, sum_exp, target_logit = statistics[:LOGIT_SUM]
    highest = torch.maximum(row_max, target_logit)
    target_exp, others_exp = (target_logit - highest).exp(), sum_exp * (row_max - highest).exp()
    far = target_logit - highest - torch.log(others_exp + target_exp)
    logp = torch.where(others_exp < target_exp, -torch.log1p(others_exp / target_exp), far)
    one_minus_p = others_exp / (others_exp + target_exp)
    scored = targets != ignore_index
    valid, fill = scored & (targets >= 0) & (targets < columns), torch.where(scored, torch.nan, 0).to(logp.dtype)
    return torch.where(valid, logp, fill), torch.where(valid, one_minus_p, fill)


def token_logps_fwd(
    logits: Tensor, targets: Tensor, logits_mean: str | None, ignore_index: int, transform: Transform, metrics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.head.autograd.token_logps_fwd`."""
    source, labels, dtype = Rows(logits), targets.flatten(), ACCUMULATOR[logits.dtype]
    results = torch.zeros(targets.shape, dtype=dtype, device=logits.device)
    scored, means = labels != ignore_index, results.view(-1)
    statistics = torch.zeros((8 if metrics else LOGIT_SUM, labels.shape[0]), dtype=dtype, device=logits.device)
    for rows in _row_numbers(scored, source.columns):
        z = source.read(rows).to(dtype)
        if not transform.identity:
            transform_(z, transform)
        if logits_mean is not None:
            means[rows] = z.mean(1).where(scored[rows] | (logits_mean == "all"), 0)
        here, column = _local(labels[rows], 0, source.columns)
        target_logit = z.gather(1, column[:, None])[:, 0]
        _set_targets(z, here, column, -torch.inf)
        row_max, sum_exp = torch.empty_like(target_logit), torch.empty_like(target_logit)
        softmax_(z, row_max, sum_exp)
        statistics[:LOGIT_SUM, rows] = torch.stack((row_max, sum_exp, target_logit))
        if metrics:
            seen = target_logit.masked_fill(~here, -torch.inf)
            statistics[ENTROPY:, rows] = torch.stack((*softmax_metrics(z, sum_exp), row_max, seen))
    if logits_mean == "all" and logits.device.type == "cpu":
        for rows in _row_numbers(~scored, source.columns):
            z = source.read(rows).to(dtype)
            means[rows] = (z if transform.identity else transform_(z, transform)).mean(1)
    # Results are no views: autograd refuses to change a view that a Function has made.
    statistics = statistics.view(len(statistics), *targets.shape)
    logp, one_minus_p = finish(statistics, targets, source.columns, ignore_index)
    found = means.new_empty(3, 0)
    if metrics:
        found = token_metrics(statistics, logp, one_minus_p).where(targets != ignore_index, 0)
    return logp, statistics[:LOGIT_SUM], results, found


def token_logps_bwd(
    dlogits: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    grad_logp: Tensor,
    ignore_index: int,
    transform: Transform,
) -> None:
    """Write a_n (onehot − softmax) into ``dlogits``, which may be ``logits``."""
    source, out, labels = Rows(logits), Rows(dlogits), targets.flatten()
    scored, statistics = labels != ignore_index, statistics.view(LOGIT_SUM, -1)
    _, one_minus_p = finish(statistics, labels, source.columns, ignore_index)
    factor = grad_logp.flatten().to(one_minus_p.dtype) * one_minus_p
    row_max, scale = statistics[ROW_MAX], factor / statistics[SUM_EXP].clamp(min=0.5)
    for rows in _row_numbers(scored, source.columns):
        raw = source.read(rows)
        dz = raw.to(factor.dtype, copy=True)
        if not transform.identity:
            transform_(dz, transform)
        dz.sub_(row_max[rows, None]).exp_().mul_(-scale[rows, None])
        _set_targets(dz, *_local(labels[rows], 0, source.columns), factor[rows])
        if not transform.identity:
            transform_backward_(dz, raw, transform)
        if logits.device.type != "cpu":
            dz = dz.where(scored[rows, None], 0)
        out.write(rows, dz.to(dlogits.dtype))
    if logits.device.type == "cpu":
        for rows in _row_numbers(~scored, source.columns):
            out.write(rows, dlogits.new_zeros(()))


def _row_numbers(wanted: Tensor, columns: int) -> Iterator[Tensor]:
    """Rows to visit, block by block: the wanted ones on a CPU; all elsewhere, where asking would synchronise."""
    place = wanted.device
    rows = wanted.nonzero()[:, 0] if place.type == "cpu" else torch.arange(wanted.numel(), device=place)
    yield from rows.split(block_rows(place, columns))


def _blocks(logits: Tensor, dtype: torch.dtype, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A buffer in the dtype of the token math, the chunk's rows, and those of other tensors, a block at a time."""
    number, columns = logits.shape
    step = min(block_rows(logits.device, columns), number)
    buffer = torch.empty((step, columns), dtype=dtype, device=logits.device)
    for part in ranges(number, step):
        yield buffer[: part.stop - part.start], *map(operator.itemgetter(part), (logits, *rows))


def _local(targets: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether a row's target is in these columns, (n,), and its column (n,), 0 where it is not."""
    column = targets.long() - first
    here = (column >= 0) & (column < columns)
    return here, column.where(here, 0)


def _set_targets(x: Tensor, here: Tensor, column: Tensor, value: Tensor | float) -> None:
    """Write a value to the entry ``column`` of each row, where ``here``; ``scatter_`` would copy x on a CPU."""
    row = torch.arange(x.shape[0], device=x.device)
    x[row, column] = torch.where(here, value, x[row, column])
