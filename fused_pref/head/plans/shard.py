"""A head whose vocabulary is split over the ranks of a process group, each with contiguous rows of weight and bias.

A rank multiplies with its own rows. Of a token the ranks exchange what makes the statistics of its whole row: maximum,
sum of exponentials and the target's logit, three floats (a fourth, Σ z, where it is wanted; eight with metrics of the
tokens). These are gathered and merged in the order of the ranks, so that losses and slopes are the same bitwise
everywhere. The gradient of the weight is each rank's own; that of the hidden states is a sum over the ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fused_pref.ops.interface import ENTROPY, LOGIT_SUM
from fused_pref.ops.torch.chunk import merged
from fused_pref.ranks import gathered


@dataclass(frozen=True)
class Shard:
    """This rank's rows of the weight among those of all ranks.

    Attributes:
        group: the process group.
        sizes: rows of each rank.
        partial: whether the gradient of the hidden states is left as this rank's part of the sum.
        budget: the smallest default budget among the ranks, for which all of them plan.
    """

    group: Any
    sizes: tuple[int, ...]
    partial: bool
    budget: int

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

    def merge(self, statistics: Tensor, *, logit_sum: bool) -> None:
        """Make the statistics (4, n) of this rank's columns those of the whole rows, in place."""
        if statistics.numel() == 0:
            return
        known = statistics if logit_sum or len(statistics) > ENTROPY else statistics[:LOGIT_SUM]
        known.copy_(merged(gathered(known, self.group)))

    def sum_exactly(self, values: Tensor) -> Tensor:
        """Sum over the ranks, the same bitwise on all of them."""
        return gathered(values, self.group).sum(0)

    def reduce(self, dh: Tensor) -> Tensor:
        """Sum the gradient of the hidden states over the ranks in place, unless it is left partial."""
        if not self.partial and dh.numel():
            dist.all_reduce(dh, group=self.group)
        return dh
