"""Plan ``grouped``: gradients of whole units in the forward, where their coefficients are known. Three products.

A unit is a pair, sequences p and p + B, or for BCO with a known δ a single sequence. The gradients are those of the
loss for an upstream gradient of 1; the backward scales them.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from fused_pref.head.plans.head import Gradients, Head, late_dtype, scaled_rows
from fused_pref.head.plans.problem import Plan, Problem, cuts, number, rounds
from fused_pref.layout import ValidRows
from fused_pref.ops.interface import LOGIT_SUM
from fused_pref.ops.metrics import token_metrics
from fused_pref.ops.torch.matmul import add_product

# (runs of sequences, None for all of them; their sums (s,) float64) → ∂loss/∂sums (s,) float64
Slope = Callable[[tuple[slice, ...] | None, Tensor], Tensor]


@dataclass(frozen=True)
class Grouped(Plan):
    """Loss and gradients of a unit at once."""

    name = "grouped"

    @classmethod
    def candidates(cls, problem: Problem) -> Iterator[Self]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        p, largest = problem, problem.largest_unit
        # Whole units: as many of the largest as a cut holds, at least one; all rows if the units are not known.
        sizes = (
            {min(p.tokens, max(1, rows // largest) * largest) for rows in cuts(p.tokens, p.multiple)} if largest else ()
        )
        for fused, rows in itertools.product(p.one_product_forms, sorted({*sizes, p.tokens}, reverse=True)):
            yield cls.of(p, rows, p.vocabulary, fused=fused)

    @classmethod
    def of(cls, problem: Problem, rows: int, columns: int, *, fused: bool = False, saved: int = 0) -> Self:
        """See :class:`~fused_pref.head.plans.problem.Plan`; of groups of at most ``rows``."""
        p, bounds = problem, _bounds(problem.units, rows)
        if bounds:
            ends = [0, *itertools.accumulate(p.units)]
            rows = max((ends[b] - ends[a] for a, b in itertools.pairwise(bounds)), default=0)
        groups = len(bounds) - 1 if bounds else max(1, rounds(p.tokens, rows))
        single = groups == 1
        # dW is its own accumulator where its dtype is that of the sums.
        direct = not p.late_scale and (p.weight_itemsize >= 4 or single)
        workspace = p.chunk(rows, columns, fused=fused) + p.copied(rows)
        weight = hidden = 0
        if "weight" in p.gradients:
            workspace += 0 if direct else 4 * columns * p.hidden
            partial = 0 if single and direct else p.partial * min(columns, p.device.columns) * p.hidden
            weight = rows * p.hidden * p.operand_itemsize + partial + p.transposed(rows, columns)
            weight = max(weight, p.target_sums(rows, p.weight_itemsize if direct else 4))
        if "hidden" in p.gradients:
            # float32 hidden gradients wait for the upstream one beside those in the dtype of the hidden states.
            workspace += max(4 * p.positions * p.hidden if p.late_scale else 0, p.wide_hidden)
            hidden = rows * p.hidden * max(p.itemsize, 4 if p.device.mixed or p.upcasts else 0)
        workspace += max(weight, hidden) + p.scratch(rows, columns) + p.cast_weight
        products, mean = ("logits", *p.gradient_products), rounds(p.tokens, groups)
        seconds = p.product_seconds(mean, columns, products) + p.pass_seconds(mean, columns, fused=fused)
        seconds = groups * seconds + (groups - 1) * 8 * columns * p.hidden / p.device.bandwidth
        return cls(rows, columns, float(len(products)), workspace, seconds, fused, bounds)

    def steps(self, problem: Problem, unit: str) -> tuple[str, ...]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        groups = number(max(len(self.bounds) - 1, 1), "group")
        return (
            f"forward: {groups} of whole {unit}, at most {self.rows} rows x {problem.vocabulary} logits → "
            f"log-probs, coefficients, {problem.gradient_names}",
            "backward: the upstream gradient scales them",
        )

    def run(self, head: Head, rows: ValidRows, slope: Slope) -> tuple[Tensor, Tensor, Tensor, Gradients]:
        """Log-probs, Σ z and metrics of every position, 0 where nothing is scored, and the gradients of the loss.

        The first two are (P,), metrics (3, P), or (3, 0) where not asked for.

        Gradients of float16 tensors are float32: scaled down by the loss, they would underflow.
        """
        sequences = rows.counts.shape[0]
        paired = head.call.unit == 2
        units = sequences // 2 if paired else sequences
        bounds = self.bounds or (0, units)
        positions = head.hidden.shape[:-1].numel()
        logp, totals = torch.zeros((2, positions), dtype=head.accumulator, device=head.hidden.device)
        metrics = logp.new_zeros(3, positions) if head.metrics else logp.new_empty(3, 0)
        sums = _GroupSums(head, single=len(bounds) == 2)
        memory = head.new_chunk(self.rows, head.columns, fused=self.fused)
        for u0, u1 in itertools.pairwise(bounds):
            members = (slice(u0, u1), slice(units + u0, units + u1)) if paired else (slice(u0, u1),)
            members = None if (u0, u1) == (0, units) else members
            group = rows if members is None else rows.part(members)
            h = head.take(group)
            statistics = head.new_statistics(len(group.targets))
            q, done = head.statistics_and_q(statistics, memory, h, group.targets, fused=self.fused)
            if head.metrics:
                for row, value in zip(metrics, token_metrics(statistics, *done[:2]), strict=True):
                    group.scatter_(row, value)
            group.scatter_(logp, done.logp)
            if head.logit_sum:
                group.scatter_(totals, statistics[LOGIT_SUM])
            known = group.expand(slope(members, group.sums(done.logp))).to(logp.dtype)
            sums.add(group, h, q, known * done.factor * -head.transform.slope, done.target_q)
        return logp, totals, metrics, sums.gradients()


class _GroupSums:
    """Gradients under way: each group adds to dW and dbias, and fills its own rows of dh."""

    def __init__(self, head: Head, *, single: bool) -> None:
        self.head, self.fresh, wanted = head, True, head.wanted
        self.dh = self.dw = self.db = None
        if "hidden" in wanted:
            dtype = late_dtype(head.hidden) if head.shard is None else head.hidden_dtype
            self.dh = torch.zeros(head.hidden.shape, dtype=dtype, device=head.hidden.device)
        if "weight" in wanted:
            # Several 16-bit groups are summed in float32; one comes out of its product rounded once.
            dtype = late_dtype(head.weight) if single else torch.promote_types(head.weight.dtype, torch.float32)
            self.dw = head.weight.new_empty(head.weight.shape, dtype=dtype)
        if "bias" in wanted:
            self.db = head.weight.new_zeros(head.columns, dtype=head.accumulator)

    def add(self, group: ValidRows, h: Tensor, q: Tensor, factor: Tensor, target_q: Tensor | None) -> None:
        """A group's rows h (n, D), their Q (n, V) and ∂loss/∂z = factor · Q.

        ``target_q`` are the targets' entries of Q, (n,), if it does not have them.
        """
        head = self.head
        if self.db is not None:
            self.db += head.bias_gradient(q, factor)
            if target_q is not None:
                ones = torch.ones_like(factor)[:, None]
                head.kernels.add_target_rows(self.db[:, None], ones, factor * target_q, group.targets)
        if target_q is None and self.dw is not None and head.targets_apart:
            target_q = head.kernels.take_targets(q, group.targets, 0)
        if self.dw is not None:
            x, scale = scaled_rows(head, h, factor)
            add_product(self.dw, q.t(), x, fresh=self.fresh, scale=scale)
            del x
            if target_q is not None:
                head.kernels.add_target_rows(self.dw, h, factor * target_q, group.targets)
        if self.dh is not None:
            product = torch.empty(h.shape, dtype=head.arithmetic.product, device=h.device)
            if target_q is None:
                target_q = head.kernels.take_targets(q, group.targets, 0)
            add_product(product, q, head.w, fresh=True)
            head.scatter_hidden(self.dh, group, product, factor, target_q)
        self.fresh = False

    def gradients(self) -> Gradients:
        """In the dtypes of the tensors; float32 for float16, and for hidden states whose sum over ranks is to come."""
        head = self.head
        dw = None if self.dw is None else self.dw.to(late_dtype(head.weight))
        db = None if self.db is None or head.bias is None else self.db.to(late_dtype(head.bias))
        return Gradients(self.dh, dw, db)


def _bounds(units: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Unit numbers where groups of at most ``rows``, or of one unit, begin, and the end; empty without units."""
    if not units:
        return ()
    bounds, filled = [0], 0
    for unit, size in enumerate(units):
        if filled and filled + size > rows:
            bounds.append(unit)
            filled = 0
        filled += size
    return (*bounds, len(units))
