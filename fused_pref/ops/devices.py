"""What products cost on the devices that are planned for."""

import functools
import math
from dataclasses import dataclass

import torch

from fused_pref.ops.backend import architecture


@dataclass(frozen=True, eq=False)
class Device:
    """What products cost on a kind of device.

    Attributes:
        name: ``"cpu"`` or ``"gpu"``.
        rates: operations per second by bytes of an entry.
        bandwidth: bytes per second.
        outputs: entries that a product must have to keep the device busy; smaller ones take as long.
        columns: least vocabulary columns of a slice.
        mixed: whether products of 16-bit entries come out in float32.
        scratch: bytes of the block that elementwise work goes through.
        measured: where the figures are from.
        memory: total bytes, as PyTorch reports them; None: the host's, which other work needs too.
        epilogue: seconds that a fused product spends on a logit beyond multiplying: what the slowest of them is
            predicted to take above the floor at D=4096 (``benchmarks/static.md``), not measured. Infinite where
            kernels run for tests alone.
    """

    name: str
    rates: dict[int, float]
    bandwidth: float
    outputs: int
    columns: int
    mixed: bool
    scratch: int
    measured: str
    memory: int | None = None
    epilogue: float = math.inf


def _gpu(
    measured: str, gibibytes: int, half: float, single: float, bandwidth: float, tiles: int, epilogue: float
) -> Device:
    rates = {2: half, 4: single, 8: single / 10}
    # Two waves of tiles.
    return Device(
        "gpu", rates, bandwidth, 2 * tiles * 128 * 256, 4096, True, 2**25, measured, gibibytes << 30, epilogue
    )


CPU = Device("cpu", {2: 2.2e12, 4: 4.0e11, 8: 2.0e11}, 5.0e10, 768 * 1024, 2048, False, 2**20, "2 cores with AMX")
# By architecture. Where nothing was measured: 0.8 (0.6 on an MI300X) of the data sheet's operations and 0.9 of its
# bandwidth.
GPUS = {
    "sm_80": _gpu("0.8 of an A100's data sheet", 79, 2.5e14, 1.2e14, 1.75e12, 54, 2.2e-12),
    "sm_90": _gpu("an H200", 139, 7.9e14, 3.0e14, 4.3e12, 132, 1.1e-12),
    "sm_100": _gpu("0.8 of a B200's data sheet", 178, 1.8e15, 8.0e14, 7.2e12, 148, 1.1e-12),
    "gfx942": _gpu("0.6 of an MI300X's data sheet", 191, 7.8e14, 1.0e14, 4.7e12, 304, 1.6e-12),
}
GPU = GPUS["sm_90"]


def device_of(kind: str, architecture: str = "sm_90") -> Device:
    """Constants of a ``torch.device.type``; of a GPU those of its architecture."""
    return CPU if kind == "cpu" else GPUS[architecture]


@functools.cache
def device_at(device: torch.device) -> Device:
    """Constants of a device that is here."""
    return device_of(device.type, architecture(device))
