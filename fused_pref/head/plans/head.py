"""The linear head at work: its tensors, the chunks of logits that it makes, and its gradients.

Rows are the N valid ones throughout.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fused_pref.head.plans.rows import ValidRows
from fused_pref.head.plans.shard import Shard
from fused_pref.ops.blocks import Rows, block_rows, padded, ranges
from fused_pref.ops.interface import FusedOps, Operands, RowOps, TargetRows, Transform, accumulator_dtype
from fused_pref.ops.torch import chunk as torch_chunk
from fused_pref.ops.torch.matmul import logits_dtype, overlay, project, upcast


def late_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of a gradient that the upstream gradient still has to scale: float16 would underflow."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


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
    def kernels(self) -> RowOps:
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
        """Raw logits of these columns, (n, v), in memory from :meth:`new_chunk`."""
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
    def fused(self) -> FusedOps:
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

    def operands(self, h: Tensor, columns: slice = slice(None), indices: Tensor | None = None) -> Operands:
        """What a fused product multiplies: rows h, or the rows of h at ``indices``, and a slice of the vocabulary."""
        # Kernels go through a row, and through the bias, entry by entry.
        h = h if h.stride(1) == 1 else h.contiguous()
        return Operands(h, self.w[columns], None if self.b is None else self.b[columns].contiguous(), indices)

    def operands_of(self, rows: ValidRows) -> Operands:
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
        """Write rows of ``sums``, with their target rows, times ``factor`` to their rows of ``dh``, else zero."""
        target_rows = None if target_q is None else TargetRows(rows.targets, target_q, self.w)
        self.kernels.scatter_rows(dh.view(-1, dh.shape[-1]), sums, factor, rows.indices, target_rows)

    def bias_gradient(self, q: Tensor, factor: Tensor) -> Tensor:
        """−qᵀ factor, (v,) in the dtype of the token math."""
        total = torch.zeros(q.shape[1], dtype=self.accumulator, device=q.device)
        for part in ranges(q.shape[0], block_rows(q)):
            total.addmv_(q[part].to(total.dtype).t(), factor[part].to(total.dtype), alpha=-1)
        return total


class Gradients(NamedTuple):
    """Gradients of hidden states, weight and bias in their dtypes and shapes; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Sums(NamedTuple):
    """Where a backward from known statistics leaves what it finds, tile by tile; None where not wanted."""

    dw: Tensor | None  # (V, D), in its own dtype
    db: Tensor | None  # (V,), in the dtype of the token math
    hidden: Tensor | None  # (N, D), in the dtype of the token math: Q W, to be multiplied by −factor

    @classmethod
    def of(cls, head: Head, rows: ValidRows, wanted: frozenset[str]) -> "Sums":
        """Memory for them, not initialised."""
        width, kind, device = head.weight.shape[1], head.accumulator, head.hidden.device
        dw = head.weight.new_empty(head.weight.shape) if "weight" in wanted else None
        db = head.weight.new_empty(head.columns, dtype=kind) if "bias" in wanted else None
        return cls(dw, db, torch.empty(rows.number, width, dtype=kind, device=device) if "hidden" in wanted else None)

    def gradients(self, head: Head, rows: ValidRows, factor: Tensor, target_q: Tensor | None) -> Gradients:
        """The gradients, once all tiles are in; ``target_q`` as for :meth:`Head.scatter_hidden`."""
        dh = None
        if self.hidden is not None:
            dh = head.new_hidden_gradient()
            head.scatter_hidden(dh, rows, self.hidden, -factor, target_q)
            dh = head.reduced(dh)
        return Gradients(dh, self.dw, None if self.db is None or head.bias is None else self.db.to(head.bias.dtype))


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
