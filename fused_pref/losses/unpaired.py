"""Objectives of single sequences: BCO. See :mod:`fused_pref.losses.pair` for what they are functions of."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.keywords import BCOKeywords, choices
from fused_pref.losses.reward_shift import RewardShift
from fused_pref.losses.scores import Scores, gather, logistic_loss, logits_means, narrow, ratio, saturate, split
from fused_pref.ops.interface import BCOSpec, ShiftMemory
from fused_pref.outputs import BCOOutput

BCO_REDUCTIONS = choices(BCOKeywords, "reduction")


@validate.remembered("beta", "reduction")
def bco_spec(keywords: Mapping[str, Any]) -> BCOSpec:
    """From BCO's keywords."""
    return BCOSpec(
        beta=validate.positive("beta", keywords["beta"]),
        reduction=validate.choice("reduction", keywords["reduction"], BCO_REDUCTIONS),
    )


@dataclass(frozen=True)
class BCOObjective:
    """BCO with its tensors: a value that is evaluated on a batch, or once on each group of its sequences.

    Attributes:
        spec: the hyperparameters.
        desirable: (S,) bool.
        ref_logps: (S,) sums of the reference model.
        delta: the reward shift.
        sample_weight: (S,) factors on the losses, or None.
        sequence_normalizer: replaces S in ``reduction="mean"``.
        class_normalizer: replaces the class counts in ``reduction="class_mean"``.
    """

    spec: BCOSpec
    desirable: Tensor
    ref_logps: Tensor
    delta: RewardShift | Tensor | float
    sample_weight: Tensor | None
    sequence_normalizer: float | Tensor | None
    class_normalizer: tuple[float | Tensor, float | Tensor] | None

    @property
    def unit(self) -> int:
        """Sequences after which their slopes are known: one, or 0 if not before the batch has moved δ."""
        moves = (
            isinstance(self.delta, RewardShift)
            and self.delta.update == "forward"
            and self.delta.updating(recomputed=True)
        )
        return 0 if moves else 1

    def for_parts(self, counts: Tensor) -> "BCOObjective":
        """The same with the δ of now, whose parts are normalised by the whole batch; counts (S,) of scored tokens."""
        sequences, classes = self.sequence_normalizer, self.class_normalizer
        if self.spec.reduction == "mean":
            sequences = counts.shape[0] if sequences is None else sequences
        elif classes is None:
            classes = (self.desirable.sum(), (~self.desirable).sum())
        delta = self.delta.current() if isinstance(self.delta, RewardShift) else self.delta
        return replace(self, delta=delta, sequence_normalizer=sequences, class_normalizer=classes)

    def part(self, members: tuple[slice, ...]) -> "BCOObjective":
        """Of these runs of sequences, from :meth:`for_parts`."""
        return replace(
            self,
            desirable=gather(self.desirable, members),
            ref_logps=gather(self.ref_logps, members),
            sample_weight=None if self.sample_weight is None else gather(self.sample_weight, members),
        )

    def evaluate(self, scores: Scores, backend: str, dtype: torch.dtype) -> tuple[BCOOutput, Tensor]:
        """What is reported, in ``dtype``, and the slope ∂loss/∂sums, (S,) float64, from the same code.

        A :class:`RewardShift` is updated here, as the last thing that can fail.
        """
        if backend == "triton" and not (isinstance(self.delta, RewardShift) and self.delta.collective):
            return self._evaluate_triton(scores)
        desirable, rewards = self.desirable, self.spec.beta * (scores.sums - self.ref_logps.double())
        delta, state = self.delta, None
        if isinstance(delta, RewardShift):
            delta, state = delta.peek(rewards, desirable)
        # A number goes to the device with the launch that adds it: copying it there would wait.
        used = rewards.new_zeros((), dtype=torch.float64) + delta
        sign = torch.where(desirable, 1.0, -1.0).to(rewards.dtype)
        losses, slopes = logistic_loss(sign * (rewards - used), 0.0)
        slope = self.spec.beta * sign * slopes
        if self.sample_weight is not None:
            weight = self.sample_weight.double()
            losses, slope = losses * weight, slope * weight
        counts = (desirable.sum(), (~desirable).sum())
        if self.spec.reduction == "mean":
            number = max(rewards.shape[0], 1) if self.sequence_normalizer is None else self.sequence_normalizer
            loss, slope = ratio(losses.sum(), number), ratio(slope, number)
        else:
            positives, negatives = self.class_normalizer or counts
            chosen, rejected = losses.where(desirable, 0).sum(), losses.where(~desirable, 0).sum()
            loss = ratio(chosen, positives) + ratio(rejected, negatives)
            slope = torch.where(desirable, ratio(slope, positives), ratio(slope, negatives))
        means = logits_means(scores, desirable, dtype)
        each = (narrow(scores.sums, dtype), narrow(rewards, dtype))
        result = BCOOutput(narrow(loss, dtype), narrow(used, dtype), *each, *means, *counts), saturate(slope, dtype)
        if isinstance(self.delta, RewardShift):
            self.delta.commit(state)
        return result

    def joined(self, parts: list[BCOOutput], scores: Scores, dtype: torch.dtype) -> BCOOutput:
        """The results of all groups as those of the batch, whose scores give the means of the logits."""
        if len(parts) == 1 and scores.totals is None:
            return parts[0]
        losses, deltas, *each = zip(*(part[:4] for part in parts), strict=True)
        loss = narrow(torch.stack(losses).double().sum(), dtype)
        means, counts = logits_means(scores, self.desirable, dtype), (self.desirable.sum(), (~self.desirable).sum())
        fields: list[Any] = [loss, deltas[0], *map(torch.cat, each), *means, *counts]
        return BCOOutput(*fields)

    def gather_statistics(self, sums: Tensor) -> None:
        """Let a RewardShift that moves with its step know the batch, from the sums (S,) of its completions."""
        if isinstance(self.delta, RewardShift) and self.delta.updating():
            _, state = self.delta.peek(self.spec.beta * (sums - self.ref_logps.double()), self.desirable)
            self.delta.commit(state)

    def _evaluate_triton(self, scores: Scores) -> tuple[BCOOutput, Tensor]:
        delta: Any = self.delta
        shift: Any = (*[None] * 4, "fixed", None, 0.0)
        if isinstance(delta, RewardShift):
            shift = shift if delta.kind == "fixed" else delta.memory
            delta = delta.value
        loss, scalars, numbers, logps, rewards, slope = bco_objective_op(
            scores.sums,
            scores.totals,
            scores.positions,
            self.desirable,
            self.ref_logps,
            self.sample_weight,
            *split(delta),
            *shift,
            *split(self.sequence_normalizer),
            *(part for number in self.class_normalizer or (None, None) for part in split(number)),
            *astuple(self.spec),
        )
        used, *means = scalars.unbind()
        fields: list[Any] = [*(means if scores.totals is not None else (None, None)), *numbers.unbind()]
        return BCOOutput(loss, used, logps, rewards, *fields), slope


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
