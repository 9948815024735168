"""Plan ``frozen_head``: only the hidden states are trained (LoRA). Two products, whatever the objective.

Groups of rows leave U = (onehot − softmax) W in the forward; the backward scales it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from fused_pref.head.plans.head import Gradients, Head, Sums
from fused_pref.head.plans.problem import Forward, Plan, Problem, cuts, number, rounds
from fused_pref.layout import ValidRows
from fused_pref.ops.interface import TargetRows
from fused_pref.ops.torch.chunk import ranges
from fused_pref.ops.torch.matmul import add_product


@dataclass(frozen=True)
class FrozenHead(Plan):
    """Gradients of the hidden states alone."""

    name = "frozen_head"

    @classmethod
    def candidates(cls, problem: Problem) -> Iterator[Self]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        for fused in problem.one_product_forms:
            for rows in cuts(problem.tokens, problem.multiple):
                yield cls.of(problem, rows, problem.vocabulary, fused=fused)

    @classmethod
    def of(cls, problem: Problem, rows: int, columns: int, *, fused: bool = False, saved: int = 0) -> Self:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        p, rows = problem, min(rows, problem.tokens)
        workspace = p.tokens * p.hidden * max(p.itemsize, 4) + p.scratch(rows, columns) + p.cast_weight
        workspace += p.chunk(rows, columns, fused=fused) + p.copied(rows)
        workspace += rows * p.hidden * max(p.itemsize, p.partial) + p.wide_hidden
        seconds = p.product_seconds(rows, columns, ("logits", "hidden")) + p.pass_seconds(rows, columns, fused=fused)
        return cls(rows, columns, 2.0, workspace, rounds(p.tokens, rows) * seconds, fused=fused)

    def steps(self, problem: Problem, unit: str) -> tuple[str, ...]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        groups = number(rounds(problem.tokens, self.rows), "group")
        return (
            f"forward: {groups} of {self.rows} rows x {problem.vocabulary} logits → log-probs, U = ∂logp/∂h",
            "backward: dh = coefficient · U",
        )

    def forward(self, head: Head, rows: ValidRows) -> Forward:
        """Saves U (N, D): ∂logp/∂h of each row, in the dtype of the token math."""
        statistics = head.new_statistics(len(rows.targets))
        u = torch.empty((len(rows.targets), head.weight.shape[1]), dtype=head.accumulator, device=head.hidden.device)
        memory = head.new_chunk(self.rows, head.columns, fused=self.fused)
        for group in ranges(len(rows.targets), self.rows):
            h, targets = head.take(rows, group), rows.targets[group]
            q, done = head.statistics_and_q(statistics[:, group], memory, h, targets, fused=self.fused)
            target_q = head.kernels.take_targets(q, targets, 0) if done.target_q is None else done.target_q
            add_product(u[group], q, head.w, fresh=True)
            target_rows = TargetRows(targets, target_q, head.w)
            head.kernels.scatter_rows(u[group], u[group], -head.transform.slope * done.factor, target_rows=target_rows)
        return Forward(statistics, (u,))

    def backward(
        self, head: Head, rows: ValidRows, saved: tuple[Tensor, ...], chunks: tuple[Tensor, ...], grad_logp: Tensor
    ) -> Gradients:
        """a_n U_n at the valid rows."""
        (u,) = saved
        return Sums(None, None, u).gradients(head, rows, grad_logp, None)
