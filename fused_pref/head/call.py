"""A call of the linear head: which dtype, which gradients, which plan; and the means of the logits."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.head.advice import advising, warn_of
from fused_pref.head.budget import budget_of
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.head import Gradients, Head
from fused_pref.head.plans.planner import plan_of
from fused_pref.head.plans.problem import GRADIENTS, Forward, Plan, Problem
from fused_pref.head.plans.rows import ValidRows, valid_rows
from fused_pref.head.plans.shard import Shard
from fused_pref.head.plans.skipping import can_skip
from fused_pref.head.spec import LinearSpec
from fused_pref.losses.encoding import Objective
from fused_pref.losses.numbers import saturate
from fused_pref.losses.pair import gather
from fused_pref.losses.scores import Scores, mean_sums
from fused_pref.ops.backend import architecture
from fused_pref.ops.blocks import Rows, block_rows, ranges
from fused_pref.ops.devices import device_of
from fused_pref.ops.interface import LOGIT_SUM


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> frozenset[str]:
    """Which gradients a backward will need; call it before ``Function.apply``, inside which gradients are disabled."""
    if not torch.is_grad_enabled():
        return frozenset()
    tensors = zip(GRADIENTS, (hidden, weight, bias), strict=True)
    return frozenset(name for name, tensor in tensors if tensor is not None and tensor.requires_grad)


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the products: that of the hidden states, under autocast that of autocast."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


@dataclass(frozen=True)
class HeadCall:
    """Everything about a call but its tensors.

    Attributes:
        spec: the constants.
        dtype: of the products.
        wanted: gradients that a backward will ask for.
        unit: sequences of a unit whose coefficients are known in the forward: 2 (a pair), 1, or 0 if they are not.
        shard: what this rank holds of a vocab-parallel head; None: all of it.
    """

    spec: LinearSpec
    dtype: torch.dtype
    wanted: frozenset[str]
    unit: int = 0
    shard: Shard | None = None

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        """The head at work."""
        spec = self.spec
        return Head(hidden, weight, bias, self.dtype, spec.transform, spec.ignore_index, spec.backend, self.shard)

    def rows(self, labels: Tensor, cu_seqlens: Tensor | None) -> ValidRows:
        """The rows to project; with a shard their targets are columns of it."""
        spec = self.spec
        rows = valid_rows(
            labels,
            cu_seqlens,
            shift=spec.shift,
            ignore_index=spec.ignore_index,
            max_valid_tokens=spec.max_valid_tokens,
        )
        return rows if self.shard is None else replace(rows, targets=rows.targets - self.shard.first)

    def problem(self, head: Head, rows: ValidRows) -> Problem:
        """What the planner sees."""
        weight = head.weight
        positions = head.hidden.shape[:-1].numel()
        counts = rows.host_counts
        if self.unit == 2:
            half = len(counts) // 2
            counts = tuple(w + l for w, l in zip(counts[:half], counts[half:], strict=True))
        vocabulary = weight.shape[0] if self.shard is None else self.shard.largest
        return Problem(
            tokens=rows.number,
            positions=positions,
            hidden=weight.shape[1],
            vocabulary=vocabulary,
            itemsize=self.dtype.itemsize,
            weight_itemsize=weight.dtype.itemsize,
            gradients=self.wanted,
            local=self.unit > 0,
            units=counts,
            budget=self.budget(weight),
            promised=self.spec.memory_budget is not None,
            device=device_of(weight.device.type, architecture(weight.device)),
            late_scale=weight.dtype == torch.float16,
            gathered=rows.indices is not None or not head.hidden.is_contiguous() or self.dtype != head.hidden.dtype,
            unscored=self.unscored(rows, positions),
            # The scale of a fused product's exponentials is that of its own columns.
            fused=head.fusible and (self.shard is None or not self.wanted),
            wide_range=self.dtype != torch.float16,
            indexed=head.indexed,
            skip_mass=self.spec.skip_mass if self.shard is None and can_skip(head) else None,
            cast_weight=0 if self.dtype == weight.dtype else weight.numel() * self.dtype.itemsize,
        )

    def plan(self, head: Head, rows: ValidRows) -> Plan:
        """See :func:`chosen`."""
        return chosen(self.problem(head, rows))

    def budget(self, weight: Tensor) -> int:
        """Bytes of workspace that are allowed."""
        if self.spec.memory_budget is not None:
            return self.spec.memory_budget
        return budget_of(weight) if self.shard is None else self.shard.budget

    def advising(self, head: Head, rows: ValidRows) -> AbstractContextManager[None]:
        """See :func:`fused_pref.head.advice.advising`."""
        return advising(lambda: self.problem(head, rows))

    @property
    def wants_logit_sums(self) -> bool:
        """Whether Σ z must be summed over the logits: without an activation it follows from mean(W)."""
        return self.spec.logits_mean is not None and self.spec.transform.nonlinear

    def score(self, head: Head, rows: ValidRows, plan: Plan, labels: Tensor) -> tuple[Tensor, Tensor, Forward]:
        """Log-probs (N,) by any plan but ``grouped``, means as :meth:`means` gives them, and what the forward gave."""
        unscored = self.unscored_logit_sums(head, rows, labels)
        forward = plan.forward(head, rows, logit_sum=self.wants_logit_sums)
        logp, _ = head.finish(forward.statistics, rows.targets)
        totals = rows.scatter(forward.statistics[LOGIT_SUM], labels)
        return logp, self.means(head, rows, labels, totals, unscored), forward

    def evaluate(
        self,
        head: Head,
        rows: ValidRows,
        plan: Grouped,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Gradients, Any]:
        """Log-probs, means of z, gradients and result of an objective, evaluated once on each group of its units."""
        spec, dtype, whole = self.spec, head.accumulator, objective.for_parts(rows.counts)
        results, sums = [], []

        def slope(members: tuple[slice, ...] | None, own: Tensor) -> Tensor:
            if rows.overflow is not None:
                own = own.masked_fill(rows.overflow, torch.nan)
            validate.values("the log-prob of each sequence", own, torch.isfinite, "finite")
            sums.append(own)
            if members is None:
                scores, part = Scores(own, rows.counts, *known), whole
            else:
                scores, part = Scores(own, gather(rows.counts, members), None, None), whole.part(members)
            results.append(part.evaluate(scores, spec.backend, dtype))
            return saturate(results[-1].slope, torch.float32)

        with torch.no_grad(), torch.autocast(head.hidden.device.type, enabled=False):
            unscored = self.unscored_logit_sums(head, rows, labels)
            # Of a single group all is known when it is evaluated, unless an activation hides the means.
            early = not self.wants_logit_sums and self.shard is None and len(plan.bounds) <= 2
            nothing = head.hidden.new_zeros(labels.shape, dtype=dtype)
            means = self.means(head, rows, labels, nothing) if early else None
            known = (
                (None, None) if means is None else mean_sums(means, rows.counts, labels, cu_seqlens, spec.logits_mean)
            )
            logp, totals, gradients = plan.run(
                head, rows, slope, self.wanted, paired=self.unit == 2, logit_sum=self.wants_logit_sums
            )
            if rows.overflow is not None:
                logp.masked_fill_(rows.overflow, torch.nan)
            if means is None:
                means = self.means(head, rows, labels, totals.view(labels.shape), unscored)
                known = mean_sums(means, rows.counts, labels, cu_seqlens, spec.logits_mean)
            else:
                known = (None, None)  # the result has them
        scores = Scores(torch.cat(sums), rows.counts, *known)
        result = objective.joined(results, scores, dtype)
        # The last thing that can fail, and outside of `no_grad`, where nothing is learnt.
        objective.gather_statistics(scores.sums)
        return logp.view(labels.shape), means, gradients, result

    def means(
        self, head: Head, rows: ValidRows, labels: Tensor, totals: Tensor, unscored: Tensor | None = None
    ) -> Tensor:
        """Mean of z over the vocabulary at each position, shape of the labels; 0 where it is not asked for.

        Args:
            head: the head.
            rows: the valid rows.
            labels: (S, T) or (N_total,).
            totals: Σ z of the valid rows in the shape of the labels, used with a softcap only.
            unscored: Σ z of the other rows, from :meth:`unscored_totals`.
        """
        if self.spec.logits_mean is None or labels.numel() == 0:
            return torch.zeros_like(totals)
        if self.wants_logit_sums:
            return (totals if unscored is None else totals + unscored) / head.vocabulary
        means = linear_means(head).view(labels.shape)
        if self.spec.logits_mean == "completion":
            covered = rows.scatter(torch.ones_like(rows.targets, dtype=means.dtype), labels)
            # Whatever stands elsewhere, NaN too, is not part of them.
            means = torch.where(covered == 0, covered, means * covered)
        return means

    def unscored(self, rows: ValidRows, positions: int) -> int:
        """Rows that are projected for the means alone: a softcap leaves no way around the logits of all positions."""
        return positions - sum(rows.host_counts) if self.wants_logit_sums and self.spec.logits_mean == "all" else 0

    def unscored_logit_sums(self, head: Head, rows: ValidRows, labels: Tensor) -> Tensor | None:
        """Σ z where nothing is scored, shape of the labels; None where that is not needed."""
        number = self.unscored(rows, labels.numel())
        if number == 0:
            return None
        scored = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
        valid = torch.ones_like(rows.targets, dtype=torch.bool) if rows.padding is None else ~rows.padding
        rows.scatter_(scored, valid)
        indices = torch.nonzero_static(~scored, size=number, fill_value=0)[:, 0]
        others = ValidRows(indices, torch.full((number,), head.ignore_index, device=labels.device), rows.counts)
        plan = chosen(replace(self.problem(head, rows), tokens=number, gradients=frozenset(), unscored=0))
        statistics = plan.forward(head, others, logit_sum=True).statistics
        found = others.scatter(statistics[LOGIT_SUM], labels)
        return found.masked_fill_(scored.view(labels.shape), 0)


def chosen(problem: Problem) -> Plan:
    """See :func:`fused_pref.head.plans.planner.choose`; a plan that passes the default budget is warned of."""
    plan = plan_of(problem)
    if plan.workspace > problem.budget:
        warn_of(plan, problem)
    return plan


def linear_means(head: Head) -> Tensor:
    """Mean over the vocabulary of every position's logits, scale · (h · mean(W) + mean(b)); (P,)."""
    mean = column_means(head.w, head.accumulator)
    shift = mean.new_zeros(1) if head.b is None else head.b.to(head.accumulator).mean()[None]
    if head.shard is not None:
        share = head.columns / head.vocabulary
        mean, shift = head.shard.sum_exactly(torch.cat((mean, shift)) * share).split((mean.numel(), 1))
    source = Rows(head.hidden.detach())
    result = torch.empty(source.count, dtype=head.accumulator, device=head.hidden.device)
    for part in ranges(source.count, block_rows(head.hidden)):
        if source.flat is not None:
            h = source.flat[part]
        else:
            h = source.read(torch.arange(part.start, part.stop, device=result.device))
        torch.mv(h.to(head.dtype).to(mean.dtype), mean, out=result[part])
    return result.add_(shift).mul_(head.transform.slope)


def column_means(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of each column of (V, D) in ``dtype``, (D,)."""
    if weight.device.type != "cpu":
        return weight.mean(0, dtype=dtype)
    # Summing down columns is slow on a CPU: blocks are added up first.
    number = weight.shape[0]
    total = torch.zeros((min(block_rows(weight), number), weight.shape[1]), dtype=dtype)
    for rows in ranges(number, total.shape[0]):
        total[: rows.stop - rows.start] += weight[rows]
    return total.sum(0).div_(number)
