"""Padded and packed batches: which position scores which label, sums per sequence, and the rows that score a label.

Padded tensors are (S, T), packed ones (N_total,) with ``cu_seqlens`` (S+1,). Only :func:`valid_rows` reads the device.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_pref.opaque import opaque
from fused_pref.spec import Spec


def targets_of(labels: Tensor, cu_seqlens: Tensor | None, spec: Spec) -> Tensor:
    """The label that each position scores, ``ignore_index`` where it scores none; contiguous, shape of ``labels``.

    All that comes after takes these targets in place of the labels.
    """
    if not spec.shift or labels.numel() == 0:
        return labels.contiguous()
    ignore_index = spec.ignore_index
    if spec.backend == "triton":
        return shifted_labels(labels, cu_seqlens, ignore_index)
    if cu_seqlens is None:
        return F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    total = labels.shape[0]
    # An empty sequence ends where the one before it does, and one at the start ends at 0: both mark nothing new.
    ends = torch.zeros(total + 1, dtype=torch.bool, device=labels.device)
    ends = ends.index_fill(0, cu_seqlens.long().clamp(0, total), True)
    return F.pad(labels[1:], (0, 1), value=ignore_index).masked_fill(ends[1:], ignore_index)


@opaque(fake=lambda labels, *others: labels.new_empty(labels.shape))
def shifted_labels(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """:func:`targets_of` with ``shift`` by a Triton kernel."""
    from fused_pref.ops.triton import sequences

    return sequences.targets_of(labels, cu_seqlens, ignore_index)


def weights_of(token_weight: Tensor, cu_seqlens: Tensor | None, spec: Spec, dtype: torch.dtype) -> Tensor:
    """Factors on the log-probs of positions, from those on the log-probs of labels; shape of ``token_weight``."""
    token_weight = token_weight.detach().to(dtype)
    if not spec.shift or token_weight.numel() == 0:
        return token_weight
    return F.pad(token_weight[1:] if cu_seqlens is not None else token_weight[:, 1:], (0, 1))


def weighted(logp: Tensor, weights: Tensor) -> Tensor:
    """Log-probs times their weights; 0 where a weight is 0, also of −inf. NaN, whose gradient is NaN, stays."""
    return torch.where((weights == 0) & ~logp.isnan(), 0, logp * weights)


def sequence_sums(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Float64 sum of each sequence's tokens, (S,), in a fixed order; 0 for an empty one."""
    if cu_seqlens is None:
        return tokens.sum(1, dtype=torch.float64)
    if tokens.numel() == 0:
        return tokens.new_zeros(cu_seqlens.shape[0] - 1, dtype=torch.float64)
    return torch.segment_reduce(tokens.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0)


