"""Device twins of the loss functions in :mod:`fused_pref.losses`, in float64, under the same names.

A pair loss takes Δ and the hyperparameters and gives the loss and ∂loss/∂Δ; ``pair_loss`` picks it by name, and
``unpaired_loss`` that of a single sequence.
"""

import triton
import triton.language as tl

from fused_pref.ops import interface

ALPHA_CLAMP = tl.constexpr(interface.ALPHA_CLAMP)
LARGEST = tl.constexpr(interface.LARGEST)


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
    other = tl.where(smoothing > 0, smoothing * log_logistic(-x), 0.0)
    loss = -(1.0 - smoothing) * log_logistic(x) - other
    return loss, smoothing * logistic(x) - (1.0 - smoothing) * logistic(-x)


@triton.jit
def sigmoid(delta, beta, smoothing, gamma):
    """−(1−ε) logσ(βΔ) − ε logσ(−βΔ) (CPO, DPO)."""
    loss, slope = smoothed(beta * delta, smoothing)
    return loss, beta * slope


@triton.jit
def simpo(delta, beta, smoothing, gamma):
    """Sigmoid of βΔ − γ (SimPO)."""
    loss, slope = smoothed(beta * delta - gamma, smoothing)
    return loss, beta * slope


@triton.jit
def hinge(delta, beta, smoothing, gamma):
    """relu(1 − βΔ) (SLiC)."""
    gap = 1.0 - beta * delta
    return tl.where(gap <= 0, 0.0, gap), tl.where(gap <= 0, 0.0, tl.zeros_like(gap) - beta)


@triton.jit
def ipo(delta, beta, smoothing, gamma):
    """(Δ − 1/(2β))² (IPO)."""
    gap = delta - 0.5 / beta
    return gap * gap, 2.0 * gap


@triton.jit
def pair_loss(delta, beta, smoothing, gamma, LOSS: tl.constexpr):
    """The loss of this name: the one place that lists them."""
    if LOSS == "sigmoid":
        loss, slope = sigmoid(delta, beta, smoothing, gamma)
    elif LOSS == "simpo":
        loss, slope = simpo(delta, beta, smoothing, gamma)
    elif LOSS == "hinge":
        loss, slope = hinge(delta, beta, smoothing, gamma)
    else:
        tl.static_assert(LOSS == "ipo", "unknown pair loss")
        loss, slope = ipo(delta, beta, smoothing, gamma)
    return loss, slope


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
def alpha_reward(logps, alpha, ALPHA: tl.constexpr):
    """AlphaPO's −expm1(min(−α·logps, 80))/α and its derivative, 0 beyond the clamp; the identity without ALPHA."""
    if ALPHA:
        power = -alpha * logps
        clamped = tl.where(power > ALPHA_CLAMP, ALPHA_CLAMP, power)
        grown = tl.exp(clamped)
        # exp − 1 cancels for small powers, where the series is exact.
        small = clamped * (1.0 + clamped * (1 / 2 + clamped * (1 / 6 + clamped * (1 / 24 + clamped * (1 / 120)))))
        value = -tl.where(tl.abs(clamped) < 1e-3, small, grown - 1.0) / alpha
        return value, tl.where(power > ALPHA_CLAMP, 0.0, grown)
    else:
        return logps, tl.zeros_like(logps) + 1.0


@triton.jit
def saturate(x):
    """Keep a large finite value finite in every dtype with an 8-bit exponent; NaN and infinity pass."""
    held = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    return tl.where(tl.abs(x) == float("inf"), x, held)
