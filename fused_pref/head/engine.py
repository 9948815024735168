"""A call of the linear head: its plan, the means of the logits, and an objective on each group of its units."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.head import budget as budgets
from fused_pref.head.advice import advice, ran_out, warn_of
from fused_pref.head.budget import default_budget
from fused_pref.head.plans import planner
from fused_pref.head.plans.grouped import Grouped
from fused_pref.head.plans.head import Batch, Gradients, Head, HeadCall
from fused_pref.head.plans.problem import Forward, Plan, Problem
from fused_pref.head.plans.skipping import can_skip
from fused_pref.layout import ValidRows, valid_rows
from fused_pref.losses.open import OpenObjective
from fused_pref.losses.pair import PairObjective
from fused_pref.losses.scores import Scores, Tokens, gather, mean_sums
from fused_pref.losses.unpaired import UnpairedObjective
from fused_pref.ops import devices
from fused_pref.ops.devices import device_at
from fused_pref.ops.interface import LOGIT_SUM
from fused_pref.ops.metrics import token_metrics
from fused_pref.ops.torch.chunk import Rows, block_rows, ranges

Objective = PairObjective | UnpairedObjective | OpenObjective


def begin(call: HeadCall, batch: Batch, token_weights: Tensor | None = None) -> tuple[Head, ValidRows, Plan]:
    """The head of a call, the rows it has to project, and its plan."""
    first = 0 if call.shard is None else call.shard.first
    rows = valid_rows(batch.targets, batch.cu_seqlens, call.spec, first)
    if token_weights is not None:
        rows = replace(rows, weights=rows.gather(token_weights))
    head = Head(call, *batch[:3])
    return head, rows, plan_of(problem_of(head, rows))


def problem_of(head: Head, rows: ValidRows) -> Problem:
    """What the planner sees."""
    call, weight, shard, counts = head.call, head.weight, head.shard, rows.host_counts
    device = device_at(weight.device)
    # Ranks of a group take one plan, whatever was measured on the machine of each.
    if devices.measured is not None and shard is None:
        device = devices.measured(weight.device, device)
    positions = head.hidden.shape[:-1].numel()
    if call.unit == 2:
        half = len(counts) // 2
        counts = tuple(map(sum, zip(counts[:half], counts[half:], strict=True)))
    # The scale of a fused product's exponentials is that of its own columns.
    fused = head.triton and head.fusible and (shard is None or not head.wanted)
    budget, skip_mass = call.spec.memory_budget, call.spec.skip_mass
    if budget is None:
        sizes = (*weight.shape, weight.dtype.itemsize)
        budget = default_budget(budgets.memory_of(weight.device), *sizes) if shard is None else shard.budget
    return Problem(
        tokens=len(rows.targets),
        positions=positions,
        hidden=weight.shape[1],
        vocabulary=weight.shape[0] if shard is None else shard.largest,
        itemsize=head.dtype.itemsize,
        weight_itemsize=weight.dtype.itemsize,
        gradients=head.wanted,
        local=call.unit > 0,
        units=counts,
        budget=budget,
        promised=call.spec.memory_budget is not None,
        device=device,
        late_scale=weight.dtype == torch.float16,
        upcasts=head.arithmetic.upcast,
        gathered=rows.indices is not None or not head.hidden.is_contiguous() or head.dtype != head.hidden.dtype,
        unscored=_unscored(head, rows, positions) if head.logit_sum else 0,
        fused=fused,
        wide_range=head.dtype != torch.float16,
        indexed=fused and head.indexed,
        skip_mass=skip_mass if skip_mass is not None and shard is None and can_skip(head) else None,
        cast_weight=0 if head.dtype == weight.dtype else weight.numel() * head.dtype.itemsize,
        sum_itemsize=0 if head.hidden_dtype == head.hidden.dtype else head.hidden_dtype.itemsize,
    )


def plan_of(problem: Problem) -> Plan:
    """The plan of :func:`fused_pref.head.plans.planner.choose`, or of the innermost ``planning``.

    Warns if it exceeds the default budget.
    """
    plan = planner.choices[-1](problem)
    if plan.workspace > problem.budget:
        warn_of(plan, problem)
    return plan


@contextlib.contextmanager
def working(head: Head, rows: ValidRows) -> Iterator[None]:
    """Without autocast, and with advice where memory runs out."""
    try:
        with torch.autocast(head.hidden.device.type, enabled=False):
            yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
        raise kind(f"{error}\n{advice(problem_of(head, rows))}") from error


def score(head: Head, rows: ValidRows, plan: Plan, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Forward]:
    """By any plan but ``grouped``: log-probs (N,), means as of :func:`means_of`, metrics, and what the forward gave.

    Metrics are (3, *targets.shape), as of :func:`fused_pref.ops.metrics.token_metrics`; (3, 0) where not asked for.
    """
    unscored = unscored_logit_sums(head, rows, targets) if head.logit_sum else None
    forward = plan.forward(head, rows)
    logp, one_minus_p = head.finish(forward.statistics, rows.targets)
    totals = rows.scatter(forward.statistics[LOGIT_SUM], targets) if head.logit_sum else None
    metrics = logp.new_empty(3, 0)
    if head.metrics:
        found = token_metrics(forward.statistics, logp, one_minus_p)
        metrics = torch.stack([rows.scatter(row, targets) for row in found])
    return logp, means_of(head, rows, targets, totals, unscored), metrics, forward


def evaluate_groups(
    head: Head, rows: ValidRows, plan: Grouped, targets: Tensor, cu_seqlens: Tensor | None, objective: Objective
) -> tuple[Tokens, Gradients, Any]:
    """What is known of the tokens, gradients and output of an objective, evaluated once on each group of its units."""
    spec, dtype, whole = head.call.spec, head.accumulator, objective.for_parts(rows.counts)
    # Of a single group all is known when it is evaluated, unless an activation hides the means; with a shard they come
    # from a collective of their own, which stays after those of the groups.
    single = len(plan.bounds) <= 2 and head.shard is None
    # A check looks at the sums of all sequences, so that it names one by its number in the batch.
    new_sums = torch.zeros_like if validate.checking() else torch.empty_like
    means, known, whole_sums = None, (None, None), new_sums(rows.counts, dtype=torch.float64)
    outputs: list[Any] = []

    def slope(members: tuple[slice, ...] | None, own: Tensor) -> Tensor:
        if rows.overflow is not None:
            own = own.masked_fill(rows.overflow, torch.nan)
        part, counts, totals = whole, rows.counts, known
        runs = (slice(None),) if members is None else members
        for run, piece in zip(runs, own.chunk(len(runs)), strict=True):
            whole_sums[run] = piece
        validate.values("the log-prob of each sequence", whole_sums, torch.isfinite, "finite")
        if members is not None:
            part, counts, totals = whole.part(members), gather(rows.counts, members), (None, None)
        output, found = part.evaluate(Scores(own, counts, *totals), spec.backend, dtype)
        outputs.append(output)
        return found

    with working(head, rows):
        with torch.no_grad():
            unscored = unscored_logit_sums(head, rows, targets) if head.logit_sum else None
            if single and not head.logit_sum:
                means = means_of(head, rows, targets, None, None)
                known = mean_sums(means, rows.counts, targets, cu_seqlens, spec.logits_mean)
            logp, totals, metrics, gradients = plan.run(head, rows, slope)
            if rows.overflow is not None:
                for part in (logp, totals, metrics):
                    part.masked_fill_(rows.overflow, torch.nan)
            metrics = metrics.view(3, *targets.shape) if head.metrics else metrics
            if means is None:
                means = means_of(head, rows, targets, totals.view(targets.shape), unscored)
                late = mean_sums(means, rows.counts, targets, cu_seqlens, spec.logits_mean)
                if len(outputs) > 1 or late[0] is not None:
                    outputs = [objective.joined(outputs, Scores(whole_sums, rows.counts, *late), dtype)]
        # The last thing that can fail, and outside of `no_grad`, where nothing is learnt.
        objective.gather_statistics(whole_sums)
    return Tokens(logp.view(targets.shape), means, metrics), gradients, outputs[0]


def means_of(head: Head, rows: ValidRows, targets: Tensor, totals: Tensor | None, unscored: Tensor | None) -> Tensor:
    """Mean of z over the vocabulary at each position, shape of the targets; 0 where it is not asked for.

    Args:
        head: the head.
        rows: the valid rows.
        targets: (S, T) or (N_total,).
        totals: Σ z of the valid rows in the shape of the targets, used with an activation only.
        unscored: Σ z of the other rows, from :func:`unscored_logit_sums`.
    """
    logits_mean = head.call.spec.logits_mean
    if logits_mean is None or targets.numel() == 0:
        return head.hidden.new_zeros(targets.shape, dtype=head.accumulator)
    if totals is not None and head.logit_sum:
        return (totals if unscored is None else totals + unscored) / head.vocabulary
    means = linear_means(head).view(targets.shape)
    if logits_mean == "completion":
        covered = rows.scatter(torch.ones_like(rows.targets, dtype=means.dtype), targets)
        # Whatever stands elsewhere, NaN too, is not part of them.
        means = torch.where(covered == 0, covered, means * covered)
    return means


def _unscored(head: Head, rows: ValidRows, positions: int) -> int:
    """Rows that are projected for the means alone: with an activation, Σ z needs the logits of every position."""
    return positions - sum(rows.host_counts) if head.call.spec.logits_mean == "all" else 0


def unscored_logit_sums(head: Head, rows: ValidRows, targets: Tensor) -> Tensor | None:
    """Σ z where nothing is scored, shape of the targets; None where that is not needed."""
    number = _unscored(head, rows, targets.numel())
    if number == 0:
        return None
    scored = torch.zeros(targets.numel(), dtype=torch.bool, device=targets.device)
    valid = torch.ones_like(rows.targets, dtype=torch.bool) if rows.padding is None else ~rows.padding
    rows.scatter_(scored, valid)
    indices = torch.nonzero_static(~scored, size=number, fill_value=0)[:, 0]
    others = ValidRows(indices, torch.full((number,), head.ignore_index, device=targets.device), rows.counts)
    plan = plan_of(replace(problem_of(head, rows), unscored=number).means_alone())
    found = others.scatter(plan.forward(head, others).statistics[LOGIT_SUM], targets)
    return found.masked_fill_(scored.view(targets.shape), 0)


def linear_means(head: Head) -> Tensor:
    """Mean over the vocabulary of every position's logits, scale · (h · mean(W) + mean(b)); (P,)."""
    w, dtype = head.w, head.accumulator
    if w.device.type == "cpu":
        # Summing down columns is slow on a CPU: blocks are added up first.
        block = min(block_rows(w.device, w.shape[1]), head.columns, max(64, head.columns // 16))
        total = torch.zeros((block, w.shape[1]), dtype=dtype)
        for rows in ranges(head.columns, block):
            total[: rows.stop - rows.start] += w[rows]
        mean = total.sum(0).div_(head.columns)
    else:
        mean = w.mean(0, dtype=dtype)
    shift = mean.new_zeros(1) if head.b is None else head.b.to(dtype).mean()[None]
    if head.shard is not None:
        fraction = head.columns / head.vocabulary
        mean, shift = head.shard.sum_exactly(torch.cat((mean, shift)) * fraction).split((mean.numel(), 1))
    source = Rows(head.hidden.detach())
    result = torch.empty(source.count, dtype=head.accumulator, device=head.hidden.device)
    for part in ranges(source.count, block_rows(head.hidden.device, head.hidden.shape[-1])):
        if source.flat is not None:
            h = source.flat[part]
        else:
            h = source.read(torch.arange(part.start, part.stop, device=result.device))
        torch.mv(h.to(head.dtype).to(mean.dtype), mean, out=result[part])
    return result.add_(shift).mul_(head.transform.slope)
