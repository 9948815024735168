"""Numbers that objectives share: quotients that may be over nothing, and what every output dtype can hold."""

import torch
from torch import Tensor

from fused_pref.ops.interface import LARGEST


def ratio(total: Tensor, count: float | Tensor) -> Tensor:
    """``total / count``; 0 where the count is 0, but NaN if the total is not finite."""
    if isinstance(count, Tensor):
        return total / torch.where(count > 0, count.double(), torch.inf)
    return total / (count if count > 0 else torch.inf)


def saturate(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep what is finite in float64 finite in ``dtype``; NaN and infinity stay."""
    if dtype == value.dtype:
        return value
    return torch.where(value.isinf(), value, value.clamp(-LARGEST, LARGEST))


def narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a float64 result without turning a large finite value into infinity."""
    return saturate(value, dtype).to(dtype)


def split(value: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A number or tensor as the two arguments that an op takes for it."""
    return (None, value) if isinstance(value, Tensor) else (value, None)
