"""Which implementation computes the token terms and the reductions."""

import functools
import importlib.util
from typing import Any

import torch

DEVICES = ("cuda", "xpu")
# HIP devices that run gfx942's configurations, which are compiled, inspected and emulated.
HIP = ("gfx942", "gfx950")
# The architecture that CPU tensors stand for, None outside of tests: kernels are compiled for it, and an emulator runs
# the code (tests/gfx942). Without one, Triton's interpreter runs the kernels on CPU tensors.
EMULATED: str | None = None


@functools.cache
def _triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module that was set to None
        return False


@functools.cache
def _interpreter_chosen() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def interpreted(device: torch.device) -> bool:
    """Whether kernels on ``device`` are interpreted: that needs other launches than compiled code."""
    return device.type == "cpu" and EMULATED is None


def triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton backend cannot serve tensors on ``device``; None if it can."""
    if not _triton_installed():
        return "Triton is not installed (pip install triton, on Linux)"
    if device.type in DEVICES:
        return None
    if device.type != "cpu":
        return f"it has no kernels for {device.type} tensors"
    if interpreted(device) and not _interpreter_chosen():
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
    return None


def taken_by_auto(device: torch.device) -> bool:
    """Whether ``backend="auto"`` takes kernels: not on XPU, nor on other HIP devices, until they are measured there."""
    if device.type != "cuda" or torch.version.hip is None:
        return device.type == "cuda"
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0] in HIP


def properties(device: torch.device) -> Any:
    """What PyTorch says of a CUDA device; remembered by number, because it takes as long as half a launch to say."""
    return torch.cuda.get_device_properties(device) if device.index is None else _properties(device.index)


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def architecture(device: torch.device) -> str:
    """The architecture whose configurations and costs a device uses; an unknown one uses those of an older one."""
    if device.type != "cuda":
        return EMULATED or "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = properties(device).major
    # Other generations, of consumer cards too, have no more shared memory than the tiles of sm_80 need.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def resolve(backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """``"triton"`` or ``"torch"`` for a validated backend; ``"auto"`` is Triton on CUDA and :data:`HIP` devices.

    Raises:
        TypeError: ``backend="triton"`` with float64.
        ValueError: an unavailable backend.
    """
    if backend == "triton" and dtype == torch.float64:
        raise TypeError('backend="triton" computes in float32; for float64 inputs use backend="torch" or "auto"')
    if backend == "torch" or dtype == torch.float64 or (backend == "auto" and not taken_by_auto(device)):
        return "torch"
    obstacle = triton_obstacle(device)
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f'backend="triton" is not available: {obstacle}; or use backend="torch" or "auto"')
    return "torch"
