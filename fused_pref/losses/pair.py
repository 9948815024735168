"""Objectives of pairs, CPO and DPO: per-sequence log-probs in, loss and its slope out.

Everything works on float64 tensors and is a function of two things per sequence: ``sums``, the summed log-prob of its
completion, and ``counts``, the number of scored tokens. The slope is ∂loss/∂sums, in closed form: the gradient of every
logit is then ``slope[s] · (onehot − softmax)``, which is what lets a head form gradients in the forward. For a new pair
loss there is a recipe in CONTRIBUTING.md.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_pref import validate
from fused_pref.keywords import CPOKeywords, DPOKeywords, choices
from fused_pref.losses.reward_shift import RewardShift
from fused_pref.losses.scores import Scores, gather, logistic_loss, logits_means, narrow, ratio, saturate
from fused_pref.opaque import argument, opaque
from fused_pref.ops.interface import ALPHA_CLAMP, PairSpec, PairTerm, ShiftMemory
from fused_pref.outputs import PairOutput

CPO_LOSS_TYPES = choices(CPOKeywords, "loss_type")
DPO_LOSS_TYPES = choices(DPOKeywords, "loss_type")
# Of a pair loss: the loss (B,), and its slopes in what enters of the chosen w and of the rejected l.
Losses = tuple[Tensor, Tensor, Tensor]


def sigmoid(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """−(1−ε) logσ(βΔ) − ε logσ(−βΔ), Δ = w − l (CPO, DPO arXiv 2305.18290; sorted, AOT arXiv 2406.05882)."""
    loss, slope = logistic_loss(spec.beta * (w - l), smoothing)
    return loss, spec.beta * slope, -spec.beta * slope


def simpo(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """Sigmoid of βΔ − γ (SimPO, arXiv 2405.14734)."""
    loss, slope = logistic_loss(spec.beta * (w - l) - spec.simpo_gamma, smoothing)
    return loss, spec.beta * slope, -spec.beta * slope


def hinge(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """relu(1 − βΔ) (SLiC, arXiv 2305.10425)."""
    loss = torch.relu(1 - spec.beta * (w - l))
    slope = spec.beta * (~(loss <= 0)).to(loss.dtype)
    return loss, -slope, slope


def ipo(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """(Δ − 1/(2β))² (IPO, arXiv 2310.12036)."""
    gap = w - l - 1 / (2 * spec.beta)
    return gap.square(), 2 * gap, -2 * gap


def robust(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """[−(1−ε) logσ(βΔ) + ε logσ(−βΔ)] / (1−2ε) (robust DPO, arXiv 2403.00409)."""
    return sigmoid(w, l, spec, -smoothing / (1 - 2 * smoothing))


def exo_pair(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """EXO (arXiv 2402.00856), q log(q/(1−ε)) + (1−q) log((1−q)/ε) with q = σ(βΔ)."""
    x = spec.beta * (w - l)
    q, rest = torch.sigmoid(x), torch.sigmoid(-x)
    log_q, log_rest = F.logsigmoid(x) - math.log1p(-smoothing), F.logsigmoid(-x) - math.log(smoothing)
    slope = spec.beta * vanishing(q * rest, log_q - log_rest)
    return vanishing(q, log_q) + vanishing(rest, log_rest), slope, -slope


def nca_pair(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """−logσ(r_w) − ½ logσ(−r_w) − ½ logσ(−r_l), r = β times what enters (NCA, arXiv 2402.05369)."""
    chosen, rejected = spec.beta * w, spec.beta * l
    loss = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    rise = 0.5 * torch.sigmoid(chosen) - torch.sigmoid(-chosen)
    return loss, spec.beta * rise, 0.5 * spec.beta * torch.sigmoid(rejected)


def bco_pair(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """−logσ(r_w − δ) − logσ(−(r_l − δ)), the shift δ being taken off before (BCO, arXiv 2404.04656)."""
    chosen, rejected = spec.beta * w, spec.beta * l
    loss = -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
    return loss, -spec.beta * torch.sigmoid(-chosen), spec.beta * torch.sigmoid(rejected)


def sppo_hard(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """(w − 1/(2β))² + (l + 1/(2β))² (SPPO, arXiv 2405.00675)."""
    chosen, rejected = w - 0.5 / spec.beta, l + 0.5 / spec.beta
    return chosen.square() + rejected.square(), 2 * chosen, 2 * rejected


def apo_zero(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """1 − σ(r_w) + σ(r_l) (APO, arXiv 2408.06266)."""
    chosen, fallen = torch.sigmoid(spec.beta * w), torch.sigmoid(-spec.beta * w)
    rejected, others = torch.sigmoid(spec.beta * l), torch.sigmoid(-spec.beta * l)
    return fallen + rejected, -spec.beta * chosen * fallen, spec.beta * rejected * others


def apo_down(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """σ(r_w) + 1 − σ(r_w − r_l) (APO, arXiv 2408.06266)."""
    chosen, fallen = torch.sigmoid(spec.beta * w), torch.sigmoid(-spec.beta * w)
    ahead, behind = torch.sigmoid(spec.beta * (w - l)), torch.sigmoid(-spec.beta * (w - l))
    slope = spec.beta * ahead * behind
    return chosen + behind, spec.beta * chosen * fallen - slope, slope


def discopop(w: Tensor, l: Tensor, spec: PairSpec, smoothing: float) -> Losses:
    """−logσ(x)(1−m) + exp(logσ(x/τ) − x), x = βΔ, m = σ(x/τ) (DiscoPOP, arXiv 2406.08414)."""
    x, rate = spec.beta * (w - l), 1 / spec.tau - 1
    m, rest, logs = torch.sigmoid(x / spec.tau), torch.sigmoid(-x / spec.tau), F.logsigmoid(x)
    # logσ(x/τ) − x without ∞ − ∞
    falling = x * rate if rate else torch.where(x < 0, 0.0, x)
    grown = torch.exp(torch.where(x < 0, falling, -x) - torch.log1p(torch.exp(-(x / spec.tau).abs())))
    slope = rest / spec.tau * vanishing(m, logs) - rest * torch.sigmoid(-x) + grown * (rest / spec.tau - 1)
    return grown - logs * rest, spec.beta * slope, -spec.beta * slope


def vanishing(factor: Tensor, other: Tensor) -> Tensor:
    """The product, 0 where the factor is 0 and the other one infinite."""
    return torch.where(factor == 0, 0.0, factor * other)


def sorted_differences(sums: Tensor, ref_logps: Tensor) -> Tensor:
    """Partners of AOT's paired form: the sorted w − l against the sorted ref_w − ref_l of the batch, (S,)."""
    (w, l), (ref_w, ref_l) = sums.tensor_split(2), ref_logps.tensor_split(2)
    order = torch.sort(w - l, stable=True).indices
    ref_delta = torch.empty_like(w).scatter(0, order, torch.sort(ref_w - ref_l).values)
    return torch.cat((l + ref_delta - ref_w, w - ref_delta - ref_l))


