"""From the keywords of CPO and DPO to validated hyperparameters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_pref import validate
from fused_pref.keywords import CPOKeywords, DPOKeywords, choices
from fused_pref.losses.pair import CPO_LOSS_TYPES, DPO_LOSS_TYPES, PAIR_LOSSES, pair_normalizers
from fused_pref.losses.reward_shift import RewardShift, reward_shift
from fused_pref.ops.interface import PairSpec, PairTerm

DIVERGENCES = choices(DPOKeywords, "f_divergence_type")
NLL_REDUCTIONS = choices(CPOKeywords, "nll_reduction")


def term(name: str, weight: float = 1.0, smoothing: float = 0.0, *, average: bool | None = None) -> PairTerm:
    """A term by its name; ``average``: None as the loss says."""
    loss = PAIR_LOSSES[name]
    average = loss.average if average is None else average
    return PairTerm(name, weight, smoothing, average, loss.divergence, loss.shift, loss.partners is not None)


@validate.remembered("loss_type", "beta", "label_smoothing", "cpo_alpha", "simpo_gamma", "alpha", "nll_reduction")
def cpo_spec(keywords: Mapping[str, Any]) -> PairSpec:
    """From CPO's keywords."""
    loss_type = validate.choice("loss_type", keywords["loss_type"], CPO_LOSS_TYPES)
    cpo_alpha = validate.not_negative("cpo_alpha", keywords["cpo_alpha"])
    name = "simpo" if loss_type == "alphapo" else loss_type
    smoothing = _smoothing(name, keywords["label_smoothing"])
    return PairSpec(
        # Averages enter as a whole, before AlphaPO's transform.
        terms=(term(name, 1.0, smoothing, average=False),),
        beta=validate.positive("beta", keywords["beta"]),
        nll_weight=0.0 if loss_type == "alphapo" else cpo_alpha,
        simpo_gamma=validate.finite("simpo_gamma", keywords["simpo_gamma"]),
        alpha=validate.finite("alpha", keywords["alpha"]),
        nll_reduction=validate.choice("nll_reduction", keywords["nll_reduction"], NLL_REDUCTIONS),
        averaged=name in ("ipo", "simpo"),
    )


@validate.remembered(
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "discopop_tau",
    "f_divergence_type",
    "f_alpha_divergence_coef",
)
def dpo_spec(keywords: Mapping[str, Any]) -> PairSpec:
    """From DPO's keywords."""
    names = loss_names(keywords["loss_type"])
    given, smoothing = keywords["loss_weights"], keywords["label_smoothing"]
    weights = [1.0] * len(names) if given is None else _each("loss_weights", given, names)
    weights = [validate.finite("loss_weights", weight) for weight in weights]
    epsilons = _each("label_smoothing", smoothing, names) if _sequence(smoothing) else [smoothing] * len(names)
    epsilons = [_smoothing(name, epsilon) for name, epsilon in zip(names, epsilons, strict=True)]
    parts = [part for part in zip(names, weights, epsilons, strict=True) if part[1]]
    divergence = validate.choice("f_divergence_type", keywords["f_divergence_type"], DIVERGENCES)
    order = validate.finite("f_alpha_divergence_coef", keywords["f_alpha_divergence_coef"])
    orders = {"forward_kl": 0.0, "alpha_divergence": 1.0 if abs(order - 1) < 1e-6 else order}
    return PairSpec(
        terms=tuple([term(*part) for part in parts if part[0] != "sft"]),
        beta=validate.positive("beta", keywords["beta"]),
        nll_weight=math.fsum([weight for name, weight, _ in parts if name == "sft"]),
        alpha=1 - orders.get(divergence, 1.0),
        averaged=names == ("ipo",),
        tau=validate.positive("discopop_tau", keywords["discopop_tau"]),
        jensen_shannon=divergence == "js_divergence",
    )


def loss_names(loss_type: Any) -> tuple[str, ...]:
    """The names of DPO's ``loss_type``."""
    names = tuple(loss_type) if _sequence(loss_type) else (loss_type,)
    if not names:
        raise validate.fail("loss_type", f"a name or a sequence of names, of {DPO_LOSS_TYPES}", loss_type)
    return tuple([validate.choice("loss_type", name, DPO_LOSS_TYPES) for name in names])


def dpo_normalizers(keywords: Mapping[str, Any]) -> tuple[float | Tensor | None, float | Tensor | None]:
    """As of CPO; one of pairs is refused with a loss that compares pairs: parts of a batch do not add up to it."""
    matched = [name for name in loss_names(keywords["loss_type"]) if name in PAIR_LOSSES and PAIR_LOSSES[name].partners]
    if matched and keywords["pair_normalizer"] is not None:
        expected = f"None with {matched[0]}, which sorts the pairs of a batch and cannot be accumulated exactly"
        raise validate.fail("pair_normalizer", expected, keywords["pair_normalizer"])
    return pair_normalizers(keywords)


def dpo_shift(keywords: Mapping[str, Any], device: torch.device | None = None) -> RewardShift | float | Tensor | None:
    """DPO's ``delta`` on this device (None: any); None without ``bco_pair``, where another one than 0 is refused."""
    delta, names = reward_shift(keywords, device), loss_names(keywords["loss_type"])
    if "bco_pair" in names:
        return delta
    if not isinstance(delta, float) or delta != 0:
        raise ValueError(f"delta needs loss_type='bco_pair'; got {validate.describe(delta)} with {', '.join(names)}")
    return None


def _sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _each(name: str, value: Any, names: tuple[str, ...]) -> list[Any]:
    """One entry for each name."""
    expected = f"a sequence of {len(names)} numbers, one for each name of loss_type"
    if not _sequence(value):
        raise validate.fail(name, f"{expected}, or None", value, TypeError)
    if len(value) != len(names):
        raise validate.fail(name, expected, value)
    return list(value)


def _smoothing(loss_type: str, value: Any) -> float:
    """ε of this loss; 0 where it has no effect."""
    number = validate.within("label_smoothing", value, 0.0, 1.0)
    loss = PAIR_LOSSES.get(loss_type)
    if loss is None or not loss.smoothing:
        return 0.0
    if not loss.least < number < loss.smoothing:
        expected = f"a number in {'[' if loss.least < 0 else '('}0, {loss.smoothing:g}) for {loss_type}"
        raise validate.fail("label_smoothing", expected, value)
    return number
