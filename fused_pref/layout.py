"""Padded and packed batches: which position scores which label, and sums per sequence.

Padded tensors are (S, T), packed ones (N_total,) with ``cu_seqlens`` (S+1,). Nothing here reads the device.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def targets_of(labels: Tensor, cu_seqlens: Tensor | None, *, shift: bool, ignore_index: int) -> Tensor:
    """The label that each position scores, ``ignore_index`` where it scores none; shape of ``labels``."""
    if not shift or labels.numel() == 0:
        return labels
    if cu_seqlens is None:
        return F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    total = labels.shape[0]
    # An empty sequence ends where the one before it does, and one at the start ends at 0: both mark nothing new.
    ends = torch.zeros(total + 1, dtype=torch.bool, device=labels.device)
    ends = ends.index_fill(0, cu_seqlens.long().clamp(0, total), True)
    return F.pad(labels[1:], (0, 1), value=ignore_index).masked_fill(ends[1:], ignore_index)


def lengths_of(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Positions of each sequence, (S,) int64."""
    if cu_seqlens is None:
        return torch.full((labels.shape[0],), labels.shape[1], device=labels.device)
    return cu_seqlens.diff().long()


def sequence_sums(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Float64 sum of each sequence's tokens, (S,); 0 for an empty one. Differentiable, in a fixed order."""
    if cu_seqlens is None:
        return tokens.sum(1, dtype=torch.float64)
    return PackedSumFunction.apply(tokens, cu_seqlens)  # type: ignore[return-value]


class PackedSumFunction(torch.autograd.Function):
    """Sums of packed sequences; the gradient of a token is the gradient of its sequence."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(N_total,), (S+1,) → (S,) float64."""
        ctx.save_for_backward(cu_seqlens)
        ctx.tokens_shape, ctx.tokens_dtype = tokens.shape, tokens.dtype
        if tokens.numel() == 0:
            return tokens.new_zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64)
        return torch.segment_reduce(tokens.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """(S,) → (N_total,)."""
        (cu_seqlens,) = ctx.saved_tensors
        (total,) = ctx.tokens_shape
        expand = torch.repeat_interleave(grads[0], cu_seqlens.diff().long(), output_size=total)
        return expand.to(ctx.tokens_dtype), None
