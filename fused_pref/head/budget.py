"""The workspace of a linear head whose call gives no ``memory_budget``."""

import functools

import torch

from fused_pref.ops.backend import DEVICES

# The part of a device's memory that a call may take.
PART = 16
# The least where that memory is not known.
LEAST = 2**28


@functools.cache
def default_budget(memory: int | None, vocabulary: int, hidden: int, itemsize: int) -> int:
    """Bytes: 1/16 of the device's memory; if that is None, as many as dW has, at least 256 MiB."""
    return max(LEAST, vocabulary * hidden * itemsize) if memory is None else memory // PART


@functools.cache
def memory_of(device: torch.device) -> int | None:
    """Total bytes of a device; None where it has no memory of its own (CPUs), or PyTorch does not say."""
    if device.type not in DEVICES:
        return None
    module = torch.get_device_module(device)
    return module.get_device_properties(device).total_memory if module.is_available() else None
