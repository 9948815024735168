"""Objectives of pairs, CPO and DPO: per-sequence log-probs in, loss and its slope out.

Everything works on float64 tensors and is a function of two things per sequence: ``sums``, the summed log-prob of its
completion, and ``counts``, the number of scored tokens. The slope is ∂loss/∂sums, in closed form: the gradient of every
logit is then ``slope[s] · (onehot − softmax)``, which is what lets a head form gradients in the forward. A new pair
loss is one function in ``PAIR_LOSSES`` and what CONTRIBUTING.md's recipe names beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.keywords import CPOKeywords, DPOKeywords, choices
from fused_pref.losses.scores import Scores, gather, logistic_loss, logits_means, narrow, ratio, saturate, split
from fused_pref.ops.interface import ALPHA_CLAMP, AVERAGED, PairSpec
from fused_pref.outputs import PairOutput

CPO_LOSS_TYPES = choices(CPOKeywords, "loss_type")
DPO_LOSS_TYPES = choices(DPOKeywords, "loss_type")
NLL_REDUCTIONS = choices(CPOKeywords, "nll_reduction")


@validate.remembered("loss_type", "beta", "label_smoothing", "cpo_alpha", "simpo_gamma", "alpha", "nll_reduction")
def cpo_spec(keywords: Mapping[str, Any]) -> PairSpec:
    """From CPO's keywords."""
    loss_type = validate.choice("loss_type", keywords["loss_type"], CPO_LOSS_TYPES)
    cpo_alpha = validate.finite("cpo_alpha", keywords["cpo_alpha"], "a finite number >= 0")
    if cpo_alpha < 0:
        raise validate.fail("cpo_alpha", "a finite number >= 0", cpo_alpha)
    return PairSpec(
        loss_type="simpo" if loss_type == "alphapo" else loss_type,
        beta=validate.positive("beta", keywords["beta"]),
        label_smoothing=validate.within("label_smoothing", keywords["label_smoothing"], 0.0, 1.0),
        cpo_alpha=0.0 if loss_type == "alphapo" else cpo_alpha,
        simpo_gamma=validate.finite("simpo_gamma", keywords["simpo_gamma"]),
        alpha=validate.finite("alpha", keywords["alpha"]),
        nll_reduction=validate.choice("nll_reduction", keywords["nll_reduction"], NLL_REDUCTIONS),
    )


@validate.remembered("loss_type", "beta", "label_smoothing")
def dpo_spec(keywords: Mapping[str, Any]) -> PairSpec:
    """From DPO's keywords."""
    return PairSpec(
        loss_type=validate.choice("loss_type", keywords["loss_type"], DPO_LOSS_TYPES),
        beta=validate.positive("beta", keywords["beta"]),
        label_smoothing=validate.within("label_smoothing", keywords["label_smoothing"], 0.0, 1.0),
    )


def sigmoid(delta: Tensor, spec: PairSpec) -> tuple[Tensor, Tensor]:
    """−(1−ε) logσ(βΔ) − ε logσ(−βΔ) (CPO, DPO)."""
    loss, slope = logistic_loss(spec.beta * delta, spec.label_smoothing)
    return loss, spec.beta * slope


def simpo(delta: Tensor, spec: PairSpec) -> tuple[Tensor, Tensor]:
    """Sigmoid of βΔ − γ (SimPO, arXiv 2405.14734)."""
    loss, slope = logistic_loss(spec.beta * delta - spec.simpo_gamma, spec.label_smoothing)
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


