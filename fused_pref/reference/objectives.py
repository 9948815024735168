"""Log-probs and objectives of logits, in plain PyTorch."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from fused_pref.keywords import (
    BCOKeywords,
    BCOLogitsKeywords,
    CPOLogitsKeywords,
    DPOKeywords,
    DPOLogitsKeywords,
    KTOLogitsKeywords,
    LogitsKeywords,
    PreferenceLogitsKeywords,
    SequenceLogitsKeywords,
    accepts,
)
from fused_pref.losses.open import Sequences
from fused_pref.outputs import BCOOutput, KTOOutput, PairOutput, PreferenceOutput
from fused_pref.reference.pairs import alphapo, pair_losses, preference
from fused_pref.reference.tokens import Tokens, cast, given, logits_mean, ratio, score, token_metrics


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
    identity or AlphaPO's transform (``alpha``, arXiv 2501.03884). ℓ is ``loss_type``: see
    :func:`fused_pref.reference.pairs.preference`.
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
    transformed = alphapo(logps, keywords["alpha"])
    pairs = len(logps) // 2
    delta = transformed[:pairs] - transformed[pairs:]
    losses = preference(loss_type, delta, beta, keywords["label_smoothing"], keywords["simpo_gamma"])
    pair_count = given(keywords["pair_normalizer"], pairs)
    loss, nll = ratio(losses.sum(), pair_count), losses.new_zeros(())
    if cpo_alpha != 0:
        token_count = given(keywords["token_normalizer"], tokens.counts[:pairs].sum())
        nll_count = token_count if keywords["nll_reduction"] == "token" else pair_count
        nll = ratio(-tokens.sums[:pairs].sum(), nll_count)
        loss = loss + cpo_alpha * nll
    return _pair_output(tokens, loss, nll, logps, beta * transformed, keywords)


@accepts(DPOLogitsKeywords)
def dpo_loss(logits: Tensor, labels: Tensor, ref_logps: Tensor, **keywords: Unpack[DPOLogitsKeywords]) -> PairOutput:
    """Direct preference optimisation (DPO, arXiv 2305.18290): Σ weight · mean over pairs of ℓ, ℓ by ``loss_type``.

    See :func:`fused_pref.reference.pairs.pair_losses`; ``"sft"`` is −Σ logp / number over scored chosen tokens. δ of
    bco_pair is ``delta`` (no gradient flows through it). Rewards are β(logps − ref_logps) of the sums; to a
    ``RewardShift`` those of chosen completions are desirable.

    Args:
        logits: (2B, T, V), chosen sequences first, then rejected; or (N_total, V) with ``cu_seqlens``.
        labels: (2B, T) or (N_total,).
        ref_logps: (2B,) floating, the reference model's log-probs summed over the completions.

    Returns:
        :class:`PairOutput`; only ``loss`` carries a gradient. A ``RewardShift`` is updated last.
    """
    chosen, smoothing = keywords["loss_type"], keywords["label_smoothing"]
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    weights = given(keywords["loss_weights"], [1.0] * len(names))
    epsilons = [smoothing] * len(names) if isinstance(smoothing, int | float) else smoothing
    tokens, ref_logps = score(logits, labels, keywords), ref_logps.detach().double()
    pairs, rewards = len(ref_logps) // 2, keywords["beta"] * (tokens.sums - ref_logps)
    delta, shift, state = _shift(keywords, rewards, torch.arange(2 * pairs, device=rewards.device) < pairs)

    nll = rewards.new_zeros(())
    loss = tokens.sums[:0].sum()  # 0, with a gradient of 0
    for name, weight, epsilon in zip(names, weights, epsilons, strict=True):
        if weight and name == "sft":
            token_count = given(keywords["token_normalizer"], tokens.counts[:pairs].sum())
            nll = ratio(-tokens.sums[:pairs].sum(), token_count)
            loss = loss + weight * nll
        elif weight:
            losses = pair_losses(name, tokens.sums, tokens.lengths, ref_logps, epsilon, delta, keywords)
            loss = loss + weight * ratio(losses.sum(), given(keywords["pair_normalizer"], pairs))
    logps = tokens.sums / tokens.lengths if names == ["ipo"] else tokens.sums
    output = _pair_output(tokens, loss, nll, logps, rewards, keywords)
    if "bco_pair" in names:
        output.delta = cast(delta, tokens.logp.dtype)
    if shift is not None:
        shift.commit(state)
    return output


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
    delta, shift, state = _shift(keywords, rewards, desirable)
    losses = torch.where(desirable, -F.logsigmoid(rewards - delta), -F.logsigmoid(-(rewards - delta)))
    if keywords["sample_weight"] is not None:
        losses = losses * keywords["sample_weight"].detach().double()
    if keywords["reduction"] == "mean":
        loss = ratio(losses.sum(), given(keywords["sequence_normalizer"], len(losses)))
    else:
        positives, negatives = given(keywords["class_normalizer"], (desirable.sum(), (~desirable).sum()))
        loss = ratio(losses[desirable].sum(), positives) + ratio(losses[~desirable].sum(), negatives)

    output = _unpaired_output(BCOOutput, tokens, loss, delta, rewards, desirable, keywords)
    if shift is not None:
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
    return _unpaired_output(KTOOutput, tokens, loss, kl, rewards, desirable, keywords)


@accepts(PreferenceLogitsKeywords)
def preference_loss(
    logits: Tensor,
    labels: Tensor,
    objective: Callable[..., Tensor],
    *tensors: Tensor,
    **keywords: Unpack[PreferenceLogitsKeywords],
) -> PreferenceOutput:
    """The mean over units of a function of per-sequence log-probs; over ``normalizer`` in place of their number.

    Args:
        logits: (S, T, V), or (N_total, V) with ``cu_seqlens``; of pairs the chosen sequences first, then the rejected.
        labels: (S, T) or (N_total,).
        objective: (chosen, rejected, *tensors) → (B,), (sequences, *tensors) → (S,) or 0-d: see ``unit``.
        tensors: handed to it.

    Returns:
        :class:`PreferenceOutput`; only ``loss`` carries a gradient.
    """
    tokens, refs, unit = score(logits, labels, keywords), keywords["ref_logps"], keywords["unit"]
    refs = None if refs is None else refs.detach().double()
    whole = Sequences(tokens.sums, tokens.counts, refs)
    if len(tokens.sums) == 0:
        losses = tokens.sums
    elif unit == 2:
        chosen, rejected = ([None if x is None else x.tensor_split(2)[side] for x in whole] for side in (0, 1))
        losses = objective(Sequences(*chosen), Sequences(*rejected), *tensors)  # type: ignore[arg-type]
    else:
        losses = objective(whole, *tensors)
    dtype, number = tokens.logp.dtype, max(losses.numel(), 1)
    loss = ratio(losses.double().sum(), given(keywords["normalizer"], number))
    means = None
    if keywords["logits_mean"] is not None:
        members = torch.eye(len(tokens.sums), dtype=torch.bool, device=labels.device)
        found = [logits_mean(tokens, member, keywords["logits_mean"]) for member in members]
        means = torch.stack(found) if found else tokens.logp.new_zeros(0)  # type: ignore[arg-type]
    each = (cast(losses.detach().double(), dtype), cast(tokens.sums.detach(), dtype), tokens.counts)
    return _with_metrics(PreferenceOutput(cast(loss, dtype), *each, means), tokens, keywords)


def _shift(keywords: BCOKeywords | DPOKeywords, rewards: Tensor, desirable: Tensor) -> tuple[Tensor, Any, Any]:
    """δ without gradient, float64, and a RewardShift with the state to commit (None without one)."""
    delta: Any = keywords["delta"]
    shift = delta if hasattr(delta, "peek") else None
    delta, state = (delta, None) if shift is None else shift.peek(rewards.detach(), desirable)
    return torch.as_tensor(delta, dtype=torch.float64, device=rewards.device).detach(), shift, state


def _with_metrics(output: Any, tokens: Tokens, keywords: Any) -> Any:
    if keywords["token_metrics"]:
        for name, value in token_metrics(tokens).items():
            setattr(output, name, value)
    return output


def _pair_output(
    tokens: Tokens, loss: Tensor, nll: Tensor, logps: Tensor, rewards: Tensor, keywords: Any
) -> PairOutput:
    dtype, cover = tokens.logp.dtype, keywords["logits_mean"]
    chosen = torch.arange(len(logps), device=logps.device) < len(logps) // 2
    logps_w, logps_l = cast(logps.detach(), dtype).tensor_split(2)
    rewards_w, rewards_l = cast(rewards.detach(), dtype).tensor_split(2)
    means = (logits_mean(tokens, chosen, cover), logits_mean(tokens, ~chosen, cover))
    numbers = (cast(loss, dtype), cast(nll.detach(), dtype))
    output = PairOutput(*numbers, logps_w, logps_l, rewards_w, rewards_l, *means)
    output.lengths = tokens.counts
    return _with_metrics(output, tokens, keywords)


def _unpaired_output(
    kind: Any, tokens: Tokens, loss: Tensor, shift: Tensor, rewards: Tensor, desirable: Tensor, keywords: Any
) -> Any:
    dtype, cover = tokens.logp.dtype, keywords["logits_mean"]
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
    output.desirable, output.lengths = desirable, tokens.counts
    return _with_metrics(output, tokens, keywords)