def sorted_ratios(sums: Tensor, ref_logps: Tensor) -> Tensor:
    """Partners of AOT's unpaired form: the sorted log-ratios of the chosen against those of the rejected, (S,)."""
    (w, w_order), (l, l_order) = (torch.sort(side, stable=True) for side in (sums - ref_logps).tensor_split(2))
    return torch.cat((torch.empty_like(l).scatter(0, w_order, l), torch.empty_like(w).scatter(0, l_order, w)))


class PairLoss(NamedTuple):
    """A pair loss, and what enters it.

    Attributes:
        function: (w (B,), l (B,), spec, ε) → losses and slopes.
        average: log-ratios are divided by the length.
        divergence: log-ratios are transformed first, as ``f_divergence_type`` says.
        shift: log-ratios are less δ/β.
        partners: (sums, ref_logps) → the log-ratio that each sequence is compared with; None: the other of its pair.
        smoothing: upper bound of ε, exclusive; 0: ε has no effect.
        least: lower bound of ε, exclusive.
    """

    function: Callable[[Tensor, Tensor, PairSpec, float], Losses]
    average: bool = False
    divergence: bool = False
    shift: bool = False
    partners: Callable[[Tensor, Tensor], Tensor] | None = None
    smoothing: float = 0.0
    least: float = -1.0


PAIR_LOSSES = {
    "sigmoid": PairLoss(sigmoid, divergence=True, smoothing=1.0),
    "simpo": PairLoss(simpo, divergence=True, smoothing=1.0),
    "hinge": PairLoss(hinge, divergence=True),
    "ipo": PairLoss(ipo, average=True, divergence=True),
    "robust": PairLoss(robust, divergence=True, smoothing=0.5),
    "sigmoid_norm": PairLoss(sigmoid, average=True, divergence=True),
    "exo_pair": PairLoss(exo_pair, divergence=True, smoothing=1.0, least=0.0),
    "nca_pair": PairLoss(nca_pair),
    "bco_pair": PairLoss(bco_pair, shift=True),
    "sppo_hard": PairLoss(sppo_hard),
    "apo_zero": PairLoss(apo_zero),
    "apo_down": PairLoss(apo_down),
    "discopop": PairLoss(discopop, divergence=True),
    "aot": PairLoss(sigmoid, partners=sorted_differences, smoothing=1.0),
    "aot_unpaired": PairLoss(sigmoid, partners=sorted_ratios, smoothing=1.0),
}


