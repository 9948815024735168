"""Plan ``logprob``: no gradient; a slice of the vocabulary at a time. One product."""

from collections.abc import Iterator
from dataclasses import dataclass

from typing_extensions import Self

from fused_pref.head.plans.head import Head
from fused_pref.head.plans.problem import Forward, Plan, Problem, cuts, number, rounds
from fused_pref.layout import ValidRows
from fused_pref.ops.torch import chunk as torch_chunk
from fused_pref.ops.torch.chunk import ranges


@dataclass(frozen=True)
class Logprob(Plan):
    """Log-probs alone."""

    name = "logprob"

    @classmethod
    def candidates(cls, problem: Problem) -> Iterator[Self]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        p = problem
        least = p.device.scratch + p.cast_weight
        for rows in cuts(p.tokens, p.multiple):
            for columns in cuts(p.vocabulary, p.multiple):
                count = rounds(p.tokens, rows) * rounds(p.vocabulary, columns)
                workspace = p.copied(rows) + rows * columns * p.logits_itemsize + least
                seconds = count * (p.product_seconds(rows, columns, ("logits",)) + p.chunk_seconds(rows, columns))
                yield cls(rows, columns, 1.0, workspace, seconds)
        if p.fused:
            rows, columns = p.tokens, p.vocabulary
            workspace = least + (0 if p.indexed else p.copied(rows))
            seconds = p.product_seconds(rows, columns, ("logits",)) + p.fused_seconds(rows, columns, written=False)
            yield cls(rows, columns, 1.0, workspace, seconds, fused=True)

    def steps(self, problem: Problem, unit: str) -> tuple[str, ...]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        if self.fused:
            return (f"forward: a fused product of {self.rows} x {self.columns}, no logits are written → log-probs",)
        count = rounds(problem.tokens, self.rows) * rounds(problem.vocabulary, self.columns)
        return (f"forward: {number(count, 'chunk')} of {self.rows} x {self.columns} logits → log-probs",)

    @property
    def logits_fate(self) -> str:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        return "never" if self.fused else "once"

    def forward(self, head: Head, rows: ValidRows) -> Forward:
        """A slice of the vocabulary at a time."""
        statistics = torch_chunk.new_statistics(len(rows.targets), head.hidden, head.accumulator)
        if self.fused:
            head.fused.update_statistics(
                statistics, head.operands_of(rows), rows.targets, 0, head.transform, logit_sum=head.logit_sum
            )
            if head.shard is not None:
                head.shard.merge(statistics, logit_sum=head.logit_sum)
            return Forward(statistics)
        memory = head.new_chunk(self.rows, self.columns)
        for group in ranges(len(rows.targets), self.rows):
            h = head.take(rows, group)
            for columns in ranges(head.columns, self.columns):
                z = head.project(memory, h, columns)
                head.kernels.update_statistics(
                    statistics[:, group],
                    z,
                    rows.targets[group],
                    columns.start,
                    head.transform,
                    logit_sum=head.logit_sum,
                )
        if head.shard is not None:
            head.shard.merge(statistics, logit_sum=head.logit_sum)
        return Forward(statistics)