@dataclass(frozen=True)
class ValidRows:
    """The rows to project, in the order of their positions.

    Attributes:
        indices: (N,) int64 positions in the flattened targets; None where every position is scored.
        targets: (N,) labels.
        counts: (S,) int64 rows of each sequence.
        host_counts: the same on the host; empty under ``max_valid_tokens``, which asks the device nothing.
        padding: (N,) bool, rows beyond the valid ones; None where there is none.
        overflow: 0-d bool, whether there are more valid rows than ``max_valid_tokens``; None where there is no bound.
        weights: (N,) factors on the log-probs, in the dtype of the token math; None: 1.
    """

    indices: Tensor | None
    targets: Tensor
    counts: Tensor
    host_counts: tuple[int, ...] = ()
    padding: Tensor | None = None
    overflow: Tensor | None = None
    weights: Tensor | None = None

    def part(self, members: tuple[slice, ...]) -> "ValidRows":
        """The rows of these runs of sequences, one run after the other."""
        ends = [0, *itertools.accumulate(self.host_counts)]
        runs = [slice(ends[run.start], ends[run.stop]) for run in members]
        counts = torch.cat([self.counts[run] for run in members])
        if self.indices is None:
            indices = torch.cat([torch.arange(run.start, run.stop, device=self.targets.device) for run in runs])
        else:
            indices = torch.cat([self.indices[run] for run in runs])
        host_counts = tuple(count for run in members for count in self.host_counts[run])
        targets = torch.cat([self.targets[run] for run in runs])
        weights = None if self.weights is None else torch.cat([self.weights[run] for run in runs])
        return ValidRows(indices, targets, counts, host_counts, weights=weights)

    def sums(self, values: Tensor) -> Tensor:
        """Float64 sum of each sequence's log-probs times their weights, (N,) → (S,)."""
        if self.weights is not None:
            values = weighted(values, self.weights)
        ends = self.counts.cumsum(0)
        # Rows beyond ``max_valid_tokens`` were not projected: the sums are NaN in the end, whatever stands here.
        ends = ends if self.overflow is None else ends.clamp(max=len(values))
        return sequence_sums(values, F.pad(ends, (1, 0)))

    def expand(self, values: Tensor) -> Tensor:
        """Each sequence's slope at its rows times their weights, (S,) → (N,); 0 at padding."""
        if self.padding is None:
            found = torch.repeat_interleave(values, self.counts, output_size=len(self.targets))
        elif values.shape[0] == 0:
            found = values.new_zeros(len(self.targets))
        else:
            row = torch.arange(len(self.targets), device=values.device)
            sequence = torch.searchsorted(self.counts.cumsum(0), row, right=True).clamp_(max=values.shape[0] - 1)
            found = values[sequence].masked_fill_(self.padding, 0)
        return found if self.weights is None else found * self.weights

    def scatter_(self, flat: Tensor, values: Tensor) -> None:
        """Write rows (N,) at their indices among all positions (P,), each of which is written once; padding is 0."""
        if self.padding is not None:
            values = values.masked_fill(self.padding, 0)
        if self.indices is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, self.indices, values)

    def scatter(self, values: Tensor, targets: Tensor) -> Tensor:
        """(N,) → the shape of all targets, 0 where nothing is scored; NaN everywhere if the rows overflow."""
        flat = values.new_zeros(targets.numel())
        self.scatter_(flat, values)
        if self.overflow is not None:
            flat.masked_fill_(self.overflow, torch.nan)
        return flat.view(targets.shape)

    def gather(self, values: Tensor) -> Tensor:
        """The shape of all targets → (N,)."""
        return values.flatten() if self.indices is None else values.flatten().index_select(0, self.indices)


def valid_rows(targets: Tensor, cu_seqlens: Tensor | None, spec: Spec, first: int = 0) -> ValidRows:
    """The rows of ``targets``, (S, T) or (N_total,), that score a label; their own targets are relative to ``first``.

    Without ``max_valid_tokens`` the host waits once for the number of rows of each sequence.

    Raises:
        ValueError: on a CPU, more rows than ``max_valid_tokens``.
    """
    scored, most = targets != spec.ignore_index, spec.max_valid_tokens
    counts = sequence_sums(scored, cu_seqlens).long()
    flat, total = targets.flatten(), targets.numel()
    if first:
        flat = flat - first
    if most is None:
        # The one host synchronisation of a head call: the sizes of the products.
        host_counts = tuple(counts.tolist())
        number = sum(host_counts)
        if number == total:
            return ValidRows(None, flat, counts, host_counts)
        indices = torch.nonzero_static(scored.flatten(), size=number)[:, 0]
        return ValidRows(indices, flat.index_select(0, indices), counts, host_counts)
    bound = min(most, total)
    number = counts.sum()
    if targets.device.type == "cpu" and number > bound:
        raise ValueError(f"max_valid_tokens must be at least N = {int(number)}; got {most}")
    indices = torch.nonzero_static(scored.flatten(), size=bound, fill_value=-1)[:, 0]
    padding = indices < 0
    # Where there is padding there is a position that scores nothing: the padding points at it.
    spare = scored.flatten().to(torch.uint8).argmin() if total else indices.new_zeros(())
    indices = torch.where(padding, spare, indices)
    return ValidRows(indices, flat.index_select(0, indices), counts, padding=padding, overflow=number > bound)
