"""Plan ``vocab_major``: any objective, any budget. Three to four products.

The forward saves the row statistics and some slices of the logits. The backward recomputes the other slices and
finishes the rows of dW that belong to each.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from fused_pref.head.plans.head import Gradients, Head, Sums, fused_chunk, scaled_rows
from fused_pref.head.plans.problem import Forward, Plan, Problem, column_cuts, number, rounds
from fused_pref.layout import ValidRows
from fused_pref.ops.torch.chunk import ranges
from fused_pref.ops.torch.matmul import add_product, overlay


@dataclass(frozen=True)
class VocabMajor(Plan):
    """Gradients in the backward, a slice of the vocabulary at a time."""

    name = "vocab_major"
    logits = "again"

    @classmethod
    def candidates(cls, problem: Problem) -> Iterator[Self]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        p = problem
        forms = (False, True) if p.fused else (False,)
        for columns, fused in itertools.product(column_cuts(p.vocabulary, p.multiple), forms):
            count = rounds(p.vocabulary, columns)
            steps = range(9) if columns >= min(p.device.columns, p.vocabulary) else range(1)
            for saved in sorted({count * part // 8 for part in steps}):
                if not (fused and saved == count):
                    yield cls.of(p, p.tokens, columns, fused=fused, saved=saved)

    @classmethod
    def of(cls, problem: Problem, rows: int, columns: int, *, fused: bool = False, saved: int = 0) -> Self:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        p, rows, gradients = problem, problem.tokens, problem.gradient_products
        hidden, weight = "hidden" in gradients, "weight" in gradients
        count = rounds(p.vocabulary, columns)
        again = count - saved
        sums = rows * p.hidden * max(p.itemsize, 4) + p.wide_hidden if hidden else 0
        fixed = p.copied(rows) + p.scratch(rows, columns) + p.cast_weight + sums
        partial = p.partial * columns * p.hidden if weight and p.weight_itemsize > 2 else 0
        late = max(p.partial * rows * p.hidden if hidden else 0, partial + p.transposed(rows, columns))
        backward = late + (rows * p.hidden * p.operand_itemsize if weight else 0)
        chunks = p.chunk(rows, min(saved * columns, p.vocabulary))
        chunks += p.chunk(rows, columns, fused=fused) if again else 0
        workspace = fixed + max(chunks + backward, p.target_sums(rows, p.weight_itemsize))
        # Of a slice that is saved, and of one that is computed again.
        saved_seconds = p.product_seconds(rows, columns, ("logits", *gradients)) + p.chunk_seconds(rows, columns)
        again_seconds = p.product_seconds(rows, columns, ("logits", "logits", *gradients))
        if fused:
            again_seconds += sum(p.fused_seconds(rows, columns, written=written) for written in (False, True))
        else:
            again_seconds += 2 * p.chunk_seconds(rows, columns)
        products = 1 + len(gradients) + again / count
        seconds = saved * saved_seconds + again * again_seconds
        return cls(rows, columns, products, workspace, seconds, saved=saved, fused=fused)

    def steps(self, problem: Problem, unit: str) -> tuple[str, ...]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        slices = rounds(problem.vocabulary, self.columns)
        chunks, made = number(slices, "chunk"), problem.gradient_names
        again = f"{slices - self.saved} of them computed again"
        if self.fused:
            saved = f"{number(self.saved, 'chunk')} of {problem.tokens} x {self.columns} logits, kept for later, and "
            return (
                f"forward: {saved if self.saved else ''}a fused product of the rest, no logits are written → log-probs",
                f"backward: each of {chunks}, {again} in a fused product → {made}",
            )
        return (
            f"forward: {chunks} of {problem.tokens} x {self.columns} logits → log-probs; {self.saved} kept for later",
            f"backward: each chunk, {again} → {made}",
        )

    def forward(self, head: Head, rows: ValidRows) -> Forward:
        """Saves the statistics (4, N) and the raw logits of the first ``saved`` slices, one chunk (N, v)."""
        statistics, logit_sum = head.new_statistics(len(rows.targets)), head.logit_sum
        h, saved, kept = head.take(rows), (), min(self.saved * self.columns, head.columns)
        if kept:
            z = head.project(head.new_chunk(len(h), kept), h, slice(kept))
            head.kernels.update_statistics(statistics, z, rows.targets, 0, head.transform, logit_sum=logit_sum)
            saved = (z,)
        if self.fused:
            operands = head.operands(h, slice(kept, None))
            head.fused.update_statistics(statistics, operands, rows.targets, kept, head.transform, logit_sum=logit_sum)
        elif kept < head.columns:
            memory = head.new_chunk(len(h), self.columns)
            for columns in ranges(head.columns, self.columns, kept):
                z = head.project(memory, h, columns)
                head.kernels.update_statistics(
                    statistics, z, rows.targets, columns.start, head.transform, logit_sum=logit_sum
                )
        if head.shard is not None:
            head.shard.merge(statistics, logit_sum=logit_sum)
        return Forward(statistics, (statistics,), saved)

    def backward(
        self, head: Head, rows: ValidRows, saved: tuple[Tensor, ...], chunks: tuple[Tensor, ...], grad_logp: Tensor
    ) -> Gradients:
        """The saved chunk is written over, the other slices are computed again."""
        (statistics,) = saved
        _, one_minus_p = head.finish(statistics, rows.targets)
        factor = grad_logp * one_minus_p * -head.transform.slope
        h, sums = head.take(rows), Sums.of(head, rows)
        dw, db, hidden = sums
        # The targets' entries of Q, which are not in the sums of dh, nor in dW where they are added apart.
        target_q, apart = torch.zeros_like(factor), dw is not None and head.targets_apart
        x, scale = scaled_rows(head, h, factor) if dw is not None else (None, None)
        kept = chunks[0].shape[1] if chunks else 0
        memory = head.new_chunk(len(h), self.columns, fused=self.fused) if kept < head.columns else None
        for columns in (*ranges(kept, kept), *ranges(head.columns, self.columns, kept)):
            if self.fused and memory is not None and columns.start >= kept:
                width = columns.stop - columns.start
                q, operands = fused_chunk(memory, len(h), width)[:, :width], head.operands(h, columns)
                head.fused.gradient(q, operands, statistics, rows.targets, columns.start, head.transform)
            else:
                z = chunks[0] if memory is None or columns.start < kept else head.project(memory, h, columns)
                q = overlay(z, head.arithmetic.q)
                head.kernels.gradient(q, z, statistics, rows.targets, columns.start, head.transform)
            if db is not None:
                db[columns] = head.bias_gradient(q, factor)
            if apart:
                target_q += head.kernels.take_targets(q, rows.targets, columns.start)
            if dw is not None and x is not None:
                add_product(dw[columns], q.t(), x, fresh=True, scale=scale)
            if hidden is not None:
                if not apart:
                    target_q += head.kernels.take_targets(q, rows.targets, columns.start)
                add_product(hidden, q, head.w[columns], fresh=columns.start == 0, terms=head.columns)
        if dw is not None and apart:
            head.kernels.add_target_rows(dw, h, factor * target_q, rows.targets)
        return sums.gradients(head, rows, factor, target_q)
