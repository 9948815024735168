"""What a launch needs that only a GPU would refuse; checked on the recorded launches of :mod:`benchmarks.replay`."""

from typing import Any

from benchmarks.replay.calls import Replayed
from benchmarks.replay.machine import Launched, Operand

# CUDA's and HIP's limits of a grid; AMD counts threads, of which a program has at most 1024.
GRID = (2**31 // 1024 - 1, 65535, 65535)
# Of a tensor descriptor: entries of a block along a dimension, and bytes of which rows are multiples.
BOX, ALIGNED = 256, 16
INT64 = 2**63


def faults(launched: Launched, gpu: int) -> list[str]:
    """What is wrong with a launch whose tensors are on this GPU."""
    found = []
    operands = {name: value for name, value in launched.bound.items() if isinstance(value, Operand)}
    found += [f"{name} is on {value.gpu}" for name, value in operands.items() if value.gpu != gpu]
    if launched.gpu != gpu:
        found.append(f"launched on {launched.gpu}")
    grid = (*launched.grid, 1, 1)[:3]
    found += [f"grid {grid}"] if any(not 0 < n <= most for n, most in zip(grid, GRID, strict=True)) else []
    numbers = {name: value for name, value in launched.bound.items() if type(value) is int}
    found += [f"{name} = {value}" for name, value in numbers.items() if not -INT64 <= value < INT64]
    for name, value in operands.items():
        found += [f"descriptor of {name}: {fault}" for fault in _descriptor_faults(value)]
    return [f"{launched.name}: {fault}" for fault in found]


def _descriptor_faults(operand: Operand) -> list[str]:
    if operand.block is None:
        return []
    size = operand.dtype.itemsize
    checks: dict[str, Any] = {
        "offset": operand.offset % ALIGNED == 0,
        "last stride": operand.strides[-1] == 1,
        "strides": all(0 < n * size < 2**40 and n * size % ALIGNED == 0 for n in operand.strides[:-1]),
        "shape": all(0 < n < 2**32 for n in operand.shape),
        "block": all(0 < n <= BOX for n in operand.block) and operand.block[-1] * size % ALIGNED == 0,
    }
    return [f"{name} of {operand}" for name, good in checks.items() if not good]


def all_faults(replayed: Replayed) -> list[str]:
    """What is wrong with the launches of a call."""
    return [fault for launched in replayed.machine.launches for fault in faults(launched, replayed.call.gpu)]
