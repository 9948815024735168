"""Token log-probs and sums per sequence, in plain PyTorch."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_pref.keywords import Number, TokenKeywords


class Tokens(NamedTuple):
    """A batch as one row of P positions: S·T padded, N_total packed."""

    logits: Tensor  # (P, V) transformed, without gradient
    targets: Tensor  # (P,) int64, the label that a position scores
    logp: Tensor  # (P,) 0 where not scored
    scored: Tensor  # (P,) bool
    sequence: Tensor  # (P,) int64, the sequence of a position
    sums: Tensor  # (S,) float64, of logp
    counts: Tensor  # (S,) int64, scored tokens
    lengths: Tensor  # (S,) int64, what an average divides by: counts, 1 for an empty completion


def score(logits: Tensor, labels: Tensor, keywords: TokenKeywords) -> Tokens:
    """Score every target. Only rows of scored positions enter: others get a zero gradient whatever they hold."""
    sequence, sequences = _sequence_of(labels, keywords["cu_seqlens"])
    targets = _targets(labels.flatten().long(), sequence, keywords["shift"], keywords["ignore_index"])
    scored = targets != keywords["ignore_index"]
    rows = logits.flatten(0, -2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    label_logps = _label_logps(_transform(rows[scored], keywords), targets[scored])
    logp = torch.zeros_like(rows[:, 0]).masked_scatter(scored, label_logps)
    if keywords.get("token_weight") is not None:
        weight = keywords["token_weight"].detach().to(logp.dtype).flatten()  # type: ignore[typeddict-item]
        weight = weight.roll(-1) if keywords["shift"] else weight
        logp = torch.where((weight == 0) & ~logp.isnan(), 0, logp * weight)
    sums = torch.zeros(sequences, dtype=torch.float64, device=rows.device)
    sums = sums.index_add(0, sequence, cast(logp, torch.float64))
    counts = torch.bincount(sequence[scored], minlength=sequences)
    z = _transform(rows.detach(), keywords)
    return Tokens(z, targets, logp, scored, sequence, sums, counts, counts.clamp(min=1))


def _sequence_of(labels: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The sequence of every position, (P,) int64, and their number S."""
    sequences = len(labels) if cu_seqlens is None else len(cu_seqlens) - 1
    lengths = labels.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    return torch.arange(sequences, device=labels.device).repeat_interleave(lengths), sequences


def _targets(labels: Tensor, sequence: Tensor, shift: bool, ignore_index: int) -> Tensor:
    """The label that each position scores, (P,): its own, or with ``shift`` the next one of its sequence, if any."""
    if not shift:
        return labels
    targets = torch.full_like(labels, ignore_index)
    targets[:-1] = labels[1:].where(sequence[1:] == sequence[:-1], ignore_index)
    return targets


def _transform(logits: Tensor, keywords: TokenKeywords) -> Tensor:
    """The logits transform, z = softcap(logit_scale · logits) / temperature with softcap(x) = c tanh(x/c)."""
    z, c = keywords["logit_scale"] * logits, keywords["softcap"]
    return (z if c is None else c * torch.tanh(z / c)) / keywords["temperature"]


def _label_logps(z: Tensor, targets: Tensor) -> Tensor:
    """Per row log softmax(z)[y], (N, V), (N,) → (N,); NaN, and so its gradient, where y is outside the vocabulary."""
    inside = (targets >= 0) & (targets < z.shape[-1])
    logp = z.log_softmax(-1).gather(-1, targets.where(inside, 0)[:, None])[:, 0]
    return logp * torch.where(inside, 1.0, torch.nan).to(logp.dtype)


def given(value: Any, default: Any) -> Any:
    """The value, or where it is None the default."""
    return default if value is None else value


def ratio(total: Tensor, count: Number | Tensor) -> Tensor:
    """A total over a count, 0-d; 0 with zero gradient where the count is 0, but NaN if the total is not finite."""
    count = torch.as_tensor(count, dtype=torch.float64, device=total.device)
    return total / count.where(count > 0, torch.inf)


def logits_mean(tokens: Tokens, members: Tensor, cover: Literal["all", "completion"] | None) -> Tensor | None:
    """Mean of z over the vocabulary and the positions of the ``members`` (S,) bool; 0 where there is no position."""
    if cover is None:
        return None
    positions = members[tokens.sequence]
    z = tokens.logits[positions & tokens.scored if cover == "completion" else positions].double()
    return cast(ratio(z.sum(), z.numel()), tokens.logp.dtype)


def token_metrics(tokens: Tokens) -> dict[str, Tensor]:
    """Means (S,) over the scored tokens of each sequence, 0 for an empty one; NaN with a label outside the vocabulary.

    ``entropy`` −Σ p log p in nats, ``accuracy`` (whether no logit is above the target's), ``sum_sq`` log Σ p².
    """
    z, targets, sequence = tokens.logits[tokens.scored], tokens.targets[tokens.scored], tokens.sequence[tokens.scored]
    inside = (targets >= 0) & (targets < z.shape[-1])
    own = z.gather(-1, targets.where(inside, 0)[:, None])[:, 0]
    values = {
        "entropy": torch.special.entr(z.softmax(-1)).sum(-1),
        "accuracy": (own >= z.amax(-1)).to(z.dtype),
        "sum_sq": (2 * z.log_softmax(-1)).logsumexp(-1),
    }
    means = {}
    for name, value in values.items():
        sums = torch.zeros(len(tokens.sums), dtype=torch.float64, device=z.device)
        sums.index_add_(0, sequence, value.where(inside, torch.nan).double())
        means[name] = cast(sums / tokens.lengths, tokens.logp.dtype)
    return means


class _Cast(torch.autograd.Function):
    """A cast in which finite float64 values, and gradients on their way back, saturate where float32 would overflow."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = value.dtype
        return _saturate(value, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _saturate(grads[0], ctx.dtype), None


def _saturate(value: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(torch.bfloat16).max
    return value.clamp(-largest, largest).where(value.isfinite(), value).to(dtype)


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in this dtype; what is finite stays so."""
    return value if value.dtype == dtype else _Cast.apply(value, dtype)  # type: ignore[return-value]
