"""What a step of the DPO trainer computes at the head: TRL's losses by their names, or an objective of one's own."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_pref.functional import linear_dpo_loss
from fused_pref.keywords import DPOKeywords, defaults
from fused_pref.losses.open import Sequences
from fused_pref.losses.pair import PairObjective
from fused_pref.losses.pair_spec import dpo_spec, loss_names
from fused_pref.losses.reward_shift import RewardShift
from fused_pref.modules import LinearDPOLoss
from fused_pref.ops.interface import PairSpec
from fused_pref.outputs import PairOutput, PreferenceOutput
from fused_pref.preference import LinearPreferenceLoss, linear_preference_loss

# Those that label smoothing acts on in TRL.
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
# The tensor of an objective of sequences that is no column.
DESIRABLE = "desirable"
# What is logged.
METRICS: dict[str, Any] = {"logits_mean": "completion", "token_metrics": True}


class StepOutput(NamedTuple):
    """What a step gives, whichever the loss is, of S = 2B sequences, chosen ones first.

    Attributes:
        loss: 0-d, differentiable.
        logps: (S,), summed over the completion.
        lengths: (S,) int64, scored tokens.
        logits: (2,), of chosen and rejected sequences, the sum over scored tokens of the mean logit.
        entropy, accuracy: (S,), means over the scored tokens.
        nll: 0-d, of the chosen tokens; None without ``sft``.
        delta: 0-d, the reward shift; None without ``bco_pair``.
    """

    loss: Tensor
    logps: Tensor
    lengths: Tensor
    logits: Tensor
    entropy: Tensor
    accuracy: Tensor
    nll: Tensor | None = None
    delta: Tensor | None = None


def named_keywords(config: Any) -> dict[str, Any]:
    """The keywords of :func:`fused_pref.linear_dpo_loss` that give the numbers of a ``DPOConfig`` of TRL's.

    Raises:
        ValueError: a loss that is none.
    """
    names = loss_names(config.loss_type)
    keywords = {
        "beta": config.beta,
        "loss_type": names,
        "loss_weights": tuple(config.loss_weights) if config.loss_weights else None,
        "label_smoothing": tuple([config.label_smoothing if name in SMOOTHED else 0.0 for name in names]),
        "f_divergence_type": config.f_divergence_type,
    }
    if config.f_divergence_type == "alpha_divergence":
        keywords["f_alpha_divergence_coef"] = config.f_alpha_divergence_coef
    if "discopop" in names:
        keywords["discopop_tau"] = config.discopop_tau
    return keywords


def refusal(keywords: Mapping[str, Any]) -> str | None:
    """Why :func:`fused_pref.linear_dpo_loss` does not take these keywords, or None."""
    try:
        LinearDPOLoss(**keywords)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def weighted_logps(hidden: Tensor, weight: Tensor, labels: Tensor, *, token_weight: Tensor, **head: Any) -> Tensor:
    """(S,) log-probs of the completions, each token's times its weight, which is shaped like the labels."""
    cu_seqlens = head.get("cu_seqlens")
    none = torch.zeros(len(labels) if cu_seqlens is None else len(cu_seqlens) - 1, device=labels.device)
    output = linear_dpo_loss(hidden, weight, labels, none, token_weight=token_weight, logits_mean=None, **head)
    return torch.cat((output.chosen_logps, output.rejected_logps))


def of_chosen(labels: Tensor, pairs: int, cu_seqlens: Tensor | None) -> Tensor:
    """Labels of pairs, in which nothing of the rejected completions is scored."""
    if cu_seqlens is None:
        return torch.cat((labels[:pairs], torch.full_like(labels[pairs:], -100)))
    return labels.masked_fill(torch.arange(len(labels), device=labels.device) >= cu_seqlens[pairs], -100)


