"""The losses of pairs in plain PyTorch, differentiated by autograd: a part of the specification."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_pref.keywords import DPOKeywords


def preference(loss_type: str, delta: Tensor, beta: float, epsilon: float, gamma: float = 0.0) -> Tensor:
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


def pair_losses(
    name: str,
    sums: Tensor,
    lengths: Tensor,
    ref_logps: Tensor,
    epsilon: float,
    delta: Tensor,
    keywords: DPOKeywords,
) -> Tensor:
    """DPO's losses, (B,), of the scores s = f′(logps − ref_logps) or of the rewards r = β(logps − ref_logps).

    Args:
        name: of the loss.
        sums: (S,) float64 log-probs, summed over the completions.
        lengths: (S,) scored tokens, at least 1.
        ref_logps: (S,) float64 sums of the reference model.
        epsilon: label smoothing.
        delta: 0-d reward shift.
        keywords: β, the divergence and τ.
    """
    beta, ratios = keywords["beta"], sums - ref_logps
    scores = _derivative_of_divergence(ratios, keywords)
    if name in ("ipo", "sigmoid_norm"):
        scores = scores / lengths
    s_w, s_l = scores.tensor_split(2)
    r_w, r_l = (beta * ratios).tensor_split(2)
    if name == "nca_pair":  # arXiv 2402.05369
        return -F.logsigmoid(r_w) - 0.5 * F.logsigmoid(-r_w) - 0.5 * F.logsigmoid(-r_l)
    if name == "bco_pair":  # arXiv 2404.04656
        return -F.logsigmoid(r_w - delta) - F.logsigmoid(-(r_l - delta))
    if name == "sppo_hard":  # arXiv 2405.00675
        return (r_w / beta - 1 / (2 * beta)) ** 2 + (r_l / beta + 1 / (2 * beta)) ** 2
    if name == "apo_zero":  # arXiv 2408.06266
        return torch.sigmoid(-r_w) + torch.sigmoid(r_l)
    if name == "apo_down":
        return torch.sigmoid(r_w) + torch.sigmoid(r_l - r_w)
    if name == "aot":  # arXiv 2406.05882
        (logps_w, logps_l), (ref_w, ref_l) = sums.tensor_split(2), ref_logps.tensor_split(2)
        ours, theirs = (torch.sort(margin, stable=True).values for margin in (logps_w - logps_l, ref_w - ref_l))
        return _cross_entropy(beta * (ours - theirs), epsilon)
    if name == "aot_unpaired":
        w, l = (torch.sort(side, stable=True).values for side in ratios.tensor_split(2))
        return _cross_entropy(beta * (w - l), epsilon)
    x = beta * (s_w - s_l)
    if name == "robust":  # arXiv 2403.00409
        flipped = epsilon * F.logsigmoid(-x) if epsilon else 0
        return (flipped - (1 - epsilon) * F.logsigmoid(x)) / (1 - 2 * epsilon)
    if name == "sigmoid_norm":
        return -F.logsigmoid(x)
    if name == "exo_pair":  # arXiv 2402.00856; beyond ±800 one of the two probabilities is exactly 0
        x = x.clamp(-800, 800)
        log_q, log_rest = F.logsigmoid(x), F.logsigmoid(-x)
        return log_q.exp() * (log_q - math.log1p(-epsilon)) + log_rest.exp() * (log_rest - math.log(epsilon))
    if name == "discopop":  # arXiv 2406.08414
        m = x / keywords["discopop_tau"]
        return -F.logsigmoid(x) * torch.sigmoid(-m) + torch.exp(F.logsigmoid(m) - x)
    return preference(name, s_w - s_l, beta, epsilon)


def _derivative_of_divergence(x: Tensor, keywords: DPOKeywords) -> Tensor:
    """f′ at a log-ratio x (arXiv 2309.16240), exponents clamped at 80."""
    kind, order = keywords["f_divergence_type"], keywords["f_alpha_divergence_coef"]
    if kind == "forward_kl":
        return 1 - torch.exp((-x).clamp(max=80))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(x)
    if kind == "alpha_divergence" and abs(order - 1) >= 1e-6:
        return torch.expm1(((order - 1) * x).clamp(max=80)) / (order - 1)
    return x


def _cross_entropy(x: Tensor, epsilon: float) -> Tensor:
    """−(1−ε) logσ(x) − ε logσ(−x), without the second term (0 · ∞ at x = ∞) for ε = 0."""
    loss = -(1 - epsilon) * F.logsigmoid(x)
    return loss - epsilon * F.logsigmoid(-x) if epsilon else loss


def alphapo(logps: Tensor, alpha: float) -> Tensor:
    """(1 − p^−α)/α = −expm1(min(−α·logps, 80))/α; its gradient is 0 beyond the clamp. The identity for α = 0."""
    return -torch.expm1((-alpha * logps).clamp(max=80)) / alpha if alpha else logps
