"""The objectives, once: per-sequence log-probs in, loss and its slope out.

Everything here works on (S,) float64 tensors and is a function of two things per sequence: ``sums``, the summed
log-prob of its completion, and ``counts``, the number of scored tokens. The slope is ∂loss/∂sums, in closed form:
the gradient of every logit is then ``slope[s] · (onehot − softmax)``, which is what lets a head form gradients in the
forward. A new pair loss is one function in ``PAIR_LOSSES`` and what CONTRIBUTING.md's recipe names beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_pref import validate
from fused_pref.keywords import BCOKeywords, CPOKeywords, DPOKeywords, choices
from fused_pref.ops.interface import ALPHA_CLAMP, LARGEST

CPO_LOSS_TYPES = choices(CPOKeywords, "loss_type")
DPO_LOSS_TYPES = choices(DPOKeywords, "loss_type")
NLL_REDUCTIONS = choices(CPOKeywords, "nll_reduction")
BCO_REDUCTIONS = choices(BCOKeywords, "reduction")


@dataclass(frozen=True)
class PairSpec:
    """Validated hyperparameters of a pairwise objective; ``reference`` tells DPO from CPO."""

    reference: bool
    loss_type: str
    beta: float
    label_smoothing: float
    cpo_alpha: float = 0.0
    simpo_gamma: float = 0.0
    alpha: float = 0.0
    nll_reduction: str = "token"

    @property
    def average(self) -> bool:
        """Whether log-probs enter as averages over the completion."""
        return self.loss_type in ("ipo", "simpo")

    @property
    def constants(self) -> tuple[bool, str, float, float, float, float, float, str]:
        """What the Triton objective takes, in its order."""
        return (
            self.average,
            self.loss_type,
            self.beta,
            self.label_smoothing,
            self.cpo_alpha,
            self.simpo_gamma,
            self.alpha,
            self.nll_reduction,
        )

    @classmethod
    def cpo(cls, keywords: Mapping[str, Any]) -> "PairSpec":
        """From CPO's keywords."""
        loss_type = validate.choice("loss_type", keywords["loss_type"], CPO_LOSS_TYPES)
        cpo_alpha = validate.finite("cpo_alpha", keywords["cpo_alpha"], "a finite number >= 0")
        if cpo_alpha < 0:
            raise validate.fail("cpo_alpha", "a finite number >= 0", cpo_alpha)
        return cls(
            reference=False,
            loss_type="simpo" if loss_type == "alphapo" else loss_type,
            beta=validate.positive("beta", keywords["beta"]),
            label_smoothing=validate.within("label_smoothing", keywords["label_smoothing"], 0.0, 1.0),
            cpo_alpha=0.0 if loss_type == "alphapo" else cpo_alpha,
            simpo_gamma=validate.finite("simpo_gamma", keywords["simpo_gamma"]),
            alpha=validate.finite("alpha", keywords["alpha"]),
            nll_reduction=validate.choice("nll_reduction", keywords["nll_reduction"], NLL_REDUCTIONS),
        )

    @classmethod
    def dpo(cls, keywords: Mapping[str, Any]) -> "PairSpec":
        """From DPO's keywords."""
        return cls(
            reference=True,
            loss_type=validate.choice("loss_type", keywords["loss_type"], DPO_LOSS_TYPES),
            beta=validate.positive("beta", keywords["beta"]),
            label_smoothing=validate.within("label_smoothing", keywords["label_smoothing"], 0.0, 1.0),
        )


@dataclass(frozen=True)
class BCOSpec:
    """Validated hyperparameters of the BCO objective."""

    beta: float
    reduction: str

    @classmethod
    def bco(cls, keywords: Mapping[str, Any]) -> "BCOSpec":
        """From BCO's keywords."""
        validate.tensor_or_none("sample_weight", keywords["sample_weight"], "(S,)")
        return cls(
            beta=validate.positive("beta", keywords["beta"]),
            reduction=validate.choice("reduction", keywords["reduction"], BCO_REDUCTIONS),
        )


class PairTerms(NamedTuple):
    """A pairwise objective over S = 2B sequences, float64."""

    loss: Tensor  # 0-d
    slope: Tensor  # (S,) ∂loss/∂sums
    nll_loss: Tensor  # 0-d
    logps: Tensor  # (S,) averaged for ipo and simpo
    rewards: Tensor  # (S,)


class BCOTerms(NamedTuple):
    """The BCO objective over S sequences, float64."""

    loss: Tensor  # 0-d
    slope: Tensor  # (S,) ∂loss/∂sums


