"""Plan ``skipping``: asked for by ``skip_mass``; the backward leaves out, row by row, tiles of little probability.

The forward takes every tile (a slice of the vocabulary) in by itself, so that the probability of each (row, tile) is
known before the backward. Of each row the lightest tiles are dropped, as many as together hold at most ``skip_mass``,
never its target's: they are neither computed again nor multiplied. With m_n the mass that row n lost, a_n = ∂L/∂logp_n
and λ = |logit_scale| / temperature (the transform's steepest slope), every dropped entry of ∂L/∂x is at most λ |a_n| p.
So the gradients are wrong by at most

- row n of the logits' gradient: λ |a_n| m_n, the sum of absolute errors over the vocabulary;
- dh_n: λ |a_n| m_n · max_v ‖W_v‖;
- dW: Σ_n λ |a_n| m_n ‖h_n‖, the sum over the vocabulary of the norms of the rows' errors, and so its Frobenius norm;
- dbias: Σ_n λ |a_n| m_n, the sum of absolute errors;

beyond what rounding costs every plan. The loss is that of every other plan: nothing is dropped from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self

from fused_pref.head.plans.head import Gradients, Head, Sums, fused_chunk, scaled_rows
from fused_pref.head.plans.problem import Forward, Plan, Problem, column_cuts, number, rounds
from fused_pref.head.plans.vocab_major import VocabMajor
from fused_pref.layout import ValidRows
from fused_pref.ops.interface import ROW_MAX, SUM_EXP
from fused_pref.ops.torch import chunk as torch_chunk
from fused_pref.ops.torch.chunk import ranges
from fused_pref.ops.torch.matmul import add_product, overlay

# Masses are counted in units of this, rounded up: sums of integers are exact in any order.
UNITS = 2**40


@dataclass(frozen=True)
class Skipping(Plan):
    """``vocab_major`` with nothing saved, whose backward leaves out the tiles of least probability."""

    name = "skipping"
    logits = "needed"

    @classmethod
    def candidates(cls, problem: Problem) -> Iterator[Self]:
        """Products and time are what skipping nothing would take."""
        for columns in column_cuts(problem.vocabulary, problem.multiple):
            # Tiles no wider than they must be.
            if columns <= problem.device.columns:
                yield cls.of(problem, problem.tokens, columns, fused=problem.fused)

    @classmethod
    def of(cls, problem: Problem, rows: int, columns: int, *, fused: bool = False, saved: int = 0) -> Self:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        p, plan = problem, VocabMajor.of(problem, rows, columns, fused=fused)
        # Beside the workspace of ``vocab_major``: the rows that need a tile, and for each row and tile statistics, mass
        # and order by mass.
        selected = p.tokens * p.hidden * (p.itemsize + (max(p.itemsize, 4) if "hidden" in p.gradients else 0))
        workspace = plan.workspace + selected + 48 * rounds(p.vocabulary, columns) * p.tokens
        seconds = plan.seconds if p.tokens else 0.0
        return cls(plan.rows, columns, plan.products, workspace, seconds, fused)

    def steps(self, problem: Problem, unit: str) -> tuple[str, ...]:
        """See :class:`~fused_pref.head.plans.problem.Plan`."""
        slices = rounds(problem.vocabulary, self.columns)
        form = "a fused product, no logits are written" if self.fused else f"{number(slices, 'chunk')} of logits"
        return (
            f"forward: {form} → log-probs, mass of each of {problem.tokens} x {slices} tiles of {self.columns} tokens",
            f"backward: of each tile the rows that need it, computed again → {problem.gradient_names}; "
            f"{self.products:.2f}NDV in all if every row needs every tile, 1.00NDV if none needs any",
        )

    def forward(self, head: Head, rows: ValidRows) -> Forward:
        """Saves the statistics (4, N) and which of the K tiles each row needs, (K, N) bool."""
        if self.fused and len(rows.targets):
            statistics = head.new_statistics(len(rows.targets))
            # Not read in place: padding has to be 0 here, as it is in the backward.
            operands, width = head.operands(head.take(rows)), self.columns
            parts = head.fused.update_statistics(
                statistics, operands, rows.targets, 0, head.transform, logit_sum=head.logit_sum, split_columns=width
            )
        else:
            parts = tile_statistics(head, rows, self.columns)
            statistics = torch_chunk.merged(parts)
        _, one_minus_p = head.finish(statistics, rows.targets)
        # A row's sum is at least 1, or 0 with those of all its tiles.
        scale = one_minus_p / statistics[SUM_EXP].clamp(min=0.5)
        mass = parts[:, SUM_EXP] * (parts[:, ROW_MAX] - statistics[ROW_MAX]).exp_() * scale
        live, lost = dropped(mass, rows.targets, self.columns, head.call.spec.skip_mass or 0.0)
        return Forward(statistics, (statistics, live), dropped=lost)

    def backward(
        self, head: Head, rows: ValidRows, saved: tuple[Tensor, ...], chunks: tuple[Tensor, ...], grad_logp: Tensor
    ) -> Gradients:
        """Of the rows that need each tile."""
        statistics, live = saved
        _, one_minus_p = head.finish(statistics, rows.targets)
        factor = grad_logp * one_minus_p * -head.transform.slope
        h, into = head.take(rows), Sums.of(head, rows)
        if into.hidden is not None:
            into.hidden.zero_()  # added to: no tile has all rows
        if self.fused and len(rows.targets):
            target_q = None
            self._add_on_device(head, rows, statistics, live, h, factor, into)
        else:
            target_q = self._add_on_host(head, rows, statistics, live, h, factor, into)
        return into.gradients(head, rows, factor, target_q)

    def _add_on_host(
        self, head: Head, rows: ValidRows, statistics: Tensor, live: Tensor, h: Tensor, factor: Tensor, into: Sums
    ) -> Tensor:
        """By products whose sizes the host reads, which costs nothing on a CPU.

        Returns:
            (N,) the targets' entries of Q, which are not in the sums.
        """
        target_q, memory = torch.zeros_like(factor), head.new_chunk(len(rows.targets), self.columns)
        dw, db, sums = into
        for tile, columns in zip(live, ranges(head.columns, self.columns), strict=True):
            selected = tile.nonzero()[:, 0]
            x, own, targets = h[selected], factor[selected], rows.targets[selected]
            z = head.project(memory, x, columns)
            q = overlay(z, head.arithmetic.q)
            head.kernels.gradient(q, z, statistics[:, selected], targets, columns.start, head.transform)
            if dw is not None:
                scaled, scale = scaled_rows(head, x, own)
                add_product(dw[columns], q.t(), scaled, fresh=True, scale=scale)
            if db is not None:
                db[columns] = head.bias_gradient(q, own)
            if sums is not None:
                target_q.index_add_(0, selected, head.kernels.take_targets(q, targets, columns.start))
                part = torch.empty(x.shape, dtype=head.arithmetic.product, device=x.device)
                add_product(part, q, head.w[columns], fresh=True)
                sums.index_add_(0, selected, part.to(sums.dtype))
        return target_q

    def _add_on_device(
        self, head: Head, rows: ValidRows, statistics: Tensor, live: Tensor, h: Tensor, factor: Tensor, into: Sums
    ) -> None:
        """By kernels that read the sizes: for each tile the rows that need it come first in a list. Nothing waits."""
        from fused_pref.ops.triton import selected

        order = (~live).to(torch.uint8).argsort(dim=1, stable=True)
        counts = live.sum(1, dtype=torch.int32)
        targets, row_maxes = rows.targets[order], statistics[: SUM_EXP + 1, order]
        x, scale = scaled_rows(head, h, factor) if into.dw is not None else (h, None)
        memory = head.new_chunk(len(rows.targets), self.columns, fused=True)
        for k, columns in enumerate(ranges(head.columns, self.columns)):
            width = columns.stop - columns.start
            q = fused_chunk(memory, len(rows.targets), width)[:, :width]
            operands, count = head.operands(h, columns, order[k]), counts[k]
            head.fused.gradient(q, operands, row_maxes[:, k], targets[k], columns.start, head.transform, count)
            if into.dw is not None:
                selected.weight_product(into.dw[columns], q, x, order[k], count, scale)
            if into.db is not None:
                selected.bias_product(into.db[columns], q, factor, order[k], count)
            if into.hidden is not None:
                selected.hidden_product(into.hidden, q, head.w[columns], order[k], count)


def can_skip(head: Head) -> bool:
    """Whether sizes known to the device alone can be left out: on a CPU, or where the fused kernels read them."""
    return head.fusible or head.hidden.device.type == "cpu"


def tile_statistics(head: Head, rows: ValidRows, tile_columns: int) -> Tensor:
    """Statistics (K, 4, N) of each of the K tiles by itself."""
    tiles = list(ranges(head.columns, tile_columns))
    parts = head.new_statistics(len(rows.targets)).repeat(len(tiles), 1, 1)
    h, memory = head.take(rows), head.new_chunk(len(rows.targets), tile_columns)
    for part, columns in zip(parts, tiles, strict=True):
        z = head.project(memory, h, columns)
        head.kernels.update_statistics(part, z, rows.targets, columns.start, head.transform, logit_sum=head.logit_sum)
    return parts


def dropped(mass: Tensor, targets: Tensor, columns: int, skip_mass: float) -> tuple[Tensor, Tensor]:
    """Which tiles a row needs, and the mass of those it does not.

    Args:
        mass: (K, N) probability of each tile without the target's; a row with a NaN needs every tile.
        targets: (N,) labels.
        columns: width of a tile.
        skip_mass: the most that a row may lose.
    """
    tile = torch.arange(mass.shape[0], device=mass.device)[:, None]
    needed = (tile == torch.div(targets, columns, rounding_mode="floor")) | ~(mass <= 1)
    units = (mass * UNITS).ceil_().masked_fill_(needed, 2 * UNITS).long()
    values, order = units.sort(dim=0, stable=True)
    lost = values.cumsum(0)
    light = lost <= int(skip_mass * UNITS)
    live = torch.empty_like(light).scatter_(0, order, ~light)
    # In float64, which holds the units exactly: the quotient of integers has the default dtype, whatever that is.
    return live, (lost.masked_fill_(~light, 0).amax(0).double() / UNITS).to(mass.dtype)