@dataclass(frozen=True)
class NamedLoss:
    """TRL's losses of a batch of pairs.

    Attributes:
        keywords: of :func:`fused_pref.linear_dpo_loss`.
        weighting: whether the losses of a pair are multiplied by the policy's probabilities (WPO, arXiv 2406.11827).
    """

    keywords: Mapping[str, Any]
    weighting: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the losses."""
        return self.keywords["loss_type"]

    @functools.cached_property
    def spec(self) -> PairSpec:
        """The losses, validated."""
        return dpo_spec({**defaults(DPOKeywords), **self.keywords})

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor,
        *,
        token_weight: Tensor | None = None,
        token_normalizer: Tensor | None = None,
        **given: Any,
    ) -> StepOutput:
        """Loss and metrics; of keywords ``pair_normalizer``, ``delta`` and those of the head are handed on.

        Three products, and one for the factors of ``weighting``. Token weights are not for ``sft``, and pairs have one
        factor for it, their mean: beside those, it takes the products of the chosen completions once more.
        """
        tensors, nll_weight = (hidden, weight, labels), self.spec.nll_weight
        if not nll_weight or (token_weight is None and not self.weighting):
            return self._of_pairs(tensors, ref_logps, token_weight, token_normalizer, **given)[0]
        names, weights = self.names, self.keywords["loss_weights"] or [1.0] * len(self.names)
        weights = tuple([0.0 if name == "sft" else each for name, each in zip(names, weights, strict=True)])
        others = NamedLoss({**self.keywords, "loss_weights": weights}, self.weighting)
        output, factor = others._of_pairs(tensors, ref_logps, token_weight, None, **given)
        pairs = len(ref_logps) // 2
        tokens = output.lengths[:pairs].sum() if token_normalizer is None else token_normalizer
        head = {name: value for name, value in given.items() if name not in ("pair_normalizer", "delta")}
        chosen = of_chosen(labels, pairs, head.get("cu_seqlens"))
        head |= {"unit": 1, "normalizer": tokens.clamp(min=1), "logits_mean": None}
        sft = linear_preference_loss(hidden, weight, chosen, nll, **head)
        return output._replace(loss=output.loss + nll_weight * factor * sft.loss, nll=sft.loss.detach())

    def _of_pairs(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        ref_logps: Tensor,
        token_weight: Tensor | None,
        token_normalizer: Tensor | None,
        *,
        pair_normalizer: Tensor | None = None,
        delta: Any = 0.0,
        **head: Any,
    ) -> tuple[StepOutput, Tensor | float]:
        """All with the token weights, and the mean factor of the pairs."""
        if self.weighting:
            return self._weighted(tensors, ref_logps, token_weight, pair_normalizer, delta, head)
        keywords: dict[str, Any] = {
            **self.keywords,
            **({"delta": delta} if "bco_pair" in self.names else {}),
            "token_weight": token_weight,
            "pair_normalizer": pair_normalizer,
            "token_normalizer": token_normalizer,
        }
        output = linear_dpo_loss(*tensors, ref_logps, **keywords, **METRICS, **head)
        step = of_pair_output(output, averaged=self.spec.averaged)
        return (step if self.spec.nll_weight else step._replace(nll=None)), 1.0

    def _weighted(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        ref_logps: Tensor,
        token_weight: Tensor | None,
        pair_normalizer: Tensor | None,
        delta: Any,
        head: dict[str, Any],
    ) -> tuple[StepOutput, Tensor]:
        spec = self.spec
        with torch.no_grad():
            first: Any = linear_dpo_loss(*tensors, ref_logps, **METRICS, **head)
            step = of_pair_output(first)
            factors = (step.logps / step.lengths.clamp(min=1) - first.sum_sq).exp().chunk(2)
            factor = factors[0] * factors[1]
        shift = delta.current() if isinstance(delta, RewardShift) else delta
        output = linear_preference_loss(
            *tensors,
            functools.partial(of_weighted_pairs, spec=spec, delta=shift),
            factor,
            ref_logps=ref_logps,
            token_weight=token_weight,
            normalizer=pair_normalizer,
            logits_mean=None,
            **head,
        )
        if isinstance(delta, RewardShift):
            chosen = torch.arange(len(output.logps), device=output.logps.device) < len(factor)
            delta(spec.beta * (output.logps - ref_logps), chosen)
        shift = shift if isinstance(shift, Tensor) else None
        return step._replace(loss=output.loss, logps=output.logps, nll=None, delta=shift), factor.mean()


@dataclass(frozen=True)
class OwnLoss:
    """An objective of one's own; see :func:`fused_pref.linear_preference_loss`.

    Attributes:
        objective: the function.
        unit: 2, a pair; 1, a sequence; None, the batch.

    Raises:
        ValueError, TypeError: not a function, or another unit.
    """

    objective: Callable[..., Tensor]
    unit: int | None = 2

    def __post_init__(self) -> None:
        self.module  # noqa: B018 - constructed for what it refuses

    @functools.cached_property
    def module(self) -> LinearPreferenceLoss:
        """The objective as a module."""
        return LinearPreferenceLoss(self.objective, unit=self.unit)  # type: ignore[arg-type]

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Of the dataset: what the objective calls its tensors, but for the one that is made here."""
        return tuple(name for name in self.module.tensor_names if name != DESIRABLE or self.unit == 2)

    def tensors(self, batch: Mapping[str, Any], pairs: int) -> tuple[Tensor, ...]:
        """Its tensors in a batch of pairs; those of single sequences have the entry of a pair for both.

        ``desirable`` (2B,) bool says which sequences are chosen ones, where the objective is not of pairs.

        Raises:
            ValueError: one is missing.
        """
        missing = [name for name in self.columns if name not in batch]
        if missing:
            raise ValueError(f"a batch must have {', '.join(missing)}, which objective takes; got {', '.join(batch)}")
        given = {name: batch[name] for name in self.columns}
        if self.unit == 1:
            given = {name: torch.cat((each, each)) if each.dim() else each for name, each in given.items()}
        given.setdefault(DESIRABLE, torch.arange(2 * pairs) < pairs)
        return tuple(given[name] for name in self.module.tensor_names)

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, *tensors: Tensor, **given: Any
    ) -> StepOutput:
        """Loss and metrics."""
        output: PreferenceOutput = linear_preference_loss(
            hidden,
            weight,
            labels,
            self.objective,
            *tensors,
            unit=self.unit,  # type: ignore[arg-type]
            ref_logps=ref_logps,
            **METRICS,
            **given,
        )
        means: Any = output.logits_mean
        logits = torch.stack([side.sum() for side in (means * output.lengths).chunk(2)])
        metrics: Any = (output.entropy, output.accuracy)
        return StepOutput(output.loss, output.logps, output.lengths, logits, *metrics)


