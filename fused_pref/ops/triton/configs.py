"""Launch configurations: a fixed default per (architecture, bytes of an entry), and the candidates of a search.

The search is opt-in: :mod:`fused_pref.cli.tune`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from fused_pref.ops.backend import architecture, interpreted, properties
from fused_pref.ops.triton.launch import next_power_of_2


@dataclass(frozen=True)
class Config:
    """Entries a program handles at a time, and its warps."""

    block: int
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Options of a launch; FMA fusion is set because its default differs between Triton releases."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """Logits [rows, columns] of a program, made of blocks ``depth`` deep; ``group`` row blocks share a weight block.

    With ``descriptors`` blocks are read by tensor descriptors, where the operands allow that, else by pointers. With
    ``flattened`` a program that leaves only statistics walks its tiles in one loop
    (:mod:`fused_pref.ops.triton.mainloop`); other kernels have no such form.
    """

    rows: int
    columns: int
    depth: int
    group: int
    num_warps: int
    num_stages: int
    descriptors: bool
    flattened: bool = False

    @property
    def options(self) -> dict[str, int | bool]:
        """Options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


AnyConfig = TypeVar("AnyConfig", Config, Tile)


@dataclass(frozen=True)
class Defaults:
    """What an architecture's launches take.

    Attributes:
        forward, backward: of the kernels that walk rows, by bytes of an entry: a thread reads at least 16 bytes at a
            time, and holds few enough entries that several programs share a processor.
        statistics: of fused products of 16-bit entries that leave statistics or Q; the widest tile that does not spill.
        exponentials: of those that leave both.
        high_pressure: of those whose epilogue needs more registers: an activation, a bias, an unaligned end of columns.
        selected: of products of selected rows, by pointers.
        exact: of all products of float32.
        cache: bytes of the last cache before memory, by the data sheet.
    """

    statistics: Tile
    exponentials: Tile
    high_pressure: Tile
    selected: Tile
    forward: dict[int, Config] = field(default_factory=lambda: {2: _LARGE, 4: _SMALL})
    backward: dict[int, Config] = field(default_factory=lambda: {2: _LARGE, 4: _SMALL})
    exact: Tile = Tile(64, 64, 16, 16, 8, 3, False)
    cache: int = 40 << 20


_WIDE, _SQUARE = Tile(128, 256, 64, 16, 8, 3, True), Tile(128, 128, 64, 16, 8, 3, True)
# Two programs fit into the shared memory of a processor: one multiplies while the other takes its logits in.
_TWICE = Tile(128, 256, 64, 16, 8, 2, True)
_POINTERS, _MI300 = Tile(128, 128, 64, 16, 8, 3, False), Tile(128, 128, 64, 16, 8, 2, False)
_LARGE, _SMALL = Config(4096, 8), Config(2048, 8)
# In the order of fused_pref.ops.devices.GPUS, which names the architectures.
DEFAULTS = {
    "sm_80": Defaults(
        statistics=_POINTERS,
        exponentials=_POINTERS,
        high_pressure=Tile(64, 128, 64, 16, 8, 3, False),
        selected=_POINTERS,
    ),
    "sm_90": Defaults(
        forward={2: _LARGE, 4: _LARGE},
        cache=50 << 20,
        statistics=_WIDE,
        exponentials=_WIDE,
        high_pressure=_SQUARE,
        selected=_POINTERS,
    ),
    "sm_100": Defaults(
        forward={2: _LARGE, 4: _LARGE},
        cache=126 << 20,
        statistics=_TWICE,
        exponentials=_TWICE,
        high_pressure=_SQUARE,
        selected=_POINTERS,
    ),
    "gfx942": Defaults(
        cache=256 << 20,
        statistics=Tile(256, 128, 64, 16, 8, 2, False),
        exponentials=_MI300,
        high_pressure=_MI300,
        selected=_MI300,
    ),
}
# For rows that are read entry by entry, or whose end falls within a block.
UNALIGNED_TILE = Tile(64, 128, 32, 16, 8, 2, False)
INTERPRETER_TILE = Tile(16, 32, 16, 2, 1, 1, True)
# Entries of a target's product that a program takes at a time.
TARGET_PRODUCT = Config(1024, 4)
# Columns of Q that a program sums over the selected rows.
SELECTED_BIAS = Config(64, 4)
CANDIDATES = [Config(block, warps) for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16)]
# Rows, columns, depth, warps and stages of tiles by bytes of an entry.
TILE_CANDIDATES = {
    2: [
        (128, 256, 64, 8, 2), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 2), (256, 128, 64, 8, 3), (64, 256, 64, 8, 3), (64, 128, 64, 4, 4),
    ],
    4: [(64, 64, 16, 8, 3), (64, 64, 32, 8, 2), (64, 128, 16, 8, 3), (128, 64, 16, 8, 3), (32, 64, 32, 4, 3)],
}  # fmt: skip
# Rows of which a program handles an entry or a few: no fewer than it has threads on any GPU, so that none of them
# repeats a row and reads what another has written.
ROWS = Config(256, 4)
# Tokens of a sequence that a program sums at a time.
REDUCTION = Config(1024, 4)
# Pairs or sequences that an objective handles at a time: two a thread, because it keeps some thirty float64 of each.
OBJECTIVE = Config(256, 4)
# The interpreter pays per operation: one wide block. Its "processors" are few, so that tests split rows.
INTERPRETER = Config(8192, 1)
INTERPRETER_PROCESSORS = 4


def processors(device: torch.device) -> int:
    """Streaming multiprocessors, compute units or Xe cores of a device."""
    if device.type == "cuda":
        return properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return INTERPRETER_PROCESSORS


def defaults(device: torch.device) -> Defaults:
    """What the launches on a device take."""
    return DEFAULTS[architecture(device)]


def choose(table: dict[int, Config], device: torch.device, dtype: torch.dtype, columns: int) -> Config:
    """The default configuration for entries of this dtype, cut to the vocabulary."""
    if interpreted(device):
        return INTERPRETER
    config = table[dtype.itemsize]
    return Config(min(config.block, max(1024, next_power_of_2(columns))), config.num_warps)


# What chooses in place of the defaults, with the arguments of :func:`chosen`; None: nothing does.
chooser: Callable[..., Any] | None = None


def chosen(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    default: AnyConfig,
    candidates: Iterable[AnyConfig],
    run: Callable[[AnyConfig], object],
) -> AnyConfig:
    """The default, or what :data:`chooser` takes.

    ``kernel`` is its name, and what else its code depends on; ``size`` D of a product, V of a kernel that streams.
    ``candidates`` are timed beside the default; ``run`` launches the kernel, any number of times.
    """
    return default if chooser is None else chooser(kernel, device, dtype, size, default, candidates, run)


def rows_aligned(x: torch.Tensor) -> bool:
    """Whether rows begin whole 16 bytes apart."""
    return x.stride(0) * x.dtype.itemsize % 16 == 0


def tile_candidates(default: Tile, dtype: torch.dtype, *, flattened: bool = False) -> Iterator[Tile]:
    """What a search times beside a default tile: other sizes, read in the same way.

    ``flattened``: in both forms, where descriptors load the blocks: other loads have no set-up that could be spared.
    """
    names = ("rows", "columns", "depth", "num_warps", "num_stages")
    tiles = [replace(default, **dict(zip(names, sizes, strict=True))) for sizes in TILE_CANDIDATES[dtype.itemsize]]
    yield from tiles
    if flattened and default.descriptors:
        yield from (replace(tile, flattened=True) for tile in dict.fromkeys((default, *tiles)))
