"""The validated constants of a call: the logits transform, which label each position scores, how a head may work."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fused_pref import validate
from fused_pref.keywords import LinearKeywords, LogitsKeywords, TokenKeywords, choices, defaults
from fused_pref.opaque import argument
from fused_pref.ops.interface import Transform

BACKENDS = choices(TokenKeywords, "backend")
LOGITS_MEANS = (*choices(TokenKeywords, "logits_mean"), None)
TOKEN_DEFAULTS = defaults(TokenKeywords)
# Keywords whose values are tensors or process groups: those are looked at in every call.
PER_CALL = {"cu_seqlens", "bias", "cp_group", "tp_group"}


def transform_of(keywords: Mapping[str, Any]) -> Transform:
    """Softcap(logit_scale · x) / temperature with softcap(x) = c·tanh(x/c), from the shared keywords, validated."""
    given = {**TOKEN_DEFAULTS, **keywords}
    expected = "a finite number other than 0"
    scale = validate.finite("logit_scale", given["logit_scale"], expected, lambda scale: 0 < abs(scale) < math.inf)
    c = None if given["softcap"] is None else validate.positive("softcap", given["softcap"])
    temperature = validate.positive("temperature", given["temperature"])
    return Transform("linear", scale / temperature) if c is None else Transform("tanh", scale / c, c / temperature)


@argument
@dataclass(frozen=True)
class Spec:
    """Validated constants of a call; ``backend`` becomes the one that is chosen.

    ``token_metrics``: whether entropy, accuracy and Σ p² of the scored tokens are wanted. ``inplace_backward`` is for
    calls on logits, the fields after it for linear heads; ``memory_budget`` None: the default budget.
    """

    backend: str
    shift: bool
    ignore_index: int
    transform: Transform
    logits_mean: str | None
    token_metrics: bool = False
    inplace_backward: bool = False
    memory_budget: int | None = None
    max_valid_tokens: int | None = None
    skip_mass: float | None = None
    tp_partial: bool = False

    @cached_property
    def logit_sums(self) -> bool:
        """Whether Σ z must be summed over the logits: without an activation it follows from mean(W)."""
        return self.logits_mean is not None and self.transform.nonlinear


def _tokens(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "backend": validate.choice("backend", keywords["backend"], BACKENDS),
        "shift": validate.flag("shift", keywords["shift"]),
        "ignore_index": validate.integer("ignore_index", keywords["ignore_index"]),
        "transform": transform_of(keywords),
        "logits_mean": validate.choice("logits_mean", keywords["logits_mean"], LOGITS_MEANS),
    }


@validate.remembered(*(name for name in defaults(LogitsKeywords) if name not in PER_CALL))
def logits_spec(keywords: Mapping[str, Any]) -> Spec:
    """The constants of a call on logits."""
    inplace = validate.flag("inplace_backward", keywords["inplace_backward"])
    return Spec(**_tokens(keywords), inplace_backward=inplace)


@validate.remembered(*(name for name in defaults(LinearKeywords) if name not in PER_CALL))
def linear_spec(keywords: Mapping[str, Any]) -> Spec:
    """The constants of a call on hidden states and a weight."""
    skip_mass = keywords["skip_mass"]
    return Spec(
        **_tokens(keywords),
        memory_budget=validate.at_least("memory_budget", keywords["memory_budget"], 1, optional=True),
        max_valid_tokens=validate.at_least("max_valid_tokens", keywords["max_valid_tokens"], 0, optional=True),
        skip_mass=None if skip_mass is None else validate.within("skip_mass", skip_mass, 0, 1),
        tp_partial=validate.flag("tp_partial", keywords["tp_partial"]),
    )
