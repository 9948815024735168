"""The one way to launch a kernel: on the device of its tensors. Triton itself launches on the current device.

Tensors may lie elsewhere: in models spread over several GPUs (``device_map``), in naive pipelines, and wherever a
script names a device without making it the current one.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_pref.ops.backend import DEVICES


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which this device is the current one; nothing on a CPU."""
    if device.type not in DEVICES:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **keywords: Any) -> None:
    """Launch a kernel.

    Args:
        kernel: a function of ``triton.jit``.
        grid: programs along each dimension.
        device: where its tensors are.
        arguments: of the kernel.
        keywords: arguments of the kernel, and options of the launch.
    """
    with on(device):
        kernel[grid](*arguments, **keywords)


def mark_changed(*tensors: Tensor) -> None:
    """Tell autograd of arguments that a kernel changes: where it has saved one, its backward then raises."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)
