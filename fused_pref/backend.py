"""Which implementation computes the token terms."""

import torch

from fused_pref import validate
from fused_pref.keywords import TokenKeywords, choices

BACKENDS = choices(TokenKeywords, "backend")


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton backend cannot serve tensors on ``device``; None if it can."""
    return "this version has no Triton kernels"


def resolve(backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """``"triton"`` or ``"torch"``.

    Raises:
        TypeError: ``backend="triton"`` with float64.
        ValueError: an unknown or unavailable backend.
    """
    validate.choice("backend", backend, BACKENDS)
    if backend == "triton" and dtype == torch.float64:
        raise TypeError('backend="triton" computes in float32; for float64 inputs use backend="torch" or "auto"')
    if backend == "torch" or dtype == torch.float64:
        return "torch"
    obstacle = triton_obstacle(device)
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f'backend="triton" is not available: {obstacle}; use backend="torch" or "auto"')
    return "torch"
