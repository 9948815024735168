"""Device twins of the loss functions in :mod:`fused_pref.losses`, in float64, under the same names.

A pair loss takes what enters it of the chosen w and the rejected l, and gives the loss and its slopes in both;
``pair_loss`` picks it by name, and ``unpaired_loss`` that of a single sequence.
"""

import math

import triton
import triton.language as tl

from fused_pref.ops import interface

ALPHA_CLAMP = tl.constexpr(interface.ALPHA_CLAMP)
LARGEST = tl.constexpr(interface.LARGEST)
LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def logistic(x):
    """σ(x) without overflow."""
    u = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, u) / (1.0 + u)


@triton.jit
def log_logistic(x):
    """logσ(x) without overflow; NaN passes."""
    return tl.where(x > 0, 0.0, x) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def smoothed(x, smoothing):
    """−(1−ε) logσ(x) − ε logσ(−x) and its derivative."""
    # 0 · ∞ where a rejected completion has probability 0
    other = tl.where(smoothing != 0, smoothing * log_logistic(-x), 0.0)
    loss = -(1.0 - smoothing) * log_logistic(x) - other
    return loss, smoothing * logistic(x) - (1.0 - smoothing) * logistic(-x)


@triton.jit
def vanishing(factor, other):
    """The product, 0 where the factor is 0 and the other one infinite."""
    return tl.where(factor == 0, 0.0, factor * other)


@triton.jit
def sigmoid(w, l, beta, smoothing, gamma, tau):
    """−(1−ε) logσ(βΔ) − ε logσ(−βΔ), Δ = w − l (CPO, DPO; sorted, AOT)."""
    loss, slope = smoothed(beta * (w - l), smoothing)
    return loss, beta * slope, -beta * slope


@triton.jit
def simpo(w, l, beta, smoothing, gamma, tau):
    """Sigmoid of βΔ − γ (SimPO)."""
    loss, slope = smoothed(beta * (w - l) - gamma, smoothing)
    return loss, beta * slope, -beta * slope


@triton.jit
def hinge(w, l, beta, smoothing, gamma, tau):
    """relu(1 − βΔ) (SLiC)."""
    gap = 1.0 - beta * (w - l)
    slope = tl.where(gap <= 0, 0.0, tl.zeros_like(gap) + beta)
    return tl.where(gap <= 0, 0.0, gap), -slope, slope


@triton.jit
def ipo(w, l, beta, smoothing, gamma, tau):
    """(Δ − 1/(2β))² (IPO)."""
    gap = w - l - 0.5 / beta
    return gap * gap, 2.0 * gap, -2.0 * gap


@triton.jit
def robust(w, l, beta, smoothing, gamma, tau):
    """[−(1−ε) logσ(βΔ) + ε logσ(−βΔ)] / (1−2ε) (robust DPO)."""
    return sigmoid(w, l, beta, -smoothing / (1.0 - 2.0 * smoothing), gamma, tau)


@triton.jit
def exo_pair(w, l, beta, smoothing, gamma, tau):
    """EXO, q log(q/(1−ε)) + (1−q) log((1−q)/ε) with q = σ(βΔ)."""
    x = beta * (w - l)
    q = logistic(x)
    rest = logistic(-x)
    log_q = log_logistic(x) - tl.log(1.0 - smoothing)
    log_rest = log_logistic(-x) - tl.log(smoothing)
    slope = beta * vanishing(q * rest, log_q - log_rest)
    return vanishing(q, log_q) + vanishing(rest, log_rest), slope, -slope


@triton.jit
def nca_pair(w, l, beta, smoothing, gamma, tau):
    """−logσ(r_w) − ½ logσ(−r_w) − ½ logσ(−r_l) (NCA)."""
    chosen = beta * w
    rejected = beta * l
    loss = -log_logistic(chosen) - 0.5 * log_logistic(-chosen) - 0.5 * log_logistic(-rejected)
    return loss, beta * (0.5 * logistic(chosen) - logistic(-chosen)), 0.5 * beta * logistic(rejected)


@triton.jit
def bco_pair(w, l, beta, smoothing, gamma, tau):
    """−logσ(r_w − δ) − logσ(−(r_l − δ)), δ being taken off before (BCO)."""
    chosen = beta * w
    rejected = beta * l
    return -log_logistic(chosen) - log_logistic(-rejected), -beta * logistic(-chosen), beta * logistic(rejected)


@triton.jit
def sppo_hard(w, l, beta, smoothing, gamma, tau):
    """(w − 1/(2β))² + (l + 1/(2β))² (SPPO)."""
    chosen = w - 0.5 / beta
    rejected = l + 0.5 / beta
    return chosen * chosen + rejected * rejected, 2.0 * chosen, 2.0 * rejected


