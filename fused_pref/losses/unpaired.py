"""Objectives of single sequences: BCO. See :mod:`fused_pref.losses.pair` for what they are functions of."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.keywords import BCOKeywords, choices
from fused_pref.losses.reward_shift import RewardShift, ShiftState
from fused_pref.losses.scores import Scores, gather, logistic_loss, logits_means, narrow, ratio, saturate, split
from fused_pref.ops.interface import BCOSpec, ShiftMemory

BCO_REDUCTIONS = choices(BCOKeywords, "reduction")


@validate.remembered("beta", "reduction")
def bco_spec(keywords: Mapping[str, Any]) -> BCOSpec:
    """From BCO's keywords."""
    return BCOSpec(
        beta=validate.positive("beta", keywords["beta"]),
        reduction=validate.choice("reduction", keywords["reduction"], BCO_REDUCTIONS),
    )


class BCOTerms(NamedTuple):
    """The BCO objective over S sequences, float64."""

    loss: Tensor  # 0-d
    slope: Tensor  # (S,) ∂loss/∂sums


def bco_objective(
    rewards: Tensor,
    desirable: Tensor,
    delta: Tensor | float,
    spec: BCOSpec,
    *,
    sample_weight: Tensor | None = None,
    sequence_normalizer: float | Tensor | None = None,
    class_normalizer: tuple[float | Tensor, float | Tensor] | None = None,
) -> BCOTerms:
    """BCO from rewards β(logps − ref_logps): −logσ(r − δ) for desirable, −logσ(−(r − δ)) for undesirable sequences.

    Args:
        rewards: (S,) float64.
        desirable: (S,) bool.
        delta: the reward shift, 0-d float64 or a number.
        spec: the hyperparameters.
        sample_weight: (S,) float64 factors on the losses.
        sequence_normalizer: replaces S in ``reduction="mean"``.
        class_normalizer: replaces the class counts in ``reduction="class_mean"``.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(rewards.dtype)
    losses, slopes = logistic_loss(sign * (rewards - delta), 0.0)
    slope = spec.beta * sign * slopes
    if sample_weight is not None:
        losses, slope = losses * sample_weight, slope * sample_weight
    if spec.reduction == "mean":
        count = max(rewards.shape[0], 1) if sequence_normalizer is None else sequence_normalizer
        return BCOTerms(ratio(losses.sum(), count), ratio(slope, count))
    positives, negatives = class_normalizer or (desirable.sum(), (~desirable).sum())
    loss = ratio(losses.where(desirable, 0).sum(), positives) + ratio(losses.where(~desirable, 0).sum(), negatives)
    return BCOTerms(loss, torch.where(desirable, ratio(slope, positives), ratio(slope, negatives)))


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


@dataclass(frozen=True)
class BCOObjective:
    """BCO with its tensors: a value that is evaluated on a batch, or once on each group of its sequences.

    Attributes:
        spec: the hyperparameters.
        desirable: (S,) bool.
        ref_logps: (S,).
        delta: the reward shift.
        sample_weight: (S,) factors, or None.
        normalizers: ``sequence_normalizer`` and ``class_normalizer``.
    """

    spec: BCOSpec
    desirable: Tensor
    ref_logps: Tensor
    delta: RewardShift | Tensor | float
    sample_weight: Tensor | None
    normalizers: Mapping[str, Any]

    @property
    def unit(self) -> int:
        """Sequences after which their slopes are known: one, or 0 if not before the batch has moved δ."""
        moves = isinstance(self.delta, RewardShift) and self.delta.update == "forward" and self.delta.learning()
        return 0 if moves else 1

    @property
    def current_delta(self) -> Tensor | float:
        """δ before this batch."""
        return self.delta.current() if isinstance(self.delta, RewardShift) else self.delta

    def for_parts(self, counts: Tensor) -> "BCOObjective":
        """The same with the δ of now, whose parts are normalised by the whole batch; counts (S,) of scored tokens."""
        normalizers = dict(self.normalizers)
        if self.spec.reduction == "mean" and normalizers["sequence_normalizer"] is None:
            normalizers["sequence_normalizer"] = counts.shape[0]
        if self.spec.reduction == "class_mean" and normalizers["class_normalizer"] is None:
            normalizers["class_normalizer"] = (self.desirable.sum(), (~self.desirable).sum())
        return replace(self, delta=self.current_delta, normalizers=normalizers)

    def part(self, members: tuple[slice, ...]) -> "BCOObjective":
        """Of these runs of sequences, from :meth:`for_parts`."""
        return replace(
            self,
            desirable=gather(self.desirable, members),
            ref_logps=gather(self.ref_logps, members),
            sample_weight=None if self.sample_weight is None else gather(self.sample_weight, members),
        )

    def evaluate(self, scores: Scores, backend: str, dtype: torch.dtype) -> BCOResult:
        """Loss, slope and all that is reported, from the same code; results in ``dtype``.

        A :class:`RewardShift` is updated here, as the last thing that can fail.
        """
        if backend == "triton" and not (isinstance(self.delta, RewardShift) and self.delta.collective):
            return self._evaluate_triton(scores)
        rewards = self.spec.beta * (scores.sums - self.ref_logps.double())
        state: ShiftState | None = None
        used = self.delta
        if isinstance(self.delta, RewardShift):
            used, state = self.delta.peek(rewards, self.desirable)
        used = torch.as_tensor(used, dtype=torch.float64, device=rewards.device)
        weight = None if self.sample_weight is None else self.sample_weight.double()
        terms = bco_objective(rewards, self.desirable, used, self.spec, sample_weight=weight, **self.normalizers)
        result = BCOResult(
            narrow(terms.loss, dtype),
            narrow(used, dtype),
            *logits_means(scores, self.desirable, dtype),
            self.desirable.sum(),
            (~self.desirable).sum(),
            narrow(scores.sums, dtype),
            narrow(rewards, dtype),
            saturate(terms.slope, dtype),
        )
        if isinstance(self.delta, RewardShift):
            self.delta.commit(state)
        return result

    def joined(self, parts: list[BCOResult], scores: Scores, dtype: torch.dtype) -> BCOResult:
        """The results of all groups as those of the batch, whose scores give the means of the logits."""
        if len(parts) == 1 and scores.totals is None:
            return parts[0]

        def in_order(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        return BCOResult(
            narrow(torch.stack([part.loss for part in parts]).double().sum(), dtype),
            parts[0].delta,
            *logits_means(scores, self.desirable, dtype),
            self.desirable.sum(),
            (~self.desirable).sum(),
            in_order("logps"),
            in_order("rewards"),
            in_order("slope"),
        )

    def gather_statistics(self, sums: Tensor) -> None:
        """Let a RewardShift that moves with its step know the batch, from the sums (S,) of its completions."""
        if isinstance(self.delta, RewardShift) and self.delta.updating():
            _, state = self.delta.peek(self.spec.beta * (sums - self.ref_logps.double()), self.desirable)
            self.delta.commit(state)

    def _evaluate_triton(self, scores: Scores) -> BCOResult:
        delta: Any = self.delta
        shift: Any = (*[None] * 4, "fixed", None, 0.0)
        if isinstance(delta, RewardShift):
            if delta.kind != "fixed":
                update = delta.update if delta.updating() else None
                state = (delta.mean, delta.count, delta.pending_sum, delta.pending_count)
                shift = ShiftMemory(*state, delta.kind, update, delta.decay)
            delta = delta.value
        positive, negative = self.normalizers["class_normalizer"] or (None, None)
        loss, scalars, numbers, logps, rewards, slope = bco_objective_op(
            scores.sums,
            scores.totals,
            scores.positions,
            self.desirable,
            self.ref_logps,
            self.sample_weight,
            *split(delta),
            *shift,
            *split(self.normalizers["sequence_normalizer"]),
            *split(positive),
            *split(negative),
            *astuple(self.spec),
        )
        used, chosen_mean, rejected_mean = scalars.unbind()
        chosen, rejected = numbers.unbind()
        return BCOResult(loss, used, chosen_mean, rejected_mean, chosen, rejected, logps, rewards, slope)


@torch.library.custom_op(
    "fused_pref::bco_objective", mutates_args=("shift_mean", "shift_count", "pending_sum", "pending_count")
)
def bco_objective_op(
    sums: Tensor,
    totals: Tensor | None,
    positions: Tensor | None,
    desirable: Tensor,
    ref_logps: Tensor,
    sample_weight: Tensor | None,
    delta_number: float | None,
    delta_tensor: Tensor | None,
    shift_mean: Tensor | None,
    shift_count: Tensor | None,
    pending_sum: Tensor | None,
    pending_count: Tensor | None,
    kind: str,
    update: str | None,
    decay: float,
    sequence_number: float | None,
    sequence_tensor: Tensor | None,
    positive_number: float | None,
    positive_tensor: Tensor | None,
    negative_number: float | None,
    negative_tensor: Tensor | None,
    beta: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.ops.triton.objective.bco_objective`."""
    from fused_pref.ops.triton import objective

    delta: Any = delta_number if delta_tensor is None else delta_tensor
    if shift_mean is not None and shift_count is not None and pending_sum is not None and pending_count is not None:
        delta = ShiftMemory(shift_mean, shift_count, pending_sum, pending_count, kind, update, decay)
    positive = positive_number if positive_tensor is None else positive_tensor
    negative = negative_number if negative_tensor is None else negative_tensor
    return objective.bco_objective(
        sums,
        totals,
        positions,
        desirable,
        ref_logps,
        sample_weight,
        delta,
        sequence_number if sequence_tensor is None else sequence_tensor,
        None if positive is None or negative is None else (positive, negative),
        BCOSpec(beta, reduction),
    )


@bco_objective_op.register_fake
def _(sums, *arguments):  # type: ignore[no-untyped-def]
    loss, scalars, logps = (sums.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), sums.shape))
    numbers = sums.new_empty(2, dtype=torch.int64)
    return loss, scalars, numbers, logps, torch.empty_like(logps), torch.empty_like(sums)
