"""Plan ``logprob``: no gradient; a slice of the vocabulary at a time. One product."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from typing_extensions import Self

from fused_pref.head.plans.head import Head
from fused_pref.head.plans.problem import Forward, Plan, Problem, column_cuts, cuts, number, rounds
from fused_pref.layout import ValidRows
from fused_pref.ops.torch.chunk import Rows, ranges


@dataclass(frozen=True)
class Logprob(Plan):
    """Log-probs alone.

    Attributes:
        gather: whether a fused product reads a copy of the rows, by descriptor where the device has them; else it reads
            them in place, by their indices.
    """

    name = "logprob"

    gather: bool = False

    @classmethod
    def candidates(cls, problem: Problem) -> Iterator[Self]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        p = problem
        heights, widths = cuts(p.tokens, p.multiple), column_cuts(p.vocabulary, p.multiple)
        for rows, columns in itertools.product(heights, widths):
            # A long side beside a short one is for those whose other side cannot be longer.
            if rows == p.tokens or columns in (p.vocabulary, widths[-1]) or rows <= 4 * columns <= 16 * rows:
                yield cls.of(p, rows, columns)
        for gather in (True, False) if p.fused else ():
            if gather or (p.indexed and p.gathered):
                yield cls.of(p, p.tokens, p.vocabulary, fused=True, gather=gather)

    @classmethod
    def of(
        cls, problem: Problem, rows: int, columns: int, *, fused: bool = False, saved: int = 0, gather: bool = False
    ) -> Self:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        p, rows = problem, min(rows, problem.tokens)
        seconds = p.product_seconds(rows, columns, ("logits",))
        if fused:
            copied = p.copied(rows)
            workspace = p.scratch(0, 0) + (copied if gather else 0)
            seconds += p.fused_seconds(rows, columns, written=False)
            if gather:
                seconds += 2 * copied / p.device.bandwidth
            elif copied:
                seconds += rows * columns * p.hidden * p.device.by_index
        else:
            workspace = p.scratch(rows, columns) + p.copied(rows) + p.chunk(rows, columns)
            seconds = (
                rounds(p.tokens, rows) * rounds(p.vocabulary, columns) * (seconds + p.chunk_seconds(rows, columns))
            )
        return cls(rows, columns, 1.0, workspace + p.cast_weight, seconds, fused=fused, gather=gather)

    def fit(self, problem: Problem) -> Self:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        return self.of(problem, self.rows, self.columns, fused=self.fused, gather=self.gather)

    def steps(self, problem: Problem, unit: str) -> tuple[str, ...]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        if self.fused:
            rows = "rows are copied; " if problem.gathered and self.gather else ""
            return (
                f"forward: {rows}a fused product of {self.rows} x {self.columns}, no logits are written → log-probs",
            )
        count = rounds(problem.tokens, self.rows) * rounds(problem.vocabulary, self.columns)
        return (f"forward: {number(count, 'chunk')} of {self.rows} x {self.columns} logits → log-probs",)

    def forward(self, head: Head, rows: ValidRows) -> Forward:
        """A slice of the vocabulary at a time."""
        targets = rows.targets
        statistics = head.new_statistics(len(targets))
        if self.fused:
            flat = None if self.gather else Rows(head.hidden.detach()).flat
            # Read in place, padding stands for some row that is not scored: nobody asks for its statistics.
            operands = head.operands(head.take(rows)) if flat is None else head.operands(flat, indices=rows.indices)
            head.fused.update_statistics(statistics, operands, targets, 0, head.transform, logit_sum=head.logit_sum)
        else:
            memory = head.new_chunk(self.rows, self.columns)
            for group in ranges(len(targets), self.rows):
                h = head.take(rows, group)
                for columns in ranges(head.columns, self.columns):
                    z = head.project(memory, h, columns)
                    head.kernels.update_statistics(
                        statistics[:, group], z, targets[group], columns.start, head.transform, logit_sum=head.logit_sum
                    )
        if head.shard is not None:
            head.shard.merge(statistics, logit_sum=head.logit_sum)
        return Forward(statistics)
