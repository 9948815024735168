"""Per-sequence sums of per-token results, from which objectives are computed, and the arithmetic that objectives share.

The torch backend takes plain operations (:mod:`fused_pref.layout`), which any compiler can see through; the Triton
backend one launch, which is opaque to it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_pref import layout
from fused_pref.opaque import argument, opaque
from fused_pref.ops.interface import LARGEST


class Tokens(NamedTuple):
    """What is known of every position, in the shape of the targets."""

    logp: Tensor  # log-prob, with the gradient
    means: Tensor  # mean of z over the vocabulary
    metrics: Tensor  # (3, *targets.shape), see fused_pref.ops.metrics.token_metrics; (3, 0): not asked for
    dropped: Tensor | None = None  # what ``skip_mass`` leaves out of the gradient; None: not asked for


@argument
class Scores(NamedTuple):
    """Per-sequence sums of a batch: what the objectives are functions of."""

    sums: Tensor  # (S,) float64 log-probs summed over the completion, with the gradient
    counts: Tensor  # (S,) int64 scored tokens
    totals: Tensor | None  # (S,) float64 sums over positions of the mean of z over the vocabulary; None: not known
    positions: Tensor | None  # (S,) int64 positions in those sums


def mean_sums(
    means: Tensor, counts: Tensor, targets: Tensor, cu_seqlens: Tensor | None, logits_mean: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """``totals`` and ``positions`` of :class:`Scores`, from means of z and the scored tokens of each sequence."""
    if logits_mean is None:
        return None, None
    positions = counts
    if logits_mean == "all":
        positions = torch.full_like(counts, targets.shape[-1]) if cu_seqlens is None else cu_seqlens.diff().long()
    return layout.sequence_sums(means, cu_seqlens), positions


def logits_means(scores: Scores, chosen: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Mean of z over the chosen sequences (None: the first half) and over the others, 0 where they have no position.

    Both are None where the scores have no totals.
    """
    if scores.totals is None or scores.positions is None:
        return None, None
    if chosen is None:
        chosen = torch.arange(scores.sums.shape[0], device=scores.sums.device) < scores.sums.shape[0] // 2
    means = []
    for members in (chosen, ~chosen):
        total, positions = scores.totals.where(members, 0).sum(), scores.positions.where(members, 0).sum()
        means.append(narrow(ratio(total, positions), dtype))
    return means[0], means[1]


def ratio(total: Tensor, count: float | Tensor) -> Tensor:
    """``total / count``; 0 where the count is 0, but NaN if the total is not finite."""
    if isinstance(count, Tensor):
        return total / torch.where(count > 0, count.double(), torch.inf)
    return total / (count if count > 0 else torch.inf)


def saturate(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep what is finite in float64 finite in ``dtype``; NaN and infinity stay."""
    if dtype == value.dtype:
        return value
    return torch.where(value.isinf(), value, value.clamp(-LARGEST, LARGEST))


def narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a float64 result without turning a large finite value into infinity."""
    return saturate(value, dtype).to(dtype)


def logistic_loss(x: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """−(1−ε) logσ(x) − ε logσ(−x) and its derivative (the conservative form of label smoothing)."""
    loss = -(1 - smoothing) * F.logsigmoid(x)
    if smoothing:  # else 0 · ∞ where a rejected completion has probability 0
        loss = loss - smoothing * F.logsigmoid(-x)
    return loss, smoothing * torch.sigmoid(x) - (1 - smoothing) * torch.sigmoid(-x)


def gather(values: Tensor, members: tuple[slice, ...]) -> Tensor:
    """The entries of these runs of sequences."""
    return torch.cat([values[run] for run in members])


def expand_packed(
    values: Tensor, upstream: Tensor | None, cu_seqlens: Tensor, total: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Each sequence's value (S,), times ``upstream`` (0-d) in float64, at its positions, (N_total,)."""
    if backend == "triton":
        tokens = values.new_empty(total, dtype=dtype)
        expand(tokens, values, upstream, cu_seqlens)
        return tokens
    scaled = values if upstream is None else values * upstream
    return torch.repeat_interleave(scaled.to(dtype), cu_seqlens.diff().long(), output_size=total)


def _fake_scores(
    logp: Tensor, means: Tensor, targets: Tensor, cu_seqlens: Tensor | None, logits_mean: str | None, ignore_index: int
) -> Scores:
    sequences = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums, counts = (logp.new_empty(sequences, dtype=dtype) for dtype in (torch.float64, torch.int64))
    if logits_mean is None:
        return Scores(sums, counts, None, None)
    return Scores(sums, counts, torch.empty_like(sums), torch.empty_like(counts))


@opaque(fake=_fake_scores)
def sequence_scores(
    logp: Tensor, means: Tensor, targets: Tensor, cu_seqlens: Tensor | None, logits_mean: str | None, ignore_index: int
) -> Scores:
    """The scores of a batch by a Triton kernel."""
    from fused_pref.ops.triton import sequences

    return Scores(*sequences.sequence_scores(logp, means, targets, cu_seqlens, logits_mean, ignore_index))


@opaque(fake=lambda *arguments: None, changes=1)
def expand(tokens: Tensor, values: Tensor, upstream: Tensor | None, cu_seqlens: Tensor) -> None:
    """See :func:`fused_pref.ops.triton.sequences.expand`."""
    from fused_pref.ops.triton import sequences

    sequences.expand(tokens, values, upstream, cu_seqlens)
