"""A slab of logits in PyTorch: the statistics of its rows, their gradient written over it, and rows of its products.

A slab (n, v) holds a slice of the vocabulary, columns ``first`` to ``first + v``, of n rows. With q the softmax over
the entries *other than the target*, ∂logp/∂z = (1 − p_y)(onehot − q): nothing cancels where the target has nearly
all the mass. The slab receives Q = q − onehot, whose target entry is exactly −1, and the factor 1 − p_y goes to the
rows of what the slab is multiplied with.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_pref.head.spec import Transform
from fused_pref.head.streaming import block_rows, ranges

# Rows of ``statistics`` (4, n): maximum of z over the other entries, Σ exp(z − maximum) over them, the target's z,
# Σ z over all entries. The maximum of nothing is the least finite number, where exp(z − maximum) is 0 for z = −inf.
TOP, OTHERS, LABEL, TOTAL = range(4)


def new_statistics(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(4, n) of rows of which nothing was seen yet."""
    statistics = torch.zeros((4, rows), dtype=dtype, device=like.device)
    statistics[TOP] = torch.finfo(dtype).min
    return statistics


def merged(parts: Tensor) -> Tensor:
    """Statistics of whole rows from those of K parts of the vocabulary, (K, 4, n) → (4, n); or both without Σ z."""
    top = parts[:, TOP].amax(0)
    others = (parts[:, OTHERS] * (parts[:, TOP] - top).exp_()).sum(0)
    # Only its own part has a row's target.
    return torch.stack([top, others, *(parts[:, row].sum(0) for row in range(LABEL, parts.shape[1]))])


def absorb(
    statistics: Tensor,
    slab: Tensor,
    targets: Tensor,
    first: int,
    transform: Transform,
    *,
    total: bool,
    sink: Tensor | None = None,
) -> None:
    """Take a slab into the running statistics of its rows.

    Args:
        statistics: (4, n), see above; updated.
        slab: (n, v) raw logits.
        targets: (n,) labels of the rows.
        first: the slab's first column in the vocabulary.
        transform: of the logits.
        total: whether Σ z is wanted.
        sink: (n, v), may lie over the slab: receives Q; the slab is then the whole vocabulary.
    """
    here, column = _local(targets, first, slab.shape[1])
    raw = slab.gather(1, column[:, None])[:, 0]
    label = transform.apply_(raw.to(statistics.dtype, copy=True))
    without_target = label.masked_fill(here, -torch.inf)
    # The targets are taken out: once and for all where that can be said in raw logits.
    at_once = not transform.curved
    if at_once:
        _put(slab, column, raw.masked_fill(here, -math.copysign(torch.inf, transform.slope)))
    new = torch.empty_like(statistics)
    least = torch.finfo(new.dtype).min
    rows = (new[TOP], new[OTHERS], new[TOTAL], here, column, without_target, slab if sink is None else sink)
    for z, x, top, others, sums, there, place, without, out in _blocks(slab, new.dtype, *rows):
        transform.apply_(z.copy_(x))
        if total:
            torch.sum(z, 1, out=sums)  # asked for with a curve only
        if not at_once:
            _put(z, place, without)
        torch.amax(z, 1, out=top).clamp_(min=least)
        torch.sum(z.sub_(top[:, None]).exp_(), 1, out=others)
        if sink is not None:
            _normalise(out, x, z, others, there, place, transform)
    if sink is None:
        _put(slab, column, raw)
    elif at_once:
        _mark(sink, here, column)
    top = torch.maximum(statistics[TOP], new[TOP])
    statistics[OTHERS] *= (statistics[TOP] - top).exp_()
    statistics[OTHERS] += new[OTHERS] * (new[TOP] - top).exp_()
    statistics[TOP] = top
    statistics[LABEL] = torch.where(here, label, statistics[LABEL])
    if total:
        statistics[TOTAL] += new[TOTAL]


def gradient(sink: Tensor, slab: Tensor, statistics: Tensor, targets: Tensor, first: int, transform: Transform) -> None:
    """Write Q of a slab of raw logits into ``sink``, which may lie over it, from the statistics of the whole rows."""
    here, column = _local(targets, first, slab.shape[1])
    rows = (sink, statistics[TOP], statistics[OTHERS], here, column)
    for z, x, out, top, others, there, place in _blocks(slab, statistics.dtype, *rows):
        transform.apply_(z.copy_(x)).sub_(top[:, None]).exp_()
        _normalise(out, x, z, others, there, place, transform)
    if not transform.curved:
        _mark(sink, here, column)


def take_targets(q: Tensor, targets: Tensor, first: int) -> Tensor:
    """Set the targets' entries of Q to 0 and give what they were, (n,); 0 where the target is in another slab.

    They are most of what a row weighs: added to a product of the rest by themselves, they are not rounded with it.
    """
    here, column = _local(targets, first, q.shape[1])
    found = q.gather(1, column[:, None])[:, 0]
    _put(q, column, found.masked_fill(here, 0))
    return found.masked_fill_(~here, 0).to(torch.promote_types(q.dtype, torch.float32))