def _sigmoid(x: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """−(1−ε) logσ(x) − ε logσ(−x) and its derivative (the conservative form of label smoothing)."""
    loss = -(1 - smoothing) * F.logsigmoid(x)
    if smoothing:  # else 0 · ∞ where a rejected completion has probability 0
        loss = loss - smoothing * F.logsigmoid(-x)
    return loss, smoothing * torch.sigmoid(x) - (1 - smoothing) * torch.sigmoid(-x)


def sigmoid(delta: Tensor, spec: PairSpec) -> tuple[Tensor, Tensor]:
    """−(1−ε) logσ(βΔ) − ε logσ(−βΔ) (CPO, DPO)."""
    loss, slope = _sigmoid(spec.beta * delta, spec.label_smoothing)
    return loss, spec.beta * slope


def simpo(delta: Tensor, spec: PairSpec) -> tuple[Tensor, Tensor]:
    """Sigmoid of βΔ − γ (SimPO, arXiv 2405.14734)."""
    loss, slope = _sigmoid(spec.beta * delta - spec.simpo_gamma, spec.label_smoothing)
    return loss, spec.beta * slope


def hinge(delta: Tensor, spec: PairSpec) -> tuple[Tensor, Tensor]:
    """relu(1 − βΔ) (SLiC, arXiv 2305.10425)."""
    loss = torch.relu(1 - spec.beta * delta)
    return loss, -spec.beta * (~(loss <= 0)).to(loss.dtype)


def ipo(delta: Tensor, spec: PairSpec) -> tuple[Tensor, Tensor]:
    """(Δ − 1/(2β))² (IPO, arXiv 2310.12036)."""
    gap = delta - 1 / (2 * spec.beta)
    return gap.square(), 2 * gap


# loss_type → (Δ (B,), spec) → (loss (B,), ∂loss/∂Δ (B,))
PAIR_LOSSES: dict[str, Callable[[Tensor, PairSpec], tuple[Tensor, Tensor]]] = {
    "sigmoid": sigmoid,
    "simpo": simpo,
    "hinge": hinge,
    "ipo": ipo,
}


def alpha_reward(logps: Tensor, alpha: float) -> tuple[Tensor, Tensor | float]:
    """AlphaPO's r = −expm1(min(−α·logps, 80))/α (arXiv 2501.03884) and dr/dlogps, 0 beyond the clamp; α = 0: logps."""
    if alpha == 0:
        return logps, 1.0
    power = -alpha * logps
    clamped = power.clamp(max=ALPHA_CLAMP)
    return -torch.expm1(clamped) / alpha, torch.exp(clamped) * (power <= ALPHA_CLAMP)


def ratio(total: Tensor, count: float | Tensor) -> Tensor:
    """``total / count``; 0 where the count is 0, but NaN if the total is not finite."""
    if isinstance(count, Tensor):
        return total / torch.where(count > 0, count.double(), torch.inf)
    return total / (count if count > 0 else torch.inf)


def pair_objective(
    sums: Tensor,
    counts: Tensor,
    spec: PairSpec,
    *,
    ref_logps: Tensor | None = None,
    pair_normalizer: float | Tensor | None = None,
    token_normalizer: float | Tensor | None = None,
) -> PairTerms:
    """CPO or DPO from per-sequence sums, chosen sequences first.

    Args:
        sums: (S,) float64, log-probs summed over the completion.
        counts: (S,) int64, scored tokens.
        spec: the hyperparameters.
        ref_logps: (S,) float64 sums of the reference model, for DPO.
        pair_normalizer: replaces the number of pairs.
        token_normalizer: replaces the number of scored chosen tokens.
    """
    pairs = sums.shape[0] // 2
    pair_count = pairs if pair_normalizer is None else pair_normalizer
    lengths = counts.clamp(min=1) if spec.average else 1
    logps = sums / lengths
    if ref_logps is None:
        entering, transformed = alpha_reward(logps, spec.alpha)
        rewards = spec.beta * entering
    else:
        entering, transformed = (sums - ref_logps) / lengths, 1.0
        rewards = spec.beta * (sums - ref_logps)
    losses, slopes = PAIR_LOSSES[spec.loss_type](entering[:pairs] - entering[pairs:], spec)
    loss = ratio(losses.sum(), pair_count)
    slope = ratio(torch.cat((slopes, -slopes)) * transformed / lengths, pair_count)
    nll = torch.zeros_like(loss)
    if spec.cpo_alpha:
        tokens = counts[:pairs].sum() if token_normalizer is None else token_normalizer
        nll_count = tokens if spec.nll_reduction == "token" else pair_count
        nll = -ratio(sums[:pairs].sum(), nll_count)
        loss = loss + spec.cpo_alpha * nll
        chosen = torch.cat((torch.ones_like(slopes), torch.zeros_like(slopes)))
        slope = slope - ratio(spec.cpo_alpha * chosen, nll_count)
    return PairTerms(loss, slope, nll, logps, rewards)


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
    losses, slopes = _sigmoid(sign * (rewards - delta), 0.0)
    slope = spec.beta * sign * slopes
    if sample_weight is not None:
        losses, slope = losses * sample_weight, slope * sample_weight
    if spec.reduction == "mean":
        count = max(rewards.shape[0], 1) if sequence_normalizer is None else sequence_normalizer
        return BCOTerms(ratio(losses.sum(), count), ratio(slope, count))
    positives, negatives = class_normalizer or (desirable.sum(), (~desirable).sum())
    loss = ratio(losses.where(desirable, 0).sum(), positives) + ratio(losses.where(~desirable, 0).sum(), negatives)
    return BCOTerms(loss, torch.where(desirable, ratio(slope, positives), ratio(slope, negatives)))


def saturate(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep what is finite in float64 finite in ``dtype``; NaN and infinity stay."""
    if dtype == value.dtype:
        return value
    return torch.where(value.isinf(), value, value.clamp(-LARGEST, LARGEST))


def narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a float64 result without turning a large finite value into infinity."""
    return saturate(value, dtype).to(dtype)
