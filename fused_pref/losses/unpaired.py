"""Objectives of single sequences: BCO and KTO. See :mod:`fused_pref.losses.pair` for what they are functions of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.keywords import BCOKeywords, KTOKeywords, choices
from fused_pref.losses.reward_shift import RewardShift
from fused_pref.losses.scores import Scores, gather, logistic_loss, logits_means, narrow, ratio, saturate
from fused_pref.opaque import argument, opaque
from fused_pref.ops.interface import ShiftMemory, UnpairedSpec
from fused_pref.outputs import BCOOutput, KTOOutput

BCO_REDUCTIONS = choices(BCOKeywords, "reduction")
KTO_LOSS_TYPES = choices(KTOKeywords, "loss_type")


def logistic_value(x: Tensor) -> tuple[Tensor, Tensor]:
    """σ(−x) and its derivative."""
    loss = torch.sigmoid(-x)
    return loss, -loss * torch.sigmoid(x)


# The loss of a sequence with margin x = ±(r − shift), and its derivative; device twins are in ``ops/triton/losses.py``.
UNPAIRED_LOSSES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "bco": partial(logistic_loss, smoothing=0.0),
    "kto": logistic_value,
    "apo_zero_unpaired": logistic_value,
}
Output = BCOOutput | KTOOutput
OUTPUTS: dict[str, type[Output]] = {"bco": BCOOutput, "kto": KTOOutput, "apo_zero_unpaired": KTOOutput}


@validate.remembered("beta", "reduction")
def bco_spec(keywords: Mapping[str, Any]) -> UnpairedSpec:
    """From BCO's keywords."""
    return UnpairedSpec(
        loss_type="bco",
        beta=validate.positive("beta", keywords["beta"]),
        reduction=validate.choice("reduction", keywords["reduction"], BCO_REDUCTIONS),
    )


@validate.remembered("beta", "loss_type", "desirable_weight", "undesirable_weight")
def kto_spec(keywords: Mapping[str, Any]) -> UnpairedSpec:
    """From KTO's keywords."""
    return UnpairedSpec(
        loss_type=validate.choice("loss_type", keywords["loss_type"], KTO_LOSS_TYPES),
        beta=validate.positive("beta", keywords["beta"]),
        desirable_weight=validate.not_negative("desirable_weight", keywords["desirable_weight"]),
        undesirable_weight=validate.not_negative("undesirable_weight", keywords["undesirable_weight"]),
    )


def bco_normalizers(keywords: Mapping[str, Any]) -> tuple[Any, Any]:
    """``sequence_normalizer`` and ``class_normalizer``; one that the reduction does not use is refused, not ignored."""
    sequences, classes = keywords["sequence_normalizer"], keywords["class_normalizer"]
    reduction = keywords["reduction"]
    if sequences is not None and reduction != "mean":
        raise ValueError(f'sequence_normalizer needs reduction="mean"; got reduction={reduction!r}')
    if classes is not None:
        if reduction != "class_mean":
            raise ValueError(f'class_normalizer needs reduction="class_mean"; got reduction={reduction!r}')
        if not isinstance(classes, tuple | list) or len(classes) != 2:
            raise validate.fail("class_normalizer", "a pair (n+, n-)", classes, TypeError)
        if classes[0] is None or classes[1] is None:
            raise validate.fail("class_normalizer", "a pair (n+, n-) of numbers or 0-d tensors", classes, TypeError)
        classes = tuple(validate.normalizer("class_normalizer", count, zero=True) for count in classes)
    if sequences is not None:
        sequences = validate.normalizer("sequence_normalizer", sequences)
    return sequences, classes


def kto_numbers(keywords: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor | None]:
    """``kl`` and ``sequence_normalizer``."""
    kl, sequences = validate.scalar("kl", keywords["kl"]), keywords["sequence_normalizer"]
    return kl, None if sequences is None else validate.normalizer("sequence_normalizer", sequences)


