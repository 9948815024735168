"""The one way to launch a kernel: on the device of its tensors. Triton itself launches on the current device.

Tensors may lie elsewhere: in models spread over several GPUs (``device_map``), in naive pipelines, and wherever a
script names a device without making it the current one.

A small step is bound by the host's time before its launches: ``python -m benchmarks host`` measures that.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_pref.ops.backend import DEVICES

# The context for the usual case: the device is already current.
NOTHING = contextlib.nullcontext()


def cdiv(size: int, part: int) -> int:
    """Parts that a size has, the last one perhaps not whole. ``triton.cdiv`` takes as long as half a launch."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """The least power of 2 that is no less than a size. ``triton.next_power_of_2`` takes as long as half a launch."""
    return 1 << max(size - 1, 0).bit_length()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which this device is the current one; nothing on a CPU."""
    if device.type not in DEVICES:
        return NOTHING
    module = torch.get_device_module(device)
    return NOTHING if device.index == module.current_device() else module.device(device)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **keywords: Any) -> None:
    """Launch a kernel on the device of its tensors; ``keywords`` are arguments of it and options of the launch."""
    with on(device):
        kernel[grid](*arguments, **keywords)


def mark_changed(*tensors: Tensor) -> None:
    """Tell autograd of arguments that a kernel changes: where it has saved one, its backward then raises."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)
