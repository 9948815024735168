"""Small device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x in one product and one machine instruction: results below 2⁻¹²⁶ are 0, which ``tl.exp`` pays to keep."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(x):
    """tanh to about 1e-7 relative: a series near 0, where the exponential form would cancel."""
    u = exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - u) * (1.0 / (1.0 + u))
    q = x * x
    series = x * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to about 1e-7 relative: the area-tangent series where log would cancel."""
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def transform(x, inner, outer, TRANSFORM: tl.constexpr):
    """z of a logit x: outer · f(inner · x), f the activation of this name; x itself for "identity"."""
    if TRANSFORM == "identity":
        return x
    elif TRANSFORM == "linear":
        return inner * x
    else:
        tl.static_assert(TRANSFORM == "tanh", "unknown activation")
        return outer * tanh(inner * x)


@triton.jit
def transform_backward(dz, x, inner, outer, TRANSFORM: tl.constexpr):
    """∂/∂x from ∂/∂z."""
    if TRANSFORM == "linear":
        return dz * inner
    else:
        return activation_backward(dz, x, inner, outer, TRANSFORM)


@triton.jit
def activation_backward(dz, x, inner, outer, TRANSFORM: tl.constexpr):
    """The same of an activation; dz as it is without one. 1 − tanh² as 4u/(1+u)² does not cancel where it saturates."""
    if TRANSFORM == "identity" or TRANSFORM == "linear":
        return dz
    else:
        tl.static_assert(TRANSFORM == "tanh", "unknown activation")
        u = exp(-2.0 * tl.abs(inner * x))
        r = 1.0 / (1.0 + u)
        return dz * (outer * inner) * (4.0 * u * (r * r))


@triton.jit
def sequence_of(row, length):
    """The sequence (int64) of a row (int64) where all have this length; the rows of a grid are less than 2³¹."""
    return (row.to(tl.int32) // length).to(tl.int64)


@triton.jit
def row_offset(row, length, stride_s, stride_t, WIDTH: tl.constexpr):
    """Where a row (int64) begins, a multiple of WIDTH."""
    s = sequence_of(row, length)
    return tl.multiple_of(s * stride_s + (row - s * length) * stride_t, WIDTH)


@triton.jit
def column_of(y, columns):
    """The column (int32) of a label (int64), −1 for a label outside the vocabulary."""
    return tl.where((y >= 0) & (y < columns), y, -1).to(tl.int32)