@argument
@dataclass(frozen=True)
class UnpairedObjective:
    """BCO or KTO with its tensors: a value that is evaluated on a batch, or once on each group of its sequences.

    Attributes:
        spec: the hyperparameters.
        desirable: (S,) bool.
        ref_logps: (S,) sums of the reference model.
        shift: the reward shift δ of BCO, or KTO's KL divergence in nats.
        sample_weight: (S,) factors on the losses, or None.
        sequence_normalizer: replaces S in ``reduction="mean"``.
        class_normalizer: replaces the class counts in ``reduction="class_mean"``.
    """

    spec: UnpairedSpec
    desirable: Tensor
    ref_logps: Tensor
    shift: RewardShift | Tensor | float
    sample_weight: Tensor | None
    sequence_normalizer: float | Tensor | None
    class_normalizer: tuple[float | Tensor, float | Tensor] | None

    @property
    def unit(self) -> int:
        """How many sequences decide their own slopes: 1; 0 where the whole batch does, because it moves δ."""
        shift = self.shift
        moves = isinstance(shift, RewardShift) and shift.update == "forward" and shift.updating(recomputed=True)
        return 0 if moves else 1

    def settled(self) -> "UnpairedObjective":
        """The same with the δ of now."""
        return replace(self, shift=self.shift.current()) if isinstance(self.shift, RewardShift) else self

    def for_parts(self, counts: Tensor) -> "UnpairedObjective":
        """The same with the δ of now, whose parts are normalised by the whole batch; counts (S,) of scored tokens."""
        sequences, classes = self.sequence_normalizer, self.class_normalizer
        if self.spec.reduction == "mean":
            sequences = counts.shape[0] if sequences is None else sequences
        elif classes is None:
            classes = (self.desirable.sum(), (~self.desirable).sum())
        return replace(self.settled(), sequence_normalizer=sequences, class_normalizer=classes)

    def part(self, members: tuple[slice, ...]) -> "UnpairedObjective":
        """Of these runs of sequences, from :meth:`for_parts`."""
        return replace(
            self,
            desirable=gather(self.desirable, members),
            ref_logps=gather(self.ref_logps, members),
            sample_weight=None if self.sample_weight is None else gather(self.sample_weight, members),
        )

    def evaluate(self, scores: Scores, backend: str, dtype: torch.dtype) -> tuple[Output, Tensor]:
        """What is reported, in ``dtype``, and the slope ∂loss/∂sums, (S,) float64, from the same code.

        A :class:`RewardShift` is updated here, as the last thing that can fail.
        """
        if backend == "triton" and not (isinstance(self.shift, RewardShift) and self.shift.collective):
            return self._evaluate_triton(scores)
        spec, desirable = self.spec, self.desirable
        rewards = spec.beta * (scores.sums - self.ref_logps.double())
        shift, state = self.shift, None
        if isinstance(shift, RewardShift):
            shift, state = shift.peek(rewards, desirable)
        # A number goes to the device with the launch that adds it: copying it there would wait.
        given = rewards.new_zeros(()) + shift
        used: Any = {"kto": spec.beta * given, "apo_zero_unpaired": 0.0}.get(spec.loss_type, given)
        sign = torch.where(desirable, 1.0, -1.0).to(rewards.dtype)
        losses, slopes = UNPAIRED_LOSSES[spec.loss_type](sign * (rewards - used))
        slope = spec.beta * sign * slopes
        if (spec.desirable_weight, spec.undesirable_weight) != (1, 1):
            weight = torch.full_like(rewards, spec.undesirable_weight).masked_fill(desirable, spec.desirable_weight)
            losses, slope = losses * weight, slope * weight
        if self.sample_weight is not None:
            weight = self.sample_weight.double()
            losses, slope = losses * weight, slope * weight
        counts = (desirable.sum(), (~desirable).sum())
        if spec.reduction == "mean":
            number = max(rewards.shape[0], 1) if self.sequence_normalizer is None else self.sequence_normalizer
            loss, slope = ratio(losses.sum(), number), ratio(slope, number)
        else:
            positives, negatives = self.class_normalizer or counts
            chosen, rejected = losses.where(desirable, 0).sum(), losses.where(~desirable, 0).sum()
            loss = ratio(chosen, positives) + ratio(rejected, negatives)
            slope = torch.where(desirable, ratio(slope, positives), ratio(slope, negatives))
        means = logits_means(scores, desirable, dtype)
        each = (narrow(scores.sums, dtype), narrow(rewards, dtype))
        fields: list[Any] = [narrow(loss, dtype), narrow(given, dtype), *each, *means, *counts]
        result = OUTPUTS[spec.loss_type](*fields), saturate(slope, dtype)
        if isinstance(self.shift, RewardShift):
            self.shift.commit(state)
        return result

    def joined(self, parts: list[Output], scores: Scores, dtype: torch.dtype) -> Output:
        """The results of all groups as those of the batch, whose scores give the means of the logits."""
        losses, shifts, *each = zip(*(part[:4] for part in parts), strict=True)
        loss = narrow(torch.stack(losses).double().sum(), dtype)
        means, counts = logits_means(scores, self.desirable, dtype), (self.desirable.sum(), (~self.desirable).sum())
        fields: list[Any] = [loss, shifts[0], *map(torch.cat, each), *means, *counts]
        return OUTPUTS[self.spec.loss_type](*fields)

    def gather_statistics(self, sums: Tensor) -> None:
        """Let a RewardShift that moves with its step know the batch, from the sums (S,) of its completions."""
        if isinstance(self.shift, RewardShift) and self.shift.updating():
            _, state = self.shift.peek(self.spec.beta * (sums - self.ref_logps.double()), self.desirable)
            self.shift.commit(state)

    def _evaluate_triton(self, scores: Scores) -> tuple[Output, Tensor]:
        objective, memory = self, None
        if isinstance(self.shift, RewardShift):
            objective = replace(self, shift=self.shift.value)
            memory = None if self.shift.kind == "fixed" else self.shift.memory
        loss, scalars, numbers, logps, rewards, slope = unpaired_objective(memory, scores, objective)
        given, *means = scalars.unbind()
        fields: list[Any] = [*(means if scores.totals is not None else (None, None)), *numbers.unbind()]
        return OUTPUTS[self.spec.loss_type](loss, given, logps, rewards, *fields), slope


def _fake_objective(memory: ShiftMemory | None, scores: Scores, *others: Any) -> tuple[Tensor, ...]:
    sums = scores.sums
    loss, scalars, logps = (sums.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), sums.shape))
    numbers = sums.new_empty(2, dtype=torch.int64)
    return loss, scalars, numbers, logps, torch.empty_like(logps), torch.empty_like(sums)


@opaque(fake=_fake_objective, changes=1)
def unpaired_objective(
    memory: ShiftMemory | None, scores: Scores, objective: UnpairedObjective
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.ops.triton.objective.unpaired_objective`; a ``memory`` has the shift and is updated."""
    from fused_pref.ops.triton import objective as kernels

    shift: Any = objective.shift if memory is None else memory
    return kernels.unpaired_objective(
        scores.sums,
        scores.totals,
        scores.positions,
        objective.desirable,
        objective.ref_logps,
        objective.sample_weight,
        shift,
        objective.sequence_normalizer,
        objective.class_normalizer,
        objective.spec,
    )