@triton.jit
def apo_zero(w, l, beta, smoothing, gamma, tau):
    """1 − σ(r_w) + σ(r_l) (APO)."""
    chosen, fallen = logistic(beta * w), logistic(-beta * w)
    rejected, others = logistic(beta * l), logistic(-beta * l)
    return fallen + rejected, -beta * chosen * fallen, beta * rejected * others


@triton.jit
def apo_down(w, l, beta, smoothing, gamma, tau):
    """σ(r_w) + 1 − σ(r_w − r_l) (APO)."""
    chosen, fallen = logistic(beta * w), logistic(-beta * w)
    ahead, behind = logistic(beta * (w - l)), logistic(-beta * (w - l))
    slope = beta * ahead * behind
    return chosen + behind, beta * chosen * fallen - slope, slope


@triton.jit
def discopop(w, l, beta, smoothing, gamma, tau):
    """−logσ(x)(1−m) + exp(logσ(x/τ) − x), x = βΔ, m = σ(x/τ) (DiscoPOP)."""
    x = beta * (w - l)
    rate = 1.0 / tau - 1.0
    scaled = x / tau
    m, rest, logs = logistic(scaled), logistic(-scaled), log_logistic(x)
    # logσ(x/τ) − x without ∞ − ∞
    falling = tl.where(rate == 0, 0.0, x * rate)
    grown = tl.exp(tl.where(x < 0, falling, -x) - tl.log(1.0 + tl.exp(-tl.abs(scaled))))
    slope = rest / tau * vanishing(m, logs) - rest * logistic(-x) + grown * (rest / tau - 1.0)
    return grown - logs * rest, beta * slope, -beta * slope


@triton.jit
def pair_loss(w, l, beta, smoothing, gamma, tau, LOSS: tl.constexpr):
    """The loss of this name, and its slopes in w and l: the only place in Triton that lists them."""
    if LOSS == "sigmoid" or LOSS == "sigmoid_norm" or LOSS == "aot" or LOSS == "aot_unpaired":
        return sigmoid(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "simpo":
        return simpo(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "hinge":
        return hinge(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "ipo":
        return ipo(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "robust":
        return robust(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "exo_pair":
        return exo_pair(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "nca_pair":
        return nca_pair(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "bco_pair":
        return bco_pair(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "sppo_hard":
        return sppo_hard(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "apo_zero":
        return apo_zero(w, l, beta, smoothing, gamma, tau)
    elif LOSS == "apo_down":
        return apo_down(w, l, beta, smoothing, gamma, tau)
    else:
        tl.static_assert(LOSS == "discopop", "unknown pair loss")
        return discopop(w, l, beta, smoothing, gamma, tau)


@triton.jit
def unpaired_loss(x, LOSS: tl.constexpr):
    """The loss of a sequence with margin x = ±(r − shift), and its derivative: −logσ(x) for BCO, σ(−x) for KTO."""
    if LOSS == "bco":
        loss, slope = -log_logistic(x), -logistic(-x)
    else:
        tl.static_assert(LOSS == "kto" or LOSS == "apo_zero_unpaired", "unknown loss of single sequences")
        loss = logistic(-x)
        slope = -loss * logistic(x)
    return loss, slope


@triton.jit
def transformed(x, alpha, TRANSFORM: tl.constexpr):
    """What enters a loss for x, and its derivative: by TRANSFORM ("alpha", "js"), or x itself without one.

    AlphaPO's −expm1(min(−αx, 80))/α, whose derivative is 0 beyond the clamp, or log 2 + logσ(x).
    """
    if TRANSFORM == "alpha":
        power = -alpha * x
        clamped = tl.where(power > ALPHA_CLAMP, ALPHA_CLAMP, power)
        grown = tl.exp(clamped)
        # exp − 1 cancels for small powers, where the series is exact.
        small = clamped * (1.0 + clamped * (1 / 2 + clamped * (1 / 6 + clamped * (1 / 24 + clamped * (1 / 120)))))
        value = -tl.where(tl.abs(clamped) < 1e-3, small, grown - 1.0) / alpha
        return value, tl.where(power > ALPHA_CLAMP, 0.0, grown)
    elif TRANSFORM == "js":
        return LOG_2 + log_logistic(x), logistic(-x)
    else:
        return x, tl.zeros_like(x) + 1.0


@triton.jit
def saturate(x):
    """Keep a large finite value finite in every dtype with an 8-bit exponent; NaN and infinity pass."""
    held = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    return tl.where(tl.abs(x) == float("inf"), x, held)