class Label(NamedTuple):
    """What rows of Q W lack: each target's entry of Q, from :func:`take_targets`, times the target's weight."""

    targets: Tensor  # (n,)
    q: Tensor  # (n,), 0 where the target is no column of the weight
    weight: Tensor  # (v, D)


def place_rows(
    sink: Tensor, source: Tensor, factor: Tensor, places: Tensor | None = None, label: Label | None = None
) -> None:
    """Write (source + label) · factor to rows of ``sink``, in the dtype of the factor and rounded once.

    Args:
        sink: (P, D) contiguous; may be the source.
        source: (n, D).
        factor: (n,) contiguous, in the dtype of the token math.
        places: (n,) rows of the sink; None: the first n.
        label: what is added to the source.
    """
    for part in ranges(source.shape[0], block_rows(source)):
        # Operands of one dtype: a product of two is slow on a CPU.
        block = source[part].to(factor.dtype)
        if label is not None:
            targets = label.targets[part].long()
            valid = (targets >= 0) & (targets < label.weight.shape[0])
            own = label.weight.index_select(0, targets.where(valid, 0)).to(factor.dtype)
            block = own.mul_(label.q[part, None]).add_(block)
        if places is None:
            torch.mul(block, factor[part, None], out=sink[part])
        else:
            sink.index_copy_(0, places[part], (block * factor[part, None]).to(sink.dtype))


def add_labels(dw: Tensor, h: Tensor, factor: Tensor, targets: Tensor) -> None:
    """Add factor_n h_n to the row of ``dw`` that is row n's target; those of one target are summed, and rounded once.

    A target's part of dW outweighs the rest: by itself it is not rounded before it is added.

    Args:
        dw: (v, D), updated.
        h: (n, D).
        factor: (n,) in the dtype of the token math; 0 where the target is no row of ``dw``.
        targets: (n,).
    """
    valid = (targets >= 0) & (targets < dw.shape[0])
    places, runs = targets.long().where(valid, 0), None
    sums = dw
    if dw.dtype != factor.dtype:
        places, runs = places.unique(return_inverse=True)
        sums = factor.new_zeros(places.shape[0], dw.shape[1])
    for part in ranges(h.shape[0], block_rows(h)):
        own = h[part].to(factor.dtype) * factor[part, None]
        sums.index_add_(0, places[part] if runs is None else runs[part], own)
    if runs is not None:
        for part in ranges(places.shape[0], block_rows(dw)):
            dw[places[part]] = sums[part].add_(dw[places[part]]).to(dw.dtype)


def finish(statistics: Tensor, targets: Tensor, columns: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(logp, 1 − p_y) of rows: (0, 0) where nothing is scored, NaN for a label outside the vocabulary."""
    top, others, label, _ = statistics
    highest = torch.maximum(top, label)
    label_mass, other_mass = (label - highest).exp(), others * (top - highest).exp()
    far = label - highest - torch.log(other_mass + label_mass)
    logp = torch.where(other_mass < label_mass, -torch.log1p(other_mass / label_mass), far)
    miss = other_mass / (other_mass + label_mass)
    scored, valid = targets != ignore_index, (targets >= 0) & (targets < columns)
    fill = torch.where(scored, torch.nan, 0).to(logp.dtype)
    return torch.where(scored & valid, logp, fill), torch.where(scored & valid, miss, fill)


def _blocks(slab: Tensor, dtype: torch.dtype, *rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A buffer in the dtype of the token math, the slab's rows, and those of other tensors, a block at a time."""
    number, columns = slab.shape
    step = max(1, min(block_rows(slab), number))
    buffer = torch.empty((step, columns), dtype=dtype, device=slab.device)
    if number == 0:
        return
    for x, *parts in zip(slab.split(step), *(part.split(step) for part in rows), strict=True):
        yield buffer[: x.shape[0]], x, *parts


def _local(targets: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether a row's target is in these columns, (n,), and its column (n,), 0 where it is not."""
    column = targets.long() - first
    here = (column >= 0) & (column < columns)
    return here, column.where(here, 0)


def _normalise(
    sink: Tensor, x: Tensor, z: Tensor, others: Tensor, here: Tensor, column: Tensor, transform: Transform
) -> None:
    """Write z/others; with a curve Q at once, times its slope at the raw x.

    ``others`` is at least 1, or 0 with all of z.
    """
    inverse = others.clamp(min=0.5).reciprocal_()[:, None]
    if not transform.curved:
        if sink.dtype == z.dtype:
            torch.mul(z, inverse, out=sink)
        else:
            sink.copy_(z.mul_(inverse))  # faster than a product that narrows
    else:
        _mark(z.mul_(inverse), here, column)
        sink.copy_(transform.chain_(z, x))


def _mark(q: Tensor, here: Tensor, column: Tensor) -> None:
    """Write −1 to the targets' entries."""
    _put(q, column, q.gather(1, column[:, None])[:, 0].masked_fill_(here, -1))


def _put(x: Tensor, column: Tensor, values: Tensor) -> None:
    """x[i, column[i]] = values[i]; ``scatter_`` would copy the whole of x on a CPU."""
    x[torch.arange(x.shape[0], device=x.device), column] = values
