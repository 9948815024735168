"""The linear head at work: its tensors, the chunks of logits that it makes, and its gradients.

Rows are the N valid ones throughout.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fused_pref.head.plans.shard import Shard
from fused_pref.layout import ValidRows
from fused_pref.opaque import argument
from fused_pref.ops.devices import GPU
from fused_pref.ops.interface import ACCUMULATOR, FinishedRows, Operands, RowOps, TargetRows
from fused_pref.ops.torch import chunk as torch_chunk
from fused_pref.ops.torch.chunk import Rows, block_rows, padded, ranges
from fused_pref.ops.torch.matmul import arithmetic, overlay, project
from fused_pref.spec import Spec

# What can be differentiated, in the order of the arguments.
GRADIENTS = ("hidden", "weight", "bias")


def late_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of a gradient that the upstream gradient still has to scale: float16 would underflow."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


@argument
@dataclass(frozen=True)
class HeadCall:
    """Everything about a call of the head but its tensors.

    Attributes:
        spec: the constants.
        dtype: of the products.
        wanted: gradients that a backward will ask for, of ``GRADIENTS``.
        unit: sequences of a unit whose coefficients are known in the forward: 2 (a pair), 1, or 0 if they are not.
        shard: what this rank holds of a vocab-parallel head; None: all of it.
    """

    spec: Spec
    dtype: torch.dtype
    wanted: frozenset[str]
    unit: int = 0
    shard: Shard | None = None


@argument
class Batch(NamedTuple):
    """The tensors of a call of the head."""

    hidden: Tensor  # (S, T, D) or (N_total, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (S, T) or (N_total,)
    cu_seqlens: Tensor | None  # (S+1,)


class Head:
    """A linear head at work.

    With a ``shard`` the weight is a slice of the vocabulary and targets are its columns; others are on another rank.

    Args:
        call: what is asked of it.
        hidden: (S, T, D) or (N_total, D).
        weight: (V, D).
        bias: (V,) or None.

    Attributes:
        b: the bias in the dtype of the products.
        columns: V; of a shard its rows.
        vocabulary: V of all shards.
        logit_sum: whether Σ z is wanted.
        metrics: whether metrics of the tokens are.
        accumulator: dtype of the token math.
        hidden_dtype: dtype in which the gradient of the hidden states is gathered up: sums over ranks are rounded once,
            after.
        targets_apart: whether the targets' part of dW is added separately, so that a 16-bit product does not round it.
            Not by PyTorch on a GPU: it has no deterministic sum of rows there without a wait.
        kernels: the backend's token math on a logits chunk.
    """

    def __init__(self, call: HeadCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        spec = call.spec
        self.call, self.shard, self.dtype, self.wanted = call, call.shard, call.dtype, call.wanted
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.b = None if bias is None else bias.detach().to(call.dtype)
        self.transform, self.ignore_index, self.triton = spec.transform, spec.ignore_index, spec.backend == "triton"
        self.logit_sum, self.metrics, self.columns = spec.logit_sums, spec.token_metrics, weight.shape[0]
        self.vocabulary = self.columns if call.shard is None else call.shard.vocabulary
        self.accumulator, self.arithmetic = ACCUMULATOR[call.dtype], arithmetic(call.dtype, hidden.device.type)
        self.hidden_dtype = hidden.dtype
        if call.shard is not None:
            self.hidden_dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.targets_apart = self.arithmetic.rows_first or (self.triton and call.dtype.itemsize == 2)
        self.kernels: RowOps = torch_chunk
        if self.triton:
            from fused_pref.ops.triton import chunk as triton_chunk

            self.kernels = triton_chunk

    @cached_property
    def w(self) -> Tensor:
        """The weight in the dtype of the products, cast when a plan first needs it."""
        return self.weight.detach().to(self.dtype)

    def take(self, rows: ValidRows, part: slice = slice(None)) -> Tensor:
        """These of the valid rows of the hidden states, (n, D) in the dtype of the products."""
        source = Rows(self.hidden.detach())
        if source.flat is None:
            everywhere = torch.arange(source.count, device=self.hidden.device)
            taken = source.read((everywhere if rows.indices is None else rows.indices)[part])
        elif rows.indices is None:
            return source.flat[part].to(self.dtype)
        else:
            taken = source.flat.index_select(0, rows.indices[part])
        taken = taken.to(self.dtype)
        # What stands in a position that is not scored must not reach a product, where 0 · NaN is NaN.
        return taken if rows.padding is None else taken.masked_fill_(rows.padding[part, None], 0)

    def new_chunk(self, rows: int, columns: int, *, fused: bool = False) -> Tensor:
        """Memory for rows of logits, one after the other; ``fused``: for Q alone."""
        dtype, stride = (self.dtype, padded(columns)) if fused else (self.arithmetic.logits, columns)
        if self.arithmetic.rows_first:
            stride = torch_chunk.row_stride(stride)
        entries, device = rows * stride, self.hidden.device
        if device.type != "cpu":
            entries = GPU.allocation(entries * dtype.itemsize) // dtype.itemsize
        return torch.empty(entries, dtype=dtype, device=device)

    def new_statistics(self, rows: int) -> Tensor:
        """Statistics of rows of which nothing was seen yet, (4, n), or (8, n) with metrics."""
        return torch_chunk.new_statistics(rows, self.hidden, self.accumulator, metrics=self.metrics)

    def project(self, memory: Tensor, h: Tensor, columns: slice = slice(None)) -> Tensor:
        """Raw logits of these columns, (n, v), in memory from :meth:`new_chunk`."""
        w = self.w[columns]
        stride = torch_chunk.row_stride(w.shape[0]) if self.arithmetic.rows_first else w.shape[0]
        z = memory[: h.shape[0] * stride].view(h.shape[0], stride)[:, : w.shape[0]]
        return project(z, h, w, None if self.b is None else self.b[columns])

    def statistics_and_q(
        self, statistics: Tensor, memory: Tensor, h: Tensor, targets: Tensor, *, fused: bool
    ) -> tuple[Tensor, FinishedRows]:
        """Update the statistics of whole rows; gives their Q (n, V), up to a factor, and what is known of them then."""
        if fused:
            out = fused_chunk(memory, h.shape[0], self.columns)
            given = (self.operands(h), statistics, targets, self.transform, self.ignore_index)
            return out[:, : self.columns], self.fused.exponentials(out, *given, logit_sum=self.logit_sum)
        z = self.project(memory, h)
        q = overlay(z, self.arithmetic.q)
        if self.shard is None:
            given = (statistics, targets, self.transform, self.ignore_index)
            return q, self.kernels.exponentials(q, z, *given, logit_sum=self.logit_sum, apart=self.targets_apart)
        self.kernels.update_statistics(statistics, z, targets, 0, self.transform, logit_sum=self.logit_sum)
        self.shard.merge(statistics, logit_sum=self.logit_sum)
        self.kernels.gradient(q, z, statistics, targets, 0, self.transform)
        logp, one_minus_p = self.finish(statistics, targets)
        return q, FinishedRows(logp, one_minus_p, one_minus_p, None)

    @property
    def fused(self):
        """``update_statistics``, ``gradient`` and ``exponentials`` of products whose logits never leave the chip."""
        from fused_pref.ops.triton import linear as fused

        return fused

    @property
    def fusible(self) -> bool:
        """Whether :attr:`fused` serves this head: float32 and halves, weight rows contiguous, offsets in 32 bits."""
        there = self.triton and self.hidden.device.type in ("cuda", "cpu")
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

    def finish(self, statistics: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(logp, 1 − p_y) of rows."""
        labels = targets if self.shard is None else targets + self.shard.first
        return self.kernels.finish(statistics, labels, self.vocabulary, self.ignore_index)

    def scatter_hidden(
        self, dh: Tensor, rows: ValidRows, sums: Tensor, factor: Tensor, target_q: Tensor | None
    ) -> None:
        """Write rows of ``sums``, with their target rows, times ``factor`` to their rows of ``dh``."""
        target_rows = None if target_q is None else TargetRows(rows.targets, target_q, self.w)
        self.kernels.scatter_rows(dh.view(-1, dh.shape[-1]), sums, factor, rows.indices, target_rows)

    def bias_gradient(self, q: Tensor, factor: Tensor) -> Tensor:
        """qᵀ factor, (v,) in the dtype of the token math."""
        total = torch.zeros(q.shape[1], dtype=self.accumulator, device=q.device)
        for part in ranges(q.shape[0], block_rows(q.device, q.shape[1])):
            total.addmv_(q[part].to(total.dtype).t(), factor[part].to(total.dtype))
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
    hidden: Tensor | None  # (N, D), in the dtype of the token math: Q W, to be multiplied by the factors

    @classmethod
    def of(cls, head: Head, rows: ValidRows) -> "Sums":
        """Memory for them, not initialised."""
        width, kind, device = head.weight.shape[1], head.accumulator, head.hidden.device
        dw = head.weight.new_empty(head.weight.shape) if "weight" in head.wanted else None
        db = head.weight.new_empty(head.columns, dtype=kind) if "bias" in head.wanted else None
        hidden = torch.empty(len(rows.targets), width, dtype=kind, device=device) if "hidden" in head.wanted else None
        return cls(dw, db, hidden)

    def gradients(self, head: Head, rows: ValidRows, factor: Tensor, target_q: Tensor | None) -> Gradients:
        """The gradients, once all tiles are in; ``target_q`` as for :meth:`Head.scatter_hidden`."""
        dh = None
        if self.hidden is not None:
            dh = torch.zeros_like(head.hidden, dtype=head.hidden_dtype, memory_format=torch.contiguous_format)
            head.scatter_hidden(dh, rows, self.hidden, factor, target_q)
            if head.shard is not None:
                dh = head.shard.reduce(dh).to(head.hidden.dtype)
        return Gradients(dh, self.dw, None if self.db is None or head.bias is None else self.db.to(head.bias.dtype))


def fused_chunk(memory: Tensor, rows: int, columns: int) -> Tensor:
    """Room for Q by a fused product, (n, v) or wider: its rows begin at whole 32 bytes."""
    return memory[: rows * padded(columns)].view(rows, padded(columns))


def scaled_rows(head: Head, h: Tensor, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows h times ``factor``, and what a product with them must be multiplied by (None: 1).

    Float16 would underflow: there the factors are divided by the largest, or the rows are float32 as their products.
    """
    if head.arithmetic.upcast:
        return h * factor[:, None], None
    scale = None
    if head.dtype == torch.float16:
        largest = factor.abs().amax() if factor.numel() else factor.new_zeros(())
        factor, scale = torch.where(largest > 0, factor / largest, factor), torch.where(largest > 0, largest, 1)
    result = torch.empty_like(h, memory_format=torch.contiguous_format)
    if head.triton:
        return torch.mul(h, factor[:, None], out=result), scale
    # A product of two dtypes is slow on a CPU.
    head.kernels.scatter_rows(result, h, factor)
    return result, scale
