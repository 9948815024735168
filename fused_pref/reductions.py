"""From token log-probs to the objective: sums per sequence, then loss, slope and all that is reported.

The torch backend does this in plain operations, which any
compiler can see through; the Triton backend in one launch each, as custom ops.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_pref import layout
from fused_pref.head.spec import TokenSpec
from fused_pref.losses.objectives import BCOSpec, PairSpec, bco_objective, narrow, pair_objective, ratio, saturate
from fused_pref.losses.reward_shift import RewardShift, ShiftState


class Scores(NamedTuple):
    """Per-sequence sums of a batch: what the objectives are functions of."""

    sums: Tensor  # (S,) float64 log-probs summed over the completion, with the gradient
    counts: Tensor  # (S,) int64 scored tokens
    totals: Tensor  # (S,) float64 sums over positions of the mean of z over the vocabulary
    positions: Tensor  # (S,) int64 positions in those sums


class PairResult(NamedTuple):
    """A pairwise objective, in the dtype of the results but for the float64 slope."""

    loss: Tensor
    nll_loss: Tensor
    chosen_logits_mean: Tensor
    rejected_logits_mean: Tensor
    logps: Tensor  # (S,)
    rewards: Tensor  # (S,)
    slope: Tensor  # (S,) ∂loss/∂sums


class BCOResult(NamedTuple):
    """The BCO objective, in the dtype of the results but for the float64 slope and int64 counts."""

    loss: Tensor
    delta: Tensor
    chosen_logits_mean: Tensor
    rejected_logits_mean: Tensor
    chosen_count: Tensor
    rejected_count: Tensor
    logps: Tensor  # (S,)
    rewards: Tensor  # (S,)
    slope: Tensor  # (S,) ∂loss/∂sums


def sequence_scores(logp: Tensor, means: Tensor, labels: Tensor, cu_seqlens: Tensor | None, spec: TokenSpec) -> Scores:
    """Sum what was computed per token over each sequence; arguments shaped like ``labels``."""
    if spec.backend == "triton":
        return Scores(*SequenceScoresFunction.apply(logp, means, labels, cu_seqlens, spec))
    sums = layout.sequence_sums(logp, cu_seqlens)
    targets = layout.targets_of(labels, cu_seqlens, shift=spec.shift, ignore_index=spec.ignore_index)
    counts = layout.sequence_sums(targets != spec.ignore_index, cu_seqlens).long()
    positions = layout.lengths_of(labels, cu_seqlens) if spec.logits_mean == "all" else counts
    return Scores(sums, counts, layout.sequence_sums(means, cu_seqlens), positions)


def evaluate_pair(
    scores: Scores,
    spec: PairSpec,
    ref_logps: Tensor | None,
    pair_normalizer: float | Tensor | None,
    token_normalizer: float | Tensor | None,
    tokens: TokenSpec,
    dtype: torch.dtype,
) -> PairResult:
    """CPO or DPO; the arguments of :func:`fused_pref.losses.objectives.pair_objective`, results in ``dtype``."""
    scores = scores._replace(sums=scores.sums.detach())
    if tokens.backend == "triton":
        loss, scalars, logps, rewards, slope = pair_objective_op(
            *scores,
            ref_logps,
            *_split(pair_normalizer),
            *_split(token_normalizer),
            tokens.logits_mean,
            *spec.constants,
        )
        nll_loss, chosen_mean, rejected_mean = scalars.unbind()
        return PairResult(loss, nll_loss, chosen_mean, rejected_mean, logps, rewards, slope)
    terms = pair_objective(
        scores.sums,
        scores.counts,
        spec,
        ref_logps=None if ref_logps is None else ref_logps.double(),
        pair_normalizer=pair_normalizer,
        token_normalizer=token_normalizer,
    )
    sequences = scores.sums.shape[0]
    chosen = torch.arange(sequences, device=scores.sums.device) < sequences // 2
    results = (terms.loss, terms.nll_loss, *_logits_means(scores, chosen), terms.logps, terms.rewards)
    loss, nll_loss, chosen_mean, rejected_mean, logps, rewards = (narrow(result, dtype) for result in results)
    slope = saturate(terms.slope, dtype)
    return PairResult(loss, nll_loss, chosen_mean, rejected_mean, logps, rewards, slope)


def evaluate_bco(
    scores: Scores,
    spec: BCOSpec,
    desirable: Tensor,
    ref_logps: Tensor,
    delta: Tensor | float | RewardShift,
    sample_weight: Tensor | None,
    normalizers: Mapping[str, Any],
    tokens: TokenSpec,
    dtype: torch.dtype,
) -> BCOResult:
    """BCO; the arguments of :func:`fused_pref.losses.objectives.bco_objective`, results in ``dtype``.

    A :class:`RewardShift` is updated here, as the last thing that can fail.
    """
    scores = scores._replace(sums=scores.sums.detach())
    if tokens.backend == "triton" and not (isinstance(delta, RewardShift) and delta.collective):
        return _evaluate_bco_triton(
            scores, spec, desirable, ref_logps, delta, sample_weight, normalizers, tokens.logits_mean
        )
    rewards = spec.beta * (scores.sums - ref_logps.double())
    state: ShiftState | None = None
    used = delta
    if isinstance(delta, RewardShift):
        used, state = delta.peek(rewards, desirable)
    used = torch.as_tensor(used, dtype=torch.float64, device=rewards.device)
    weight = None if sample_weight is None else sample_weight.double()
    terms = bco_objective(rewards, desirable, used, spec, sample_weight=weight, **normalizers)
    loss, shift, chosen, rejected, logps, rewards = (
        narrow(result, dtype) for result in (terms.loss, used, *_logits_means(scores, desirable), scores.sums, rewards)
    )
    counts = desirable.sum(), (~desirable).sum()
    result = BCOResult(loss, shift, chosen, rejected, *counts, logps, rewards, saturate(terms.slope, dtype))
    if isinstance(delta, RewardShift):
        delta.commit(state)
    return result


def _evaluate_bco_triton(
    scores: Scores,
    spec: BCOSpec,
    desirable: Tensor,
    ref_logps: Tensor,
    delta: Tensor | float | RewardShift,
    sample_weight: Tensor | None,
    normalizers: Mapping[str, Any],
    logits_mean: str | None,
) -> BCOResult:
    kind, update, decay = "fixed", None, 0.0
    state: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None, None, None, None)
    if isinstance(delta, RewardShift):
        kind, decay = delta.kind, delta.decay
        update = delta.update if delta.updating() else None
        state = (delta.mean, delta.count, delta.pending_sum, delta.pending_count)
        delta = delta.value
    positive, negative = normalizers["class_normalizer"] or (None, None)
    loss, scalars, numbers, logps, rewards, slope = bco_objective_op(
        scores.sums,
        scores.totals,
        scores.positions,
        desirable,
        ref_logps,
        sample_weight,
        *_split(delta),
        *state,
        *_split(normalizers["sequence_normalizer"]),
        *_split(positive),
        *_split(negative),
        logits_mean,
        spec.reduction,
        spec.beta,
        kind,
        update,
        decay,
    )
    shift, chosen_mean, rejected_mean = scalars.unbind()
    chosen_count, rejected_count = numbers.unbind()
    means = chosen_mean, rejected_mean
    return BCOResult(loss, shift, *means, chosen_count, rejected_count, logps, rewards, slope)


def _logits_means(scores: Scores, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of z over the chosen sequences and over the others; 0 where they have no position."""
    means = []
    for members in (chosen, ~chosen):
        total, positions = scores.totals.where(members, 0).sum(), scores.positions.where(members, 0).sum()
        means.append(ratio(total, positions))
    return means[0], means[1]


