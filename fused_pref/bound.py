"""Objectives bound to their tensors: evaluated on a whole batch, or only the slope of some of its sequences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_pref.head.spec import TokenSpec, from_text, to_text
from fused_pref.losses.objectives import BCOSpec, PairSpec, bco_objective, pair_objective, saturate
from fused_pref.losses.reward_shift import RewardShift
from fused_pref.reductions import BCOResult, PairResult, Scores, evaluate_bco, evaluate_pair


@dataclass(frozen=True)
class PairObjective:
    """CPO or DPO with its validated arguments."""

    spec: PairSpec
    ref_logps: Tensor | None
    pair_normalizer: float | Tensor | None
    token_normalizer: float | Tensor | None

    @property
    def unit(self) -> int:
        """Sequences after which their coefficients are known: a pair."""
        return 2

    def __call__(self, scores: Scores, tokens: TokenSpec, dtype: torch.dtype) -> PairResult:
        """On the whole batch."""
        return evaluate_pair(
            scores, self.spec, self.ref_logps, self.pair_normalizer, self.token_normalizer, tokens, dtype
        )

    def slope(self, members: tuple[slice, ...], sums: Tensor, counts: Tensor) -> Tensor:
        """See :data:`fused_pref.head.plans.grouped.Slope`; normalised by the whole batch."""
        pairs = counts.shape[0] // 2
        ref_logps = None if self.ref_logps is None else _gather(self.ref_logps, members).double()
        terms = pair_objective(
            sums,
            _gather(counts, members),
            self.spec,
            ref_logps=ref_logps,
            pair_normalizer=pairs if self.pair_normalizer is None else self.pair_normalizer,
            token_normalizer=counts[:pairs].sum() if self.token_normalizer is None else self.token_normalizer,
        )
        return saturate(terms.slope, torch.float32)


@dataclass(frozen=True)
class BCOObjective:
    """BCO with its validated arguments."""

    spec: BCOSpec
    desirable: Tensor
    ref_logps: Tensor
    delta: RewardShift | Tensor | float
    sample_weight: Tensor | None
    normalizers: Mapping[str, Any]

    def __call__(self, scores: Scores, tokens: TokenSpec, dtype: torch.dtype) -> BCOResult:
        """On the whole batch; updates a RewardShift."""
        return evaluate_bco(
            scores,
            self.spec,
            self.desirable,
            self.ref_logps,
            self.delta,
            self.sample_weight,
            self.normalizers,
            tokens,
            dtype,
        )

    @property
    def unit(self) -> int:
        """Sequences after which their coefficients are known: one, or 0 if not before the batch has moved δ."""
        return 0 if isinstance(self.delta, RewardShift) and self.delta.moving() else 1

    @property
    def current_delta(self) -> Tensor | float:
        """δ before this batch."""
        return self.delta.current() if isinstance(self.delta, RewardShift) else self.delta

    def slope(self, members: tuple[slice, ...], sums: Tensor, counts: Tensor) -> Tensor:
        """See :data:`fused_pref.head.plans.grouped.Slope`; normalised by the whole batch."""
        rewards = self.spec.beta * (sums - _gather(self.ref_logps, members).double())
        normalizers = dict(self.normalizers)
        if self.spec.reduction == "mean" and normalizers["sequence_normalizer"] is None:
            normalizers["sequence_normalizer"] = counts.shape[0]
        if self.spec.reduction == "class_mean" and normalizers["class_normalizer"] is None:
            normalizers["class_normalizer"] = (self.desirable.sum(), (~self.desirable).sum())
        weight = None if self.sample_weight is None else _gather(self.sample_weight, members).double()
        terms = bco_objective(
            rewards,
            _gather(self.desirable, members),
            torch.as_tensor(self.current_delta, dtype=torch.float64, device=rewards.device),
            self.spec,
            sample_weight=weight,
            **normalizers,
        )
        return saturate(terms.slope, torch.float32)


Objective = PairObjective | BCOObjective


def encode(objective: Objective) -> tuple[str, list[Tensor]]:
    """An objective as text and tensors, as a custom op takes it.

    δ is that of now. In place of a tensor the text has its number in the list, as ``"#0"``.
    """
    tensors: list[Tensor] = []
    if isinstance(objective, PairObjective):
        kind, numbers = "pair", objective.spec.constants
        own = (objective.ref_logps, objective.pair_normalizer, objective.token_normalizer)
    else:
        kind, numbers = "bco", (objective.spec.beta, objective.spec.reduction)
        classes = objective.normalizers["class_normalizer"] or (None, None)
        own = (objective.desirable, objective.ref_logps, objective.current_delta, objective.sample_weight)
        own = (*own, objective.normalizers["sequence_normalizer"], *classes)
    values: list[Any] = []
    for value in (*own, *numbers):
        if isinstance(value, Tensor):
            values.append(f"#{len(tensors)}")
            tensors.append(value)
        else:
            values.append(value)
    return to_text((kind, *values)), tensors


def decode(text: str, tensors: list[Tensor]) -> Objective:
    """The objective of :func:`encode`."""
    values: list[Any]
    kind, *values = from_text(text)
    values = [tensors[int(v[1:])] if isinstance(v, str) and v.startswith("#") else v for v in values]
    if kind == "pair":
        own, (_, *numbers) = values[:3], values[3:]
        return PairObjective(PairSpec(own[0] is not None, *numbers), *own)
    desirable, ref_logps, delta, sample_weight, sequence_normalizer, positive, negative, *numbers = values
    classes = None if positive is None else (positive, negative)
    normalizers = {"sequence_normalizer": sequence_normalizer, "class_normalizer": classes}
    return BCOObjective(BCOSpec(*numbers), desirable, ref_logps, delta, sample_weight, normalizers)


def _gather(values: Tensor, members: tuple[slice, ...]) -> Tensor:
    """The entries of these runs of sequences."""
    return torch.cat([values[run] for run in members])
