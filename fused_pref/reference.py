"""The specification: every function in plain PyTorch, differentiated by autograd.

The signatures are those of the functions specified; ``backend``, ``inplace_backward``, ``memory_budget``,
``max_valid_tokens``, ``skip_mass``, ``tp_group``, ``tp_partial`` and ``cp_group`` say how to compute, and where; they
have no effect here, and arguments are not validated.
Tensors as large as the logits are made several times over.

Symbols: S sequences, B pairs (S = 2B), T padded length, V vocabulary; w chosen, l rejected; ε label smoothing, σ the
logistic function. Token math is float32 (float64 for float64 logits); sums of log-probs and what follows are float64.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from fused_pref.keywords import (
    BCOLinearKeywords,
    BCOLogitsKeywords,
    CPOLinearKeywords,
    CPOLogitsKeywords,
    DPOLinearKeywords,
    DPOLogitsKeywords,
    KTOLinearKeywords,
    KTOLogitsKeywords,
    LinearKeywords,
    LogitsKeywords,
    SequenceLinearKeywords,
    SequenceLogitsKeywords,
    TokenKeywords,
    accepts,
    table,
)
from fused_pref.outputs import BCOOutput, KTOOutput, PairOutput
from fused_pref.reference_tokens import Cover, Tokens, cast, given, logits_mean, ratio, score

LINEAR_ONLY = set(table(LinearKeywords)) - set(table(TokenKeywords))

__all__ = [
    "bco_loss",
    "cpo_loss",
    "dpo_loss",
    "kto_loss",
    "linear_bco_loss",
    "linear_cpo_loss",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "token_logps",
]


@accepts(LogitsKeywords)
def token_logps(logits: Tensor, labels: Tensor, **keywords: Unpack[LogitsKeywords]) -> Tensor:
    """Log-prob of every scored token, log softmax(z)[y], differentiable.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; any floating dtype.
        labels: (S, T) or (N_total,) integers, as causal-LM labels come (see ``shift``).

    Returns:
        (S, T-1) with ``shift`` ((S, 0) for T = 0), (S, T) without, (N_total,) packed; float32, float64 for float64
        logits. 0 where nothing is scored, NaN for a label outside the vocabulary.
    """
    logp = score(logits, labels, keywords).logp.view(labels.shape)
    return logp[:, :-1] if keywords["shift"] and keywords["cu_seqlens"] is None else logp


@accepts(SequenceLogitsKeywords)
def sequence_logps(logits: Tensor, labels: Tensor, **keywords: Unpack[SequenceLogitsKeywords]) -> Tensor:
    """Log-prob of every completion, differentiable: Σ logp over its scored tokens, or their average.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``.
        labels: (S, T) or (N_total,).

    Returns:
        (S,) float32, float64 for float64 logits; 0 for an empty completion.
    """
    tokens = score(logits, labels, keywords)
    return cast(tokens.sums / tokens.lengths if keywords["average"] else tokens.sums, tokens.logp.dtype)


@accepts(CPOLogitsKeywords)
def cpo_loss(logits: Tensor, labels: Tensor, **keywords: Unpack[CPOLogitsKeywords]) -> PairOutput:
    """Contrastive preference optimisation (CPO, arXiv 2401.08417): mean over pairs of ℓ(Δ), plus cpo_alpha · NLL.

    Δ = r(logps_w) − r(logps_l), where logps are summed over the completion, averaged for ipo and simpo, and r is the
    identity or AlphaPO's transform (``alpha``, arXiv 2501.03884). ℓ is ``loss_type``: see :func:`_preference`.
    NLL is −Σ logp / number over scored chosen tokens, or −mean over pairs of summed logps_w. Rewards are β r(logps).

    Args:
        logits: (2B, T, V), chosen sequences first, then rejected; or (N_total, V) with ``cu_seqlens``.
        labels: (2B, T) or (N_total,).

    Returns:
        :class:`PairOutput`; only ``loss`` carries a gradient.
    """
    loss_type, cpo_alpha, beta = keywords["loss_type"], keywords["cpo_alpha"], keywords["beta"]
    if loss_type == "alphapo":
        loss_type, cpo_alpha = "simpo", 0.0
    tokens = score(logits, labels, keywords)
    logps = tokens.sums / tokens.lengths if loss_type in ("ipo", "simpo") else tokens.sums
    transformed = _alphapo(logps, keywords["alpha"])
    pairs = len(logps) // 2
    delta = transformed[:pairs] - transformed[pairs:]
    losses = _preference(loss_type, delta, beta, keywords["label_smoothing"], keywords["simpo_gamma"])
    pair_count = given(keywords["pair_normalizer"], pairs)
    loss, nll = ratio(losses.sum(), pair_count), losses.new_zeros(())
    if cpo_alpha != 0:
        token_count = given(keywords["token_normalizer"], tokens.counts[:pairs].sum())
        nll_count = token_count if keywords["nll_reduction"] == "token" else pair_count
        nll = ratio(-tokens.sums[:pairs].sum(), nll_count)
        loss = loss + cpo_alpha * nll
    return _pair_output(tokens, loss, nll, logps, beta * transformed, keywords["logits_mean"])


@accepts(DPOLogitsKeywords)
def dpo_loss(logits: Tensor, labels: Tensor, ref_logps: Tensor, **keywords: Unpack[DPOLogitsKeywords]) -> PairOutput:
    """Direct preference optimisation (DPO, arXiv 2305.18290): mean over pairs of ℓ(Δ).

    Δ = (logps_w − ref_w) − (logps_l − ref_l), for ipo with both log-ratios divided by the length; ℓ is ``loss_type``:
    see :func:`_preference`. Rewards are β(logps − ref_logps) of the sums.

    Args:
        logits: (2B, T, V), chosen sequences first, then rejected; or (N_total, V) with ``cu_seqlens``.
        labels: (2B, T) or (N_total,).
        ref_logps: (2B,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`PairOutput`; only ``loss`` carries a gradient; ``nll_loss`` is 0.
    """
    loss_type, beta = keywords["loss_type"], keywords["beta"]
    tokens = score(logits, labels, keywords)
    log_ratios = tokens.sums - ref_logps.detach().double()
    lengths = tokens.lengths if loss_type == "ipo" else torch.ones_like(tokens.lengths)
    entering_w, entering_l = (log_ratios / lengths).tensor_split(2)
    losses = _preference(loss_type, entering_w - entering_l, beta, keywords["label_smoothing"])
    loss = ratio(losses.sum(), given(keywords["pair_normalizer"], len(losses)))
    logps, rewards = tokens.sums / lengths, beta * log_ratios
    return _pair_output(tokens, loss, torch.zeros_like(loss), logps, rewards, keywords["logits_mean"])


@accepts(BCOLogitsKeywords)
def bco_loss(
    logits: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor, **keywords: Unpack[BCOLogitsKeywords]
) -> BCOOutput:
    """Binary classifier optimisation (BCO, arXiv 2404.04656): −logσ(r − δ) for desirable, −ρ logσ(−(r − δ)) for others.

    r = β(logps − ref_logps), δ is ``delta`` (no gradient flows through it) and ρ ``sample_weight``, a factor on the
    loss of either class. ``reduction``: the mean over all sequences, or the sum of the two class means.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; sequences in any order.
        labels: (S, T) or (N_total,).
        desirable: bool (S,).
        ref_logps: (S,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`BCOOutput`; only ``loss`` carries a gradient. A ``RewardShift`` is updated last.
    """
    tokens = score(logits, labels, keywords)
    rewards = keywords["beta"] * (tokens.sums - ref_logps.detach().double())
    shift: Any = keywords["delta"]
    learned = hasattr(shift, "peek")
    delta, state = shift.peek(rewards.detach(), desirable) if learned else (shift, None)
    delta = torch.as_tensor(delta, dtype=torch.float64, device=rewards.device).detach()

    losses = torch.where(desirable, -F.logsigmoid(rewards - delta), -F.logsigmoid(-(rewards - delta)))
    if keywords["sample_weight"] is not None:
        losses = losses * keywords["sample_weight"].detach().double()
    if keywords["reduction"] == "mean":
        loss = ratio(losses.sum(), given(keywords["sequence_normalizer"], len(losses)))
    else:
        positives, negatives = given(keywords["class_normalizer"], (desirable.sum(), (~desirable).sum()))
        loss = ratio(losses[desirable].sum(), positives) + ratio(losses[~desirable].sum(), negatives)

    output = _unpaired_output(BCOOutput, tokens, loss, delta, rewards, desirable, keywords["logits_mean"])
    if learned:
        shift.commit(state)
    return output


@accepts(KTOLogitsKeywords)
def kto_loss(
    logits: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor, **keywords: Unpack[KTOLogitsKeywords]
) -> KTOOutput:
    """Kahneman-Tversky optimisation (KTO, arXiv 2402.01306): the mean over sequences of w⁺(1 − σ(r − β·kl)) for
    desirable ones and of w⁻(1 − σ(β·kl − r)) for others.

    r = β(logps − ref_logps), kl is ``kl`` (no gradient flows through it), w⁺ ``desirable_weight`` and w⁻
    ``undesirable_weight``. ``apo_zero_unpaired`` (APO, arXiv 2408.06266): w⁺(1 − σ(r)) and w⁻σ(r).

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; sequences in any order.
        labels: (S, T) or (N_total,).
        desirable: bool (S,).
        ref_logps: (S,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`KTOOutput`; only ``loss`` carries a gradient.
    """
    beta, loss_type = keywords["beta"], keywords["loss_type"]
    tokens = score(logits, labels, keywords)
    rewards = beta * (tokens.sums - ref_logps.detach().double())
    kl = torch.as_tensor(keywords["kl"], dtype=torch.float64, device=rewards.device).detach()
    if loss_type == "kto":
        wins, losses = 1 - torch.sigmoid(rewards - beta * kl), 1 - torch.sigmoid(beta * kl - rewards)
    elif loss_type == "apo_zero_unpaired":
        wins, losses = 1 - torch.sigmoid(rewards), torch.sigmoid(rewards)
    else:
        raise ValueError(f"loss_type: {loss_type!r}")
    losses = torch.where(desirable, keywords["desirable_weight"] * wins, keywords["undesirable_weight"] * losses)
    loss = ratio(losses.sum(), given(keywords["sequence_normalizer"], len(losses)))
    return _unpaired_output(KTOOutput, tokens, loss, kl, rewards, desirable, keywords["logits_mean"])


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


def _logits(hidden: Tensor, weight: Tensor, keywords: LinearKeywords) -> Tensor:
    """The logits in float32, or float64 for float64 inputs."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits, bias = hidden.to(dtype) @ weight.to(dtype).T, keywords["bias"]
    return logits if bias is None else logits + bias.to(dtype)


def _of_logits(keywords: Any) -> Any:
    """The keywords without those that only a linear head has."""
    return {name: value for name, value in keywords.items() if name not in LINEAR_ONLY}


def _preference(loss_type: str, delta: Tensor, beta: float, epsilon: float, gamma: float = 0.0) -> Tensor:
    """ℓ(Δ) per pair, (B,) → (B,)."""
    if loss_type == "sigmoid":  # CPO, DPO; with ε the conservative form
        return _cross_entropy(beta * delta, epsilon)
    if loss_type == "simpo":  # arXiv 2405.14734
        return _cross_entropy(beta * delta - gamma, epsilon)
    if loss_type == "hinge":  # SLiC, arXiv 2305.10425
        return torch.relu(1 - beta * delta)
    if loss_type == "ipo":  # arXiv 2310.12036
        return (delta - 1 / (2 * beta)) ** 2
    raise ValueError(f"loss_type: {loss_type!r}")


def _cross_entropy(x: Tensor, epsilon: float) -> Tensor:
    """−(1−ε) logσ(x) − ε logσ(−x), without the second term (0 · ∞ at x = ∞) for ε = 0."""
    loss = -(1 - epsilon) * F.logsigmoid(x)
    return loss - epsilon * F.logsigmoid(-x) if epsilon else loss


def _alphapo(logps: Tensor, alpha: float) -> Tensor:
    """(1 − p^−α)/α = −expm1(min(−α·logps, 80))/α; its gradient is 0 beyond the clamp. The identity for α = 0."""
    return -torch.expm1((-alpha * logps).clamp(max=80)) / alpha if alpha else logps


def _pair_output(tokens: Tokens, loss: Tensor, nll: Tensor, logps: Tensor, rewards: Tensor, cover: Cover) -> PairOutput:
    dtype = tokens.logp.dtype
    chosen = torch.arange(len(logps), device=logps.device) < len(logps) // 2
    logps_w, logps_l = cast(logps.detach(), dtype).tensor_split(2)
    rewards_w, rewards_l = cast(rewards.detach(), dtype).tensor_split(2)
    means = (logits_mean(tokens, chosen, cover), logits_mean(tokens, ~chosen, cover))
    return PairOutput(cast(loss, dtype), cast(nll.detach(), dtype), logps_w, logps_l, rewards_w, rewards_l, *means)


def _unpaired_output(
    kind: Any, tokens: Tokens, loss: Tensor, shift: Tensor, rewards: Tensor, desirable: Tensor, cover: Cover
) -> Any:
    dtype = tokens.logp.dtype
    output = kind(
        cast(loss, dtype),
        cast(shift, dtype),
        cast(tokens.sums.detach(), dtype),
        cast(rewards.detach(), dtype),
        logits_mean(tokens, desirable, cover),
        logits_mean(tokens, ~desirable, cover),
        desirable.sum(),
        (~desirable).sum(),
    )
    output.desirable = desirable
    return output