def _split(value: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A number or tensor as the two arguments an op takes for it."""
    return (None, value) if isinstance(value, Tensor) else (value, None)


class SequenceScoresFunction(torch.autograd.Function):
    """Token log-probs to :class:`Scores` by the Triton kernels; the gradient of a token is that of its sequence."""

    @staticmethod
    def forward(
        ctx: Any, logp: Tensor, means: Tensor, labels: Tensor, cu_seqlens: Tensor | None, spec: TokenSpec
    ) -> tuple[Tensor, ...]:
        """See :class:`Scores`."""
        constants = (spec.logits_mean, spec.shift, spec.ignore_index)
        sums, *rest = sequence_scores_op(logp, means, labels, cu_seqlens, *constants)
        ctx.save_for_backward(cu_seqlens)
        ctx.tokens_shape = logp.shape
        ctx.mark_non_differentiable(*rest)
        if not torch.compiler.is_compiling():
            # Else zeros would be filled in as the gradients of the rest. Dynamo lacks this, and drops them itself.
            ctx.set_materialize_grads(False)
        return (sums, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        """(S,) → tokens; padded tokens share their sequence's entry."""
        (cu_seqlens,) = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None, None, None
        if cu_seqlens is None:
            tokens = grads[0].float()[:, None].expand(ctx.tokens_shape)
        else:
            tokens = expand_op(grads[0], cu_seqlens, ctx.tokens_shape[0])
        return tokens, None, None, None, None


@torch.library.custom_op("fused_pref::sequence_scores", mutates_args=())
def sequence_scores_op(
    logp: Tensor,
    means: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    logits_mean: str | None,
    shift: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of :class:`Scores`; ``totals`` and ``positions`` are not set with ``logits_mean=None``."""
    from fused_pref.ops.triton import sequences

    return sequences.sequence_scores(logp, means, labels, cu_seqlens, logits_mean, shift, ignore_index)


@sequence_scores_op.register_fake
def _(logp, means, labels, cu_seqlens, *constants):  # type: ignore[no-untyped-def]
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums, counts = (logp.new_empty(sequences, dtype=dtype) for dtype in (torch.float64, torch.int64))
    return sums, counts, torch.empty_like(sums), torch.empty_like(counts)


@torch.library.custom_op("fused_pref::spread", mutates_args=())
def expand_op(values: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Each sequence's value at its positions, (N_total,) float32."""
    from fused_pref.ops.triton import sequences

    return sequences.expand(values, cu_seqlens, total)


@expand_op.register_fake
def _(values, cu_seqlens, total):  # type: ignore[no-untyped-def]
    return values.new_empty(total, dtype=torch.float32)


@torch.library.custom_op("fused_pref::pair_objective", mutates_args=())
def pair_objective_op(
    sums: Tensor,
    counts: Tensor,
    totals: Tensor,
    positions: Tensor,
    ref_logps: Tensor | None,
    pair_number: float | None,
    pair_tensor: Tensor | None,
    token_number: float | None,
    token_tensor: Tensor | None,
    logits_mean: str | None,
    average: bool,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    cpo_alpha: float,
    simpo_gamma: float,
    alpha: float,
    nll_reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, scalars (3,), logps, rewards (S,) float32, slope (S,) float64."""
    from fused_pref.ops.triton import objective

    return objective.pair_objective(
        sums, counts, totals, positions, ref_logps, pair_number, pair_tensor, token_number, token_tensor, logits_mean,
        average, loss_type, beta, label_smoothing, cpo_alpha, simpo_gamma, alpha, nll_reduction,
    )  # fmt: skip


@pair_objective_op.register_fake
def _(sums, *arguments):  # type: ignore[no-untyped-def]
    loss, scalars, logps = (sums.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), sums.shape))
    return loss, scalars, logps, torch.empty_like(logps), torch.empty_like(sums)


STATE = ("shift_mean", "shift_count", "pending_sum", "pending_count")


@torch.library.custom_op("fused_pref::bco_objective", mutates_args=STATE)
def bco_objective_op(
    sums: Tensor,
    totals: Tensor,
    positions: Tensor,
    desirable: Tensor,
    ref_logps: Tensor,
    sample_weight: Tensor | None,
    delta_number: float | None,
    delta_tensor: Tensor | None,
    shift_mean: Tensor | None,
    shift_count: Tensor | None,
    pending_sum: Tensor | None,
    pending_count: Tensor | None,
    sequence_number: float | None,
    sequence_tensor: Tensor | None,
    positive_number: float | None,
    positive_tensor: Tensor | None,
    negative_number: float | None,
    negative_tensor: Tensor | None,
    logits_mean: str | None,
    reduction: str,
    beta: float,
    kind: str,
    update: str | None,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, scalars (3,), class counts (2,), logps, rewards (S,), slope (S,) float64; updates the state."""
    from fused_pref.ops.triton import objective

    return objective.bco_objective(
        sums, totals, positions, desirable, ref_logps, sample_weight, delta_number, delta_tensor,
        shift_mean, shift_count, pending_sum, pending_count, sequence_number, sequence_tensor,
        positive_number, positive_tensor, negative_number, negative_tensor,
        logits_mean, reduction, beta, kind, update, decay,
    )  # fmt: skip


@bco_objective_op.register_fake
def _(sums, *arguments):  # type: ignore[no-untyped-def]
    loss, scalars, logps = (sums.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), sums.shape))
    numbers = sums.new_empty(2, dtype=torch.int64)
    return loss, scalars, numbers, logps, torch.empty_like(logps), torch.empty_like(sums)
