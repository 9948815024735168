"""Log-probs and objectives of hidden states and a head's weight, in plain PyTorch: the logits are formed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fused_pref.keywords import (
    BCOLinearKeywords,
    CPOLinearKeywords,
    DPOLinearKeywords,
    KTOLinearKeywords,
    LinearKeywords,
    PreferenceLinearKeywords,
    SequenceLinearKeywords,
    TokenKeywords,
    accepts,
    table,
)
from fused_pref.outputs import BCOOutput, KTOOutput, PairOutput, PreferenceOutput
from fused_pref.reference.objectives import (
    bco_loss,
    cpo_loss,
    dpo_loss,
    kto_loss,
    preference_loss,
    sequence_logps,
    token_logps,
)

LINEAR_ONLY = set(table(LinearKeywords)) - set(table(TokenKeywords))


@accepts(LinearKeywords)
def linear_token_logps(hidden: Tensor, weight: Tensor, labels: Tensor, **keywords: Unpack[LinearKeywords]) -> Tensor:
    """:func:`token_logps` of the logits hidden · weightᵀ + bias; hidden (S, T, D) or (N_total, D), weight (V, D)."""
    return token_logps(_logits(hidden, weight, keywords), labels, **_of_logits(keywords))


@accepts(SequenceLinearKeywords)
def linear_sequence_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, **keywords: Unpack[SequenceLinearKeywords]
) -> Tensor:
    """:func:`sequence_logps` of hidden · weightᵀ + bias; hidden (S, T, D) or (N_total, D), weight (V, D)."""
    return sequence_logps(_logits(hidden, weight, keywords), labels, **_of_logits(keywords))


@accepts(CPOLinearKeywords)
def linear_cpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, **keywords: Unpack[CPOLinearKeywords]
) -> PairOutput:
    """:func:`cpo_loss` of hidden · weightᵀ + bias; hidden (S, T, D) or (N_total, D), weight (V, D)."""
    return cpo_loss(_logits(hidden, weight, keywords), labels, **_of_logits(keywords))


@accepts(DPOLinearKeywords)
def linear_dpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_logps: Tensor, **keywords: Unpack[DPOLinearKeywords]
) -> PairOutput:
    """:func:`dpo_loss` of hidden · weightᵀ + bias; hidden (S, T, D) or (N_total, D), weight (V, D)."""
    return dpo_loss(_logits(hidden, weight, keywords), labels, ref_logps, **_of_logits(keywords))


@accepts(BCOLinearKeywords)
def linear_bco_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    ref_logps: Tensor,
    **keywords: Unpack[BCOLinearKeywords],
) -> BCOOutput:
    """:func:`bco_loss` of hidden · weightᵀ + bias; hidden (S, T, D) or (N_total, D), weight (V, D)."""
    return bco_loss(_logits(hidden, weight, keywords), labels, desirable, ref_logps, **_of_logits(keywords))


@accepts(KTOLinearKeywords)
def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    desirable: Tensor,
    ref_logps: Tensor,
    **keywords: Unpack[KTOLinearKeywords],
) -> KTOOutput:
    """:func:`kto_loss` of hidden · weightᵀ + bias; hidden (S, T, D) or (N_total, D), weight (V, D)."""
    return kto_loss(_logits(hidden, weight, keywords), labels, desirable, ref_logps, **_of_logits(keywords))


@accepts(PreferenceLinearKeywords)
def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: Callable[..., Tensor],
    *tensors: Tensor,
    **keywords: Unpack[PreferenceLinearKeywords],
) -> PreferenceOutput:
    """:func:`preference_loss` of hidden · weightᵀ + bias; hidden (S, T, D) or (N_total, D), weight (V, D)."""
    return preference_loss(_logits(hidden, weight, keywords), labels, objective, *tensors, **_of_logits(keywords))


def _logits(hidden: Tensor, weight: Tensor, keywords: LinearKeywords) -> Tensor:
    """The logits in float32, or float64 for float64 inputs."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits, bias = hidden.to(dtype) @ weight.to(dtype).T, keywords["bias"]
    return logits if bias is None else logits + bias.to(dtype)


def _of_logits(keywords: Any) -> Any:
    """The keywords without those that only a linear head has."""
    return {name: value for name, value in keywords.items() if name not in LINEAR_ONLY}