def alpha_reward(logps: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """AlphaPO's r = −expm1(min(−α·logps, 80))/α (arXiv 2501.03884), α ≠ 0, and dr/dlogps, 0 beyond the clamp."""
    power = -alpha * logps
    clamped = power.clamp(max=ALPHA_CLAMP)
    return -torch.expm1(clamped) / alpha, torch.exp(clamped) * (power <= ALPHA_CLAMP)


@dataclass(frozen=True)
class PairObjective:
    """CPO or DPO with its tensors: a value that is evaluated on a batch, or once on each group of its pairs.

    Attributes:
        spec: the hyperparameters.
        ref_logps: (S,) sums of the reference model, chosen sequences first, for DPO; else None.
        pair_normalizer: replaces the number of pairs.
        token_normalizer: replaces the number of scored chosen tokens.
    """

    # Sequences after which their slopes are known: a pair.
    unit: ClassVar[int] = 2

    spec: PairSpec
    ref_logps: Tensor | None
    pair_normalizer: float | Tensor | None
    token_normalizer: float | Tensor | None

    def for_parts(self, counts: Tensor) -> "PairObjective":
        """The same, whose parts are normalised by the whole batch; counts (S,) of its scored tokens."""
        pairs, tokens = counts.shape[0] // 2, self.token_normalizer
        if tokens is None and self.spec.cpo_alpha and self.spec.nll_reduction == "token":
            tokens = counts[:pairs].sum()
        number = pairs if self.pair_normalizer is None else self.pair_normalizer
        return replace(self, pair_normalizer=number, token_normalizer=tokens)

    def part(self, members: tuple[slice, ...]) -> "PairObjective":
        """Of these runs of sequences, from :meth:`for_parts`."""
        return replace(self, ref_logps=None if self.ref_logps is None else gather(self.ref_logps, members))

    def evaluate(self, scores: Scores, backend: str, dtype: torch.dtype) -> tuple[PairOutput, Tensor]:
        """What is reported, in ``dtype``, and the slope ∂loss/∂sums, (S,) float64, from the same code."""
        if backend == "triton":
            return self._evaluate_triton(scores)
        spec, sums, counts = self.spec, scores.sums, scores.counts
        pairs = sums.shape[0] // 2
        pair_count = pairs if self.pair_normalizer is None else self.pair_normalizer
        lengths = counts.clamp(min=1) if spec.loss_type in AVERAGED else 1
        logps = sums / lengths
        if self.ref_logps is None:
            entering, transformed = alpha_reward(logps, spec.alpha) if spec.alpha else (logps, 1.0)
            rewards = spec.beta * entering
        else:
            log_ratios = sums - self.ref_logps.double()
            entering, transformed, rewards = log_ratios / lengths, 1.0, spec.beta * log_ratios
        losses, slopes = PAIR_LOSSES[spec.loss_type](entering[:pairs] - entering[pairs:], spec)
        loss = ratio(losses.sum(), pair_count)
        slope = ratio(torch.cat((slopes, -slopes)) * transformed / lengths, pair_count)
        nll = torch.zeros_like(loss)
        if spec.cpo_alpha:
            tokens = counts[:pairs].sum() if self.token_normalizer is None else self.token_normalizer
            nll_count = tokens if spec.nll_reduction == "token" else pair_count
            nll = -ratio(sums[:pairs].sum(), nll_count)
            loss = loss + spec.cpo_alpha * nll
            chosen = torch.cat((torch.ones_like(slopes), torch.zeros_like(slopes)))
            slope = slope - ratio(spec.cpo_alpha * chosen, nll_count)
        sides: list[Any] = [*narrow(logps, dtype).chunk(2), *narrow(rewards, dtype).chunk(2)]
        sides += logits_means(scores, None, dtype)
        return PairOutput(narrow(loss, dtype), narrow(nll, dtype), *sides), saturate(slope, dtype)

    def _evaluate_triton(self, scores: Scores) -> tuple[PairOutput, Tensor]:
        normalizers = (*split(self.pair_normalizer), *split(self.token_normalizer))
        loss, scalars, logps, rewards, slope = pair_objective_op(
            *scores, self.ref_logps, *normalizers, *astuple(self.spec)
        )
        nll, *means = scalars.unbind()
        sides: list[Any] = [*logps.chunk(2), *rewards.chunk(2), *(means if scores.totals is not None else (None, None))]
        return PairOutput(loss, nll, *sides), slope

    def joined(self, parts: list[PairOutput], scores: Scores, dtype: torch.dtype) -> PairOutput:
        """The results of all groups as those of the batch, whose scores give the means of the logits."""
        if len(parts) == 1 and scores.totals is None:
            return parts[0]
        losses, nlls, *sides = zip(*(part[:6] for part in parts), strict=True)
        sums = [narrow(torch.stack(values).double().sum(), dtype) for values in (losses, nlls)]
        fields: list[Any] = [*sums, *map(torch.cat, sides), *logits_means(scores, None, dtype)]
        return PairOutput(*fields)

    def gather_statistics(self, sums: Tensor) -> None:
        """Nothing: pairs have no state."""


@torch.library.custom_op("fused_pref::pair_objective", mutates_args=())
def pair_objective_op(
    sums: Tensor,
    counts: Tensor,
    totals: Tensor | None,
    positions: Tensor | None,
    ref_logps: Tensor | None,
    pair_number: float | None,
    pair_tensor: Tensor | None,
    token_number: float | None,
    token_tensor: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    cpo_alpha: float,
    simpo_gamma: float,
    alpha: float,
    nll_reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.ops.triton.objective.pair_objective`."""
    from fused_pref.ops.triton import objective

    spec = PairSpec(loss_type, beta, label_smoothing, cpo_alpha, simpo_gamma, alpha, nll_reduction)
    pairs = pair_number if pair_tensor is None else pair_tensor
    tokens = token_number if token_tensor is None else token_tensor
    return objective.pair_objective(sums, counts, totals, positions, ref_logps, pairs, tokens, spec)


@pair_objective_op.register_fake
def _(sums, *arguments):  # type: ignore[no-untyped-def]
    loss, scalars, logps = (sums.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), sums.shape))
    return loss, scalars, logps, torch.empty_like(logps), torch.empty_like(sums)
