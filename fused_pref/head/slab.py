"""A slab of logits in PyTorch: the statistics of its rows, and their gradient written over it.

A slab (n, v) holds a slice of the vocabulary, columns ``first`` to ``first + v``, of n rows. With q the softmax over
the entries *other than the target*, ∂logp/∂z = (1 − p_y)(onehot − q): nothing cancels where the target has nearly
all the mass. The slab receives Q = q − onehot, whose target entry is exactly −1, and the factor 1 − p_y goes to the
rows of what the slab is multiplied with.
"""

import torch
from torch import Tensor

from fused_pref.head.spec import Transform
from fused_pref.head.streaming import CPU_BLOCK, DEVICE_BLOCK

# Rows of ``statistics`` (4, n): maximum of z over the other entries, Σ exp(z − maximum) over them, the target's z,
# Σ z over all entries.
TOP, OTHERS, LABEL, TOTAL = range(4)


def new_statistics(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(4, n) of rows of which nothing was seen yet."""
    statistics = torch.zeros((4, rows), dtype=dtype, device=like.device)
    statistics[TOP] = -torch.inf
    return statistics


class Block:
    """A buffer for the rows at work, in the dtype of the token math."""

    def __init__(self, slab: Tensor, dtype: torch.dtype) -> None:
        size = CPU_BLOCK if slab.device.type == "cpu" else DEVICE_BLOCK
        self.rows = max(1, min(size // max(slab.shape[1], 1), slab.shape[0]))
        self.buffer = torch.empty((self.rows, slab.shape[1]), dtype=dtype, device=slab.device)

    def read(self, x: Tensor, transform: Transform) -> Tensor:
        """Z of these raw rows."""
        return transform.apply_(self.buffer[: x.shape[0]].copy_(x))


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
    block = Block(slab, statistics.dtype)
    for start in range(0, slab.shape[0], block.rows):
        x = slab[start : start + block.rows]
        seen = statistics[:, start : start + block.rows]
        here, column = _local(targets[start : start + block.rows], first, slab.shape[1])
        z = block.read(x, transform)
        if total:
            seen[TOTAL] += z.sum(1)
        label = z.gather(1, column)
        seen[LABEL] = torch.where(here, label[:, 0], seen[LABEL])
        z.scatter_(1, column, label.masked_fill(here[:, None], -torch.inf))
        top = torch.maximum(seen[TOP], z.amax(1))
        pivot = top.masked_fill(top == -torch.inf, 0)
        others = z.sub_(pivot[:, None]).exp_().sum(1)
        seen[OTHERS] = seen[OTHERS] * (seen[TOP] - pivot).exp_() + others
        seen[TOP] = top
        if sink is not None:
            _store(sink[start : start + block.rows], x, z, _inverse(others), here, column, transform)


def gradient(sink: Tensor, slab: Tensor, statistics: Tensor, targets: Tensor, first: int, transform: Transform) -> None:
    """Write Q of a slab of raw logits into ``sink``, which may lie over it, from the statistics of the whole rows."""
    block = Block(slab, statistics.dtype)
    for start in range(0, slab.shape[0], block.rows):
        x = slab[start : start + block.rows]
        top, others = statistics[:2, start : start + block.rows]
        here, column = _local(targets[start : start + block.rows], first, slab.shape[1])
        pivot = top.masked_fill(top == -torch.inf, 0)
        z = block.read(x, transform).sub_(pivot[:, None]).exp_()
        _store(sink[start : start + block.rows], x, z, _inverse(others), here, column, transform)


def finish(statistics: Tensor, targets: Tensor, columns: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(logp, 1 − p_y) of rows: (0, 0) where nothing is scored, NaN for a label outside the vocabulary."""
    top, others, label, _ = statistics
    gap = label - torch.where(others == 0, label, top)
    ratio = gap.exp()
    logp = torch.where(others < ratio, -torch.log1p(others / ratio), gap - torch.log(others + ratio))
    miss = others / (others + ratio)
    scored, valid = targets != ignore_index, (targets >= 0) & (targets < columns)
    fill = torch.where(scored & ~valid, torch.nan, 0).to(logp.dtype)
    good = scored & valid
    return torch.where(good, logp, fill), torch.where(good, miss, fill)


def _local(targets: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether a row's target is in this slice (n,), and its column (n, 1), 0 where it is not."""
    column = targets.long() - first
    here = (column >= 0) & (column < columns)
    return here, column.where(here, 0)[:, None]


def _inverse(others: Tensor) -> Tensor:
    """1/others; 0 where there is no other entry."""
    return torch.where(others == 0, 0, 1 / others)


def _store(
    sink: Tensor, x: Tensor, z: Tensor, inverse: Tensor, here: Tensor, column: Tensor, transform: Transform
) -> None:
    """Sink ← z · inverse − onehot, under a softcap times its slope, which needs the raw x."""
    if transform.softcap is None:
        torch.mul(z, inverse[:, None], out=sink)
        sink.scatter_(1, column, sink.gather(1, column).masked_fill_(here[:, None], -1))
        return
    z.mul_(inverse[:, None])
    z.scatter_(1, column, z.gather(1, column).masked_fill_(here[:, None], -1))
    sink.copy_(transform.chain_(z, x))