def transformed(x: Tensor, spec: PairSpec) -> tuple[Tensor, Tensor]:
    """AlphaPO's r = −expm1(min(−αx, 80))/α (arXiv 2501.03884) or an f′ (arXiv 2309.16240), and its derivative in x.

    Beyond the clamp the derivative is 0. The derivative f′ of the forward KL is r with α = 1, that of an α-divergence
    is r with 1 − α in place of α, that of the Jensen-Shannon divergence log 2 + logσ(x).
    """
    if spec.jensen_shannon:
        return math.log(2) + F.logsigmoid(x), torch.sigmoid(-x)
    power = -spec.alpha * x
    clamped = power.clamp(max=ALPHA_CLAMP)
    return -torch.expm1(clamped) / spec.alpha, torch.exp(clamped) * (power <= ALPHA_CLAMP)


@argument
@dataclass(frozen=True)
class PairObjective:
    """CPO or DPO with its tensors: a value that is evaluated on a batch, or once on each group of its pairs.

    Attributes:
        spec: the hyperparameters.
        ref_logps: (S,) sums of the reference model, chosen sequences first, for DPO; else None.
        pair_normalizer: replaces the number of pairs.
        token_normalizer: replaces the number of scored chosen tokens.
        delta: the reward shift of ``bco_pair``; None without it.
    """

    spec: PairSpec
    ref_logps: Tensor | None
    pair_normalizer: float | Tensor | None
    token_normalizer: float | Tensor | None
    delta: RewardShift | Tensor | float | None = None

    @property
    def unit(self) -> int:
        """How many sequences decide their own slopes: 2, a pair; 0 where the whole batch does."""
        shift = self.delta
        moves = isinstance(shift, RewardShift) and shift.update == "forward" and shift.updating(recomputed=True)
        return 0 if moves or True in [term.matched for term in self.spec.terms] else 2

    def settled(self) -> "PairObjective":
        """The same with the δ of now."""
        return replace(self, delta=self.delta.current()) if isinstance(self.delta, RewardShift) else self

    def for_parts(self, counts: Tensor) -> "PairObjective":
        """The same with the δ of now, whose parts are normalised by the whole batch; counts (S,) of scored tokens."""
        pairs, tokens = counts.shape[0] // 2, self.token_normalizer
        if tokens is None and self.spec.nll_weight and self.spec.nll_reduction == "token":
            tokens = counts[:pairs].sum()
        number = pairs if self.pair_normalizer is None else self.pair_normalizer
        return replace(self.settled(), pair_normalizer=number, token_normalizer=tokens)

    def part(self, members: tuple[slice, ...]) -> "PairObjective":
        """Of these runs of sequences, from :meth:`for_parts`."""
        return replace(self, ref_logps=None if self.ref_logps is None else gather(self.ref_logps, members))

    def evaluate(self, scores: Scores, backend: str, dtype: torch.dtype) -> tuple[PairOutput, Tensor]:
        """What is reported, in ``dtype``, and the slope ∂loss/∂sums, (S,) float64, from the same code."""
        if isinstance(self.delta, RewardShift):
            delta, state = self._peek(self.delta, scores.sums)
            result = replace(self, delta=delta).evaluate(scores, backend, dtype)
            self.delta.commit(state)
            return result
        if backend == "triton":
            return self._evaluate_triton(scores)
        spec, sums, counts = self.spec, scores.sums, scores.counts
        pairs = sums.shape[0] // 2
        pair_count = pairs if self.pair_normalizer is None else self.pair_normalizer
        losses, slope, logps, rewards = self.of_pairs(sums, counts)
        loss, slope = ratio(losses.sum(), pair_count), ratio(slope, pair_count)
        nll = torch.zeros_like(loss)
        if spec.nll_weight:
            tokens = counts[:pairs].sum() if self.token_normalizer is None else self.token_normalizer
            nll_count = tokens if spec.nll_reduction == "token" else pair_count
            nll = -ratio(sums[:pairs].sum(), nll_count)
            loss = loss + spec.nll_weight * nll
            chosen = torch.cat((torch.ones_like(sums[:pairs]), torch.zeros_like(sums[pairs:])))
            slope = slope - ratio(spec.nll_weight * chosen, nll_count)
        sides: list[Any] = [*narrow(logps, dtype).chunk(2), *narrow(rewards, dtype).chunk(2)]
        sides += logits_means(scores, None, dtype)
        return PairOutput(narrow(loss, dtype), narrow(nll, dtype), *sides), saturate(slope, dtype)

    def of_pairs(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The weighted terms of each pair (B,), without NLL; of each sequence (S,) their slope, logps and rewards.

        δ is a number or a tensor by now; ``sums`` and ``counts`` as in :class:`fused_pref.losses.scores.Scores`.
        """
        spec, pairs, lengths = self.spec, sums.shape[0] // 2, counts.clamp(min=1)
        logps = sums / lengths if spec.averaged else sums
        ratios = logps if self.ref_logps is None else sums - self.ref_logps.double()
        entering = transformed(ratios, spec) if spec.alpha or spec.jensen_shannon else (ratios, 1.0)
        rewards = spec.beta * (entering[0] if self.ref_logps is None else ratios)
        delta: Any = self.delta
        total, slope = sums.new_zeros(pairs), torch.zeros_like(sums)
        for term in spec.terms:
            x, rise = entering if term.divergence else (ratios, 1.0)
            if term.average:
                x, rise = x / lengths, rise / lengths
            if term.shift and delta is not None:
                x = x - (delta.double() if isinstance(delta, Tensor) else delta) / spec.beta
            function, smoothing = PAIR_LOSSES[term.name].function, term.smoothing
            if term.matched:
                other = self._partners(term, sums)
                losses, w_slope, _ = function(x[:pairs], other[:pairs], spec, smoothing)
                _, _, l_slope = function(other[pairs:], x[pairs:], spec, smoothing)
            else:
                losses, w_slope, l_slope = function(x[:pairs], x[pairs:], spec, smoothing)
            total = total + term.weight * losses
            slope = slope + term.weight * torch.cat((w_slope, l_slope)) * rise
        if self.ref_logps is None and spec.averaged:
            slope = slope / lengths
        return total, slope, logps, rewards

    def _peek(self, shift: RewardShift, sums: Tensor) -> tuple[Tensor, ShiftMemory | None]:
        """δ for this batch, to which chosen completions are desirable and rejected ones are not, and the next state."""
        desirable = torch.arange(sums.shape[0], device=sums.device) < sums.shape[0] // 2
        return shift.peek(self.spec.beta * (sums - self._reference), desirable)

    def _partners(self, term: PairTerm, sums: Tensor) -> Tensor:
        """What each sequence is compared with in a term that is ``matched``, (S,)."""
        partners: Any = PAIR_LOSSES[term.name].partners
        return partners(sums, self._reference)

    @property
    def _reference(self) -> Tensor:
        """``ref_logps`` in float64; every loss that uses it has one."""
        ref_logps: Any = self.ref_logps
        return ref_logps.double()

    def _evaluate_triton(self, scores: Scores) -> tuple[PairOutput, Tensor]:
        partners = [self._partners(term, scores.sums) for term in self.spec.terms if term.matched]
        found = pair_objective(scores, torch.stack(partners) if partners else None, self)
        loss, scalars, logps, rewards, slope = found
        nll, *means = scalars.unbind()
        sides: list[Any] = [*logps.chunk(2), *rewards.chunk(2), *(means if scores.totals is not None else (None, None))]
        return PairOutput(loss, nll, *sides), slope

    def joined(self, parts: list[PairOutput], scores: Scores, dtype: torch.dtype) -> PairOutput:
        """The results of all groups as those of the batch, whose scores give the means of the logits."""
        losses, nlls, *sides = zip(*(part[:6] for part in parts), strict=True)
        sums = [narrow(torch.stack(values).double().sum(), dtype) for values in (losses, nlls)]
        fields: list[Any] = [*sums, *map(torch.cat, sides), *logits_means(scores, None, dtype)]
        return PairOutput(*fields)

    def gather_statistics(self, sums: Tensor) -> None:
        """Let a RewardShift that moves with its step know the batch, from the sums (S,) of its completions."""
        if isinstance(self.delta, RewardShift) and self.delta.updating():
            self.delta.commit(self._peek(self.delta, sums)[1])


def pair_normalizers(keywords: Mapping[str, Any]) -> tuple[float | Tensor | None, float | Tensor | None]:
    """``pair_normalizer`` and ``token_normalizer``."""
    pairs, tokens = keywords["pair_normalizer"], keywords["token_normalizer"]
    return (
        None if pairs is None else validate.normalizer("pair_normalizer", pairs),
        None if tokens is None else validate.normalizer("token_normalizer", tokens, zero=True),
    )


def _fake_objective(scores: Scores, *others: Any) -> tuple[Tensor, ...]:
    sums = scores.sums
    loss, scalars, logps = (sums.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), sums.shape))
    return loss, scalars, logps, torch.empty_like(logps), torch.empty_like(sums)


@opaque(fake=_fake_objective)
def pair_objective(
    scores: Scores, partners: Tensor | None, objective: PairObjective
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`fused_pref.ops.triton.pairs.pair_objective`; δ is a number, a tensor or None by now."""
    from fused_pref.ops.triton import pairs

    delta: Any = objective.delta
    numbers = (objective.pair_normalizer, objective.token_normalizer, delta)
    return pairs.pair_objective(scores, objective.ref_logps, partners, *numbers, objective.spec)
