"""What products cost on the devices that are planned for."""

import functools
import math
from collections.abc import Callable
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
        columns: vocabulary columns that a product, or a block of one, works at a time.
        outputs: on a CPU the entries that a product must have to keep it busy; smaller ones take as long.
        processors: of a GPU.
        launch: seconds that a GPU's host takes for a launch.
        mixed: whether products of 16-bit entries come out in float32.
        scratch: bytes of the block that elementwise work goes through.
        measured: where the figures are from.
        memory: total bytes, as PyTorch reports them; None: the host's, which other work needs too.
        epilogue: seconds per logit that a fused product takes beyond its multiplications. Predicted, not measured: the
            slowest kernel's time above the floor at D=4096 (``benchmarks/static.md``). Infinite where kernels run for
            tests alone.
        by_index: extra seconds per multiplication where rows are read by index instead of by descriptor. Predicted, not
            measured: for tiles of 256 columns and four instructions for 16 bytes. 0 where there are no descriptors.
    """

    name: str
    rates: dict[int, float]
    bandwidth: float
    measured: str
    columns: int = 2048
    mixed: bool = False
    scratch: int = 2**20
    memory: int | None = None
    epilogue: float = math.inf
    by_index: float = 0.0
    outputs: int = 0
    processors: int = 0
    launch: float = 0.0

    def product_seconds(self, rows: int, columns: int, terms: int, itemsize: int, slow: float) -> float:
        """Time of a product (rows, terms) · (terms, columns) that reads its operands once; of a CPU ``slow`` times."""
        seconds = 2 * rows * columns * terms / self.rates[itemsize]
        moved = (rows + columns) * terms * itemsize
        if not self.processors:
            return seconds * max(slow, self.outputs / max(rows * columns, 1)) + moved / self.bandwidth
        # Tiles of 128 x 256 go in waves over the processors; where they are few, cuBLAS splits the terms.
        tiles = -(-rows // 128) * -(-columns // 256) or 1
        splits = max(1, min(self.processors // tiles, terms // 1024))
        waves = tiles * splits / self.processors
        if splits > 1:
            moved += 8 * splits * rows * columns
        return seconds * math.ceil(waves) / waves + moved / self.bandwidth + self.launch

    def allocation(self, size: int) -> int:
        """Bytes to ask for where this many are needed.

        On a GPU rounded up to an eighth of the next power of two, so that the allocator can give the same memory to
        the next batch, whose tokens are about as many.
        """
        if not self.processors or size < 2**20:
            return size
        step = 1 << (size - 1).bit_length() - 3
        return -(-size // step) * step


def _gpu(
    measured: str, gibibytes: int, half: float, single: float, bandwidth: float, processors: int, *,
    epilogue: float, by_index: float = 0.0,
) -> Device:  # fmt: skip
    return Device(
        "gpu", {2: half, 4: single, 8: single / 10}, bandwidth, measured, columns=4096, mixed=True, scratch=2**25,
        memory=gibibytes << 30, epilogue=epilogue, by_index=by_index, processors=processors, launch=5e-6,
    )  # fmt: skip


CPU = Device("cpu", {2: 2.2e12, 4: 4.0e11, 8: 2.0e11}, 5.0e10, "2 cores with AMX", outputs=768 * 1024)
# By architecture. Where nothing was measured: 0.8 (0.6 on an MI300X) of the data sheet's operations and 0.9 of its
# bandwidth.
GPUS = {
    "sm_80": _gpu("0.8 of an A100's data sheet", 79, 2.5e14, 1.2e14, 1.75e12, 108, epilogue=2.2e-12),
    "sm_90": _gpu("an H200", 139, 7.9e14, 3.0e14, 4.3e12, 132, epilogue=1.1e-12, by_index=6.8e-17),
    "sm_100": _gpu("0.8 of a B200's data sheet", 178, 1.8e15, 8.0e14, 7.2e12, 148, epilogue=1.1e-12, by_index=5.6e-17),
    "gfx942": _gpu("0.6 of an MI300X's data sheet", 191, 7.8e14, 1.0e14, 4.7e12, 304, epilogue=1.6e-12),
}
GPU = GPUS["sm_90"]


def device_of(kind: str, architecture: str = "sm_90") -> Device:
    """Constants of a ``torch.device.type``; of a GPU those of its architecture."""
    return CPU if kind == "cpu" else GPUS[architecture]


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies these 16-bit entries faster than float32.

    Without AVX-512, PyTorch's loops are far slower. With AVX-512 but not AMX, Intel's processors take twice as long as
    for float32; AMD's are faster. Float16 never serves: its sums may overflow.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if dtype != torch.bfloat16 or supported is None or not supported():
        return False
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(cpu.get("amx_bf16")) or not str(cpu.get("cpu_name", "")).startswith("Intel")


# What gives the figures that were measured on a device in place of its constants; None: nothing does.
measured: Callable[[torch.device, Device], Device] | None = None


@functools.cache
def device_at(device: torch.device) -> Device:
    """Constants of a device that is here."""
    return device_of(device.type, architecture(device))
