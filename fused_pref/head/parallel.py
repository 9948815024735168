"""A head whose vocabulary is split over the ranks of a process group, each with contiguous rows of weight and bias.

A rank multiplies with its own rows. Of a token the ranks exchange what makes the statistics of its whole row: maximum,
sum of exponentials and the target's logit, three floats, gathered and merged in the order of the ranks, so that losses
and coefficients are the same to the bit everywhere. The gradient of the weight is each rank's own; that of the hidden
states is a sum over the ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_pref import validate
from fused_pref.head.slab import TOTAL, merged

# What ranks must agree on, in the order in which it is exchanged after the rows of the weight.
AGREED = (
    "D",
    "dtype",
    "the shape of labels",
    "N",
    "the labels",
    "which gradients are wanted",
    "what else the call asks for",
)


@dataclass(frozen=True)
class Shard:
    """This rank's rows of the weight among those of all ranks.

    Attributes:
        group: the process group.
        sizes: rows of each rank.
        partial: whether the gradient of the hidden states is left as this rank's part of the sum.
    """

    group: Any
    sizes: tuple[int, ...]
    partial: bool

    @property
    def first(self) -> int:
        """This rank's first column of the vocabulary."""
        return sum(self.sizes[: dist.get_rank(self.group)])

    @property
    def vocabulary(self) -> int:
        """V, of all ranks together."""
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """Rows of the largest shard, for which all ranks plan: so their groups of tokens are the same."""
        return max(self.sizes)

    def merge(self, statistics: Tensor, *, total: bool) -> None:
        """Make the statistics (4, n) of this rank's columns those of the whole rows, in place."""
        if statistics.numel() == 0:
            return
        known = statistics if total else statistics[:TOTAL]
        known.copy_(merged(self._gathered(known)))

    def sum_exactly(self, values: Tensor) -> Tensor:
        """Sum over the ranks, the same to the bit on all of them."""
        return self._gathered(values).sum(0)

    def reduce(self, dh: Tensor) -> Tensor:
        """Sum the gradient of the hidden states over the ranks in place, unless it is left partial."""
        if not self.partial and dh.numel():
            dist.all_reduce(dh, group=self.group)
        return dh

    def _gathered(self, values: Tensor) -> Tensor:
        values = values.contiguous()
        parts = values.new_empty(len(self.sizes), *values.shape)
        dist.all_gather(list(parts.unbind(0)), values, group=self.group)
        return parts


def shard(group: Any, weight: Tensor, hidden: Tensor, labels: Tensor, agreed: tuple[Any, ...], partial: bool) -> Shard:
    """What this rank holds, from a first exchange of sizes, repeated for new shapes and under ``fp.checks()``.

    Args:
        group: the process group.
        weight: (V of this rank, D).
        hidden: (S, T, D) or (N_total, D).
        labels: (S, T) or (N_total,).
        agreed: N's ignored label, then whatever decides how the call is computed.
        partial: see :class:`Shard`.

    Raises:
        ValueError: on every rank, if the ranks disagree or hold the same rows.
    """
    ignore_index, *rest = agreed
    asked = (group, weight.shape, weight.dtype, hidden.shape, hidden.dtype, labels.shape, tuple(rest))
    sizes = None if validate.checking() else _known.get(asked)
    if sizes is None:
        sizes = _compare(group, weight, hidden, labels, ignore_index, rest)
        if len(_known) >= 1024:
            _known.clear()
        _known[asked] = sizes
    return Shard(group, sizes, partial)


# Sizes of the shards by what a call asks for; every rank has seen the same calls.
_known: dict[Any, tuple[int, ...]] = {}


def _compare(
    group: Any, weight: Tensor, hidden: Tensor, labels: Tensor, ignore_index: int, rest: list[Any]
) -> tuple[int, ...]:
    shape, scored = tuple(labels.shape), int((labels != ignore_index).sum())
    wanted, *others = rest
    row = weight.detach()[0].double()
    places = torch.arange(1, row.numel() + 1, dtype=row.dtype, device=row.device)
    mark = (row.sum().item(), (row * places).sum().item(), row.abs().max().item())
    # A sum that other labels, or another order, would hardly give.
    flat = labels.flatten().long()
    words = f"labels of checksum {int((flat * torch.arange(1, flat.numel() + 1, device=flat.device)).sum())}"
    mine = (weight.shape[1], str(hidden.dtype), shape, scored, words, sorted(wanted), tuple(others))
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (weight.shape[0], mine, mark), group=group)
    for number, name in enumerate(AGREED):
        values = [report[1][number] for report in reports]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"ranks of tp_group must agree on {name}; got {shown}")
    marks = [report[2] for report in reports]
    for rank, found in enumerate(marks):
        if found[2] > 0 and found in marks[:rank]:
            raise ValueError(
                f"ranks {marks.index(found)} and {rank} of tp_group must hold different rows of weight; their first "
                "rows are the same: a rank passes its own slice, not the whole head"
            )
    return tuple(report[0] for report in reports)
