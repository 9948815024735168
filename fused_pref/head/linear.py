"""The plans of the linear head, carried out: products by the vendor's library, chunks by the backend's kernels.

``logprob``, ``frozen_head`` and ``vocab_major`` give log-probs of the rows; ``grouped`` is in
:mod:`fused_pref.head.grouped`. Rows are the N valid ones throughout.
"""

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_pref.head.gradients import Gradients, Sums
from fused_pref.head.logits_ops import accumulator_dtype
from fused_pref.head.parallel import Shard
from fused_pref.head.plan import Plan
from fused_pref.head.rows import ValidRows
from fused_pref.head.spec import Transform
from fused_pref.head.streaming import Rows, block_rows, ranges
from fused_pref.ops.torch import chunk as torch_chunk
from fused_pref.ops.torch.matmul import add_product, logits_dtype, overlay, project, upcast


def late_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of a gradient that the upstream gradient still has to scale: float16 would underflow."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def padded(columns: int) -> int:
    """Columns of a chunk of Q: its rows begin on multiples of 32 bytes."""
    return -(-columns // 16) * 16


@dataclass(frozen=True)
class Head:
    """A linear head at work: ``dtype`` is that of the products, ``backend`` whose kernels pass over the chunks.

    With a ``shard`` the weight is a slice of the vocabulary and targets are its columns; others are on another rank.
    """

    hidden: Tensor  # (S, T, D) or (N_total, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    dtype: torch.dtype
    transform: Transform
    ignore_index: int
    backend: str
    shard: Shard | None = None

    @cached_property
    def w(self) -> Tensor:
        """The weight in the dtype of the products."""
        return self.weight.detach().to(self.dtype)

    @cached_property
    def b(self) -> Tensor | None:
        """The bias in the dtype of the products."""
        return None if self.bias is None else self.bias.detach().to(self.dtype)

    @property
    def kernels(self) -> ModuleType:
        """The backend's token math on a logits chunk."""
        if self.backend == "triton":
            from fused_pref.ops.triton import chunk as triton_chunk

            return triton_chunk
        return torch_chunk

    @property
    def accumulator(self) -> torch.dtype:
        """Dtype of the token math."""
        return accumulator_dtype(self.dtype)

    @property
    def targets_apart(self) -> bool:
        """Whether the targets' part of dW is added by itself, which a 16-bit product would round beforehand.

        PyTorch has no sum of rows on a GPU that is the same every time and waits for nothing.
        """
        return self.dtype.itemsize == 2 and (self.backend == "triton" or self.hidden.device.type == "cpu")

    @property
    def columns(self) -> int:
        """V; of a shard its rows."""
        return self.weight.shape[0]

    @property
    def vocabulary(self) -> int:
        """V of all shards."""
        return self.columns if self.shard is None else self.shard.vocabulary

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype in which the gradient of the hidden states is gathered up: sums over ranks are rounded once, after."""
        return self.hidden.dtype if self.shard is None else torch.promote_types(self.hidden.dtype, torch.float32)

    def merge(self, statistics: Tensor, *, logit_sum: bool) -> None:
        """Make statistics of this head's columns those of the whole rows."""
        if self.shard is not None:
            self.shard.merge(statistics, logit_sum=logit_sum)

    def take(self, rows: ValidRows, part: slice = slice(None)) -> Tensor:
        """These of the valid rows of the hidden states, (n, D) in the dtype of the products."""
        source = Rows(self.hidden.detach())
        if rows.indices is None:
            if source.flat is not None:
                return source.flat[part].to(self.dtype)
            indices = torch.arange(source.count, device=self.hidden.device)
        else:
            indices = rows.indices
        taken = source.read(indices[part]).to(self.dtype)
        # What stands in a position that is not scored must not reach a product, where 0 · NaN is NaN.
        return taken if rows.padding is None else taken.masked_fill_(rows.padding[part, None], 0)

    def new_chunk(self, rows: int, columns: int, *, fused: bool = False) -> Tensor:
        """Memory for logits, (rows · columns,); ``fused``: for Q alone."""
        h = self.hidden.new_empty(0, dtype=self.dtype)
        if fused:
            return torch.empty(rows * padded(columns), dtype=self.dtype, device=h.device)
        return torch.empty(rows * columns, dtype=logits_dtype(h), device=h.device)

    def project(self, memory: Tensor, h: Tensor, columns: slice = slice(None)) -> Tensor:
        """Raw logits of these columns, (n, v), in memory from :meth:`new_slab`."""
        w = self.w[columns]
        z = memory[: h.shape[0] * w.shape[0]].view(h.shape[0], w.shape[0])
        return project(z, h, w, None if self.b is None else self.b[columns])

    def update_statistics(
        self, statistics: Tensor, memory: Tensor, h: Tensor, targets: Tensor, *, logit_sum: bool, fused: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Statistics of whole rows, and their Q (n, V) times the second result, (n,), None for 1."""
        if fused:
            width = padded(self.columns)
            out = memory[: h.shape[0] * width].view(h.shape[0], width)
            multiple = self.fused.exponentials(
                out, self.operands(h), statistics, targets, self.transform, logit_sum=logit_sum
            )
            return out[:, : self.columns], multiple
        z = self.project(memory, h)
        q = overlay(z, self.dtype)
        if self.shard is None:
            self.kernels.update_statistics(statistics, z, targets, 0, self.transform, logit_sum=logit_sum, out=q)
        else:
            self.kernels.update_statistics(statistics, z, targets, 0, self.transform, logit_sum=logit_sum)
            self.merge(statistics, logit_sum=logit_sum)
            self.kernels.gradient(q, z, statistics, targets, 0, self.transform)
        return q, None

    @property
    def fused(self) -> ModuleType:
        """``update_statistics``, ``gradient`` and ``exponentials`` of products whose logits never leave the chip."""
        from fused_pref.ops.triton import linear as fused

        return fused

    @property
    def fusible(self) -> bool:
        """Whether :attr:`fused` serves this head: float32 and halves, weight rows contiguous, offsets in 32 bits."""
        there = self.backend == "triton" and self.hidden.device.type in ("cuda", "cpu")
        return there and self.weight.stride(1) == 1 and max(self.weight.stride(0), self.columns) < 2**22

    @property
    def indexed(self) -> bool:
        """Whether a fused product can read the rows of the hidden states in place."""
        return self.dtype == self.hidden.dtype and self.hidden.stride(-1) == 1 and Rows(self.hidden).flat is not None

    def operands(self, h: Tensor, columns: slice = slice(None), indices: Tensor | None = None) -> object:
        """What a fused product multiplies: rows h, or the rows of h at ``indices``, and a slice of the vocabulary."""
        from fused_pref.ops.triton.gemm import Operands

        # Kernels go through a row, and through the bias, entry by entry.
        h = h if h.stride(1) == 1 else h.contiguous()
        return Operands(h, self.w[columns], None if self.b is None else self.b[columns].contiguous(), indices)

    def operands_of(self, rows: ValidRows) -> object:
        """The same for these rows and the whole vocabulary, the rows read in place if they can be."""
        flat = Rows(self.hidden.detach()).flat
        if flat is None or not self.indexed:
            return self.operands(self.take(rows))
        # Padding stands for some row that is not scored: nobody asks for its statistics.
        return self.operands(flat, indices=rows.indices)

    def finish(self, statistics: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(logp, 1 − p_y) of rows."""
        labels = targets if self.shard is None else targets + self.shard.first
        return torch_chunk.finish(statistics, labels, self.vocabulary, self.ignore_index)

    def new_hidden_gradient(self) -> Tensor:
        """Zeros shaped like the hidden states, contiguous."""
        return torch.zeros_like(self.hidden, dtype=self.hidden_dtype, memory_format=torch.contiguous_format)

    def reduced(self, dh: Tensor) -> Tensor:
        """The gradient of the hidden states over all shards, in their dtype."""
        return dh if self.shard is None else self.shard.reduce(dh).to(self.hidden.dtype)

    def scatter_hidden(
        self, dh: Tensor, rows: ValidRows, sums: Tensor, factor: Tensor, target_q: Tensor | None
    ) -> None:
        """Rows of ``sums``, with their targets', times ``factor`` to their places of ``dh``, contiguous and else 0."""
        target_rows = None if target_q is None else torch_chunk.TargetRows(rows.targets, target_q, self.w)
        self.kernels.scatter_rows(dh.view(-1, dh.shape[-1]), sums, factor, rows.indices, target_rows)

    def bias_gradient(self, q: Tensor, factor: Tensor) -> Tensor:
        """−qᵀ factor, (v,) in the dtype of the token math."""
        total = torch.zeros(q.shape[1], dtype=self.accumulator, device=q.device)
        for part in ranges(q.shape[0], block_rows(q)):
            total.addmv_(q[part].to(total.dtype).t(), factor[part].to(total.dtype), alpha=-1)
        return total


class Skipped(NamedTuple):
    """Which of K tiles of the vocabulary each row needs, (K, N) bool, and the probability of the others, (N,)."""

    live: Tensor
    mass: Tensor


class Forward(NamedTuple):
    """What a forward leaves for the backward.

    Attributes:
        statistics: (4, N) of the rows.
        u: U (N, D) of a frozen head.
        kept: slices of logits.
        skipped: what the ``skipping`` plan leaves out.
    """

    statistics: Tensor
    u: Tensor | None
    saved: list[Tensor]
    skipped: Skipped | None = None


def forward(head: Head, rows: ValidRows, plan: Plan, *, logit_sum: bool) -> Forward:
    """By plan ``logprob``, ``frozen_head`` or ``vocab_major``; ``logit_sum``: also Σ z."""
    if plan.name == "logprob":
        return Forward(logprob(head, rows, plan, logit_sum=logit_sum), None, [])
    if plan.name == "frozen_head":
        return Forward(*frozen_head(head, rows, plan, logit_sum=logit_sum), [])
    statistics, saved = vocab_major(head, rows, plan, logit_sum=logit_sum)
    return Forward(statistics, None, saved)


def logprob(head: Head, rows: ValidRows, plan: Plan, *, logit_sum: bool) -> Tensor:
    """Statistics (4, N) of the rows, a slice of the vocabulary at a time."""
    statistics = torch_chunk.new_statistics(rows.number, head.hidden, head.accumulator)
    if plan.fused:
        head.fused.update_statistics(
            statistics, head.operands_of(rows), rows.targets, 0, head.transform, logit_sum=logit_sum
        )
        head.merge(statistics, logit_sum=logit_sum)
        return statistics
    memory = head.new_chunk(plan.rows, plan.columns)
    for group in ranges(rows.number, plan.rows):
        h = head.take(rows, group)
        for columns in ranges(head.columns, plan.columns):
            z = head.project(memory, h, columns)
            head.kernels.update_statistics(
                statistics[:, group], z, rows.targets[group], columns.start, head.transform, logit_sum=logit_sum
            )
    head.merge(statistics, logit_sum=logit_sum)
    return statistics


def frozen_head(head: Head, rows: ValidRows, plan: Plan, *, logit_sum: bool) -> tuple[Tensor, Tensor]:
    """Statistics (4, N), and U (N, D): ∂logp/∂h of each row, in the dtype of the token math."""
    statistics = torch_chunk.new_statistics(rows.number, head.hidden, head.accumulator)
    u = torch.empty((rows.number, head.weight.shape[1]), dtype=head.accumulator, device=head.hidden.device)
    memory = head.new_chunk(plan.rows, head.columns, fused=plan.fused)
    for group in ranges(rows.number, plan.rows):
        h, targets = head.take(rows, group), rows.targets[group]
        q, multiple = head.update_statistics(
            statistics[:, group], memory, h, targets, logit_sum=logit_sum, fused=plan.fused
        )
        target_q = torch_chunk.take_targets(q, targets, 0)
        add_product(u[group], q, head.w, fresh=True)
        _, one_minus_p = head.finish(statistics[:, group], targets)
        one_minus_p = one_minus_p if multiple is None else one_minus_p / multiple
        target_rows = torch_chunk.TargetRows(targets, target_q, head.w)
        head.kernels.scatter_rows(u[group], u[group], -head.transform.slope * one_minus_p, target_rows=target_rows)
    return statistics, u


def frozen_head_bwd(head: Head, rows: ValidRows, u: Tensor, grad_logp: Tensor) -> Tensor:
    """Gradient of the hidden states, a_n U_n at the valid rows; ``grad_logp`` (N,) is a."""
    dh = head.new_hidden_gradient()
    head.scatter_hidden(dh, rows, u, grad_logp, None)
    return head.reduced(dh)


def vocab_major(head: Head, rows: ValidRows, plan: Plan, *, logit_sum: bool) -> tuple[Tensor, list[Tensor]]:
    """Statistics (4, N), and the raw logits of the first ``plan.saved`` slices, (N, v) each."""
    statistics = torch_chunk.new_statistics(rows.number, head.hidden, head.accumulator)
    h, saved = head.take(rows), []
    slices = list(ranges(head.columns, plan.columns))
    if plan.fused:
        slices, rest = slices[: plan.saved], slice(plan.saved * plan.columns, head.columns)
        operands = head.operands(h, rest)
        head.fused.update_statistics(
            statistics, operands, rows.targets, rest.start, head.transform, logit_sum=logit_sum
        )
    scratch = head.new_chunk(rows.number, plan.columns) if plan.saved < len(slices) else None
    for number, columns in enumerate(slices):
        width = columns.stop - columns.start
        memory = head.new_chunk(rows.number, width) if number < plan.saved or scratch is None else scratch
        z = head.project(memory, h, columns)
        head.kernels.update_statistics(statistics, z, rows.targets, columns.start, head.transform, logit_sum=logit_sum)
        if number < plan.saved:
            saved.append(z)
    head.merge(statistics, logit_sum=logit_sum)
    return statistics, saved


def vocab_major_bwd(
    head: Head,
    rows: ValidRows,
    plan: Plan,
    statistics: Tensor,
    saved: list[Tensor],
    grad_logp: Tensor,
    wanted: frozenset[str],
) -> Gradients:
    """Gradients from a = ``grad_logp`` (N,); the kept slices are used up, the others computed again."""
    _, one_minus_p = head.finish(statistics, rows.targets)
    factor = grad_logp * one_minus_p * head.transform.slope
    h, sums = head.take(rows), Sums.of(head, rows, wanted)
    target_q = _add_slices(head, rows, plan, statistics, saved, h, factor, sums)
    if sums.dw is not None and head.targets_apart:
        head.kernels.add_target_rows(sums.dw, h, -factor * target_q, rows.targets)
    return sums.gradients(head, rows, factor, target_q)


def _add_slices(
    head: Head,
    rows: ValidRows,
    plan: Plan,
    statistics: Tensor,
    saved: list[Tensor],
    h: Tensor,
    factor: Tensor,
    into: Sums,
) -> Tensor:
    """Products of every slice; gives the targets' entries of Q, (N,), which are not in the sums."""
    dw, db, hidden = into
    target_q, apart = torch.zeros_like(factor), dw is not None and head.targets_apart
    x, scale = scaled_rows(head, h, factor) if dw is not None else (None, None)
    memory = None
    for number, columns in enumerate(ranges(head.columns, plan.columns)):
        if number >= len(saved) and memory is None:
            memory = head.new_chunk(rows.number, plan.columns, fused=plan.fused)
        if plan.fused and number >= len(saved) and memory is not None:
            width = columns.stop - columns.start
            q = memory[: h.shape[0] * width].view(h.shape[0], width)
            operands = head.operands(h, columns)
            head.fused.gradient(q, operands, statistics, rows.targets, columns.start, head.transform)
        else:
            z = saved[number] if memory is None else head.project(memory, h, columns)
            q = overlay(z, head.dtype)
            head.kernels.gradient(q, z, statistics, rows.targets, columns.start, head.transform)
        if db is not None:
            db[columns] = head.bias_gradient(q, factor)
        if apart:
            target_q += torch_chunk.take_targets(q, rows.targets, columns.start)
        if dw is not None and x is not None:
            add_product(dw[columns], q.t(), x, fresh=True, scale=scale)
        if hidden is not None:
            if not apart:
                target_q += torch_chunk.take_targets(q, rows.targets, columns.start)
            add_product(hidden, q, head.w[columns], fresh=number == 0, terms=head.columns)
    saved.clear()
    return target_q


def scaled_rows(head: Head, h: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """−factor · h in the dtype of the products, and what the product with it must be multiplied by (None: 1).

    Float16 would underflow: there the factors are divided by the largest, or the rows are float32 as their products.
    """
    if upcast(h):
        return h * -factor[:, None], None
    if head.dtype != torch.float16:
        return _narrow(head, h, -factor), None
    largest = factor.abs().amax() if factor.numel() else factor.new_zeros(())
    unit = torch.where(largest > 0, factor / largest, factor)
    return _narrow(head, h, -unit), torch.where(largest > 0, largest, 1)


def _narrow(head: Head, h: Tensor, factor: Tensor) -> Tensor:
    """H · factor, multiplied in the dtype of the factor and rounded once; contiguous."""
    result = torch.empty_like(h, memory_format=torch.contiguous_format)
    head.kernels.scatter_rows(result, h, factor)
    return result