def of_pair_output(output: PairOutput, *, averaged: bool = False) -> StepOutput:
    """A step from the output of pairs; ``averaged``: whether its log-probs are."""
    logps, lengths = torch.cat((output.chosen_logps, output.rejected_logps)), output.lengths
    means: Any = (output.chosen_logits_mean, output.rejected_logits_mean)
    tokens = torch.stack([side.sum() for side in lengths.chunk(2)])
    metrics: Any = (output.entropy, output.accuracy)
    return StepOutput(
        output.loss,
        logps * lengths.clamp(min=1) if averaged else logps,
        lengths,
        torch.stack(means) * tokens,
        *metrics,
        nll=output.nll_loss,
        delta=output.delta,
    )


def of_weighted_pairs(chosen: Sequences, rejected: Sequences, factor: Tensor, *, spec: PairSpec, delta: Any) -> Tensor:
    """Losses (B,) of pairs, without NLL, times their factor (B,)."""
    columns: Any = zip(chosen, rejected, strict=True)
    sums, counts, ref_logps = map(torch.cat, columns)
    losses, slope, *_ = PairObjective(spec, ref_logps, None, None, delta).of_pairs(sums.detach(), counts)
    # 0, with the slope as its gradient.
    chosen_rise, rejected_rise = (slope * (sums - sums.detach())).chunk(2)
    return factor * (losses + chosen_rise + rejected_rise)


def nll(sequences: Sequences) -> Tensor:
    """The negative log-probs (S,) of completions."""
    return -sequences.logps
