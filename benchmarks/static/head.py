"""Roofline of the fused products of the linear head.

A tile takes as long as its product at the vendor's rate; then its epilogue, whose instructions are counted in the
compiled code, and the latency of the next tile's first loads. Where two programs share a processor, one multiplies
while the other does that. Tiles come in whole waves. The whole takes at least as long as moving its bytes.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton

from benchmarks.static.gpus import GPUS, LATENCY, MATRIX, SPECIAL, Listing, lanes_of, table
from benchmarks.static.order import Order
from benchmarks.static.order import moved as order_moved
from fused_pref.cli.kernels import cases, compile
from fused_pref.cli.kernels.compile import Launch
from fused_pref.ops import devices
from fused_pref.ops.triton.exponentials import PROBE

ROWS = 8192
SHAPES = ((4096, 128256), (2304, 256000), (1024, 128256))


@dataclass(frozen=True)
class Code:
    """Instructions of a program: those of its loop over the depth, and the rest of a tile."""

    epilogue: int
    special: int
    matrix: int


def code_of(launch: Launch, compiled: triton.compiler.CompiledKernel) -> Code:
    """Count a tile: a loop that multiplies inside of one that holds it, or of the whole program."""
    listing = Listing.of(compiled)
    multiplying = [loop for loop in listing.loops if listing.count(MATRIX, *loop)]
    first, last = min(multiplying, key=lambda loop: loop[1] - loop[0])
    # Beyond the last return of SASS stand the slow paths of waits; AMD's code goes on behind an early one.
    returns = [i + 1 for i, operation in enumerate(listing.code) if re.search("EXIT", operation)]
    whole = (0, max(returns, default=len(listing.code)))
    around = [(a, b) for a, b in multiplying if a < first and last < b <= whole[1]]
    over_tiles = not launch.kernel.__name__.startswith("_linear_gradient") and around
    start, end = min(around, key=lambda loop: loop[1] - loop[0]) if over_tiles else whole
    special = listing.count(SPECIAL, start, end) - listing.count(SPECIAL, first, last)
    return Code(end - start - (last - first), special, listing.count(MATRIX, first, last))


def rows_of(name: str, launcher: Callable[..., object], target: str) -> Iterator[list[str]]:
    """Rows of the table."""
    gpu, rate, bandwidth = GPUS[target], devices.GPUS[target].rates[2], devices.GPUS[target].bandwidth
    for features, vocabulary in SHAPES:
        launches = compile.record(
            partial(launcher, torch.bfloat16, features=features, vocabulary=vocabulary), target, gpu.processors
        )
        launch = next(x for x in launches if "target" not in x.kernel.__name__ and _is_main(x, vocabulary))
        compiled = compile.compile_launch(launch, target)
        used, code, sizes = compile.resources(launch, compiled, target), code_of(launch, compiled), launch.constants
        tile_rows, tile_columns = sizes["ROWS"], sizes["COLUMNS"]
        columns, splits = launch.keywords["columns"], launch.keywords.get("splits")
        blocks, chunks = -(-ROWS // tile_rows), -(-columns // tile_columns)
        per_program = 1 if splits is None else -(-launch.keywords["split_columns"] // tile_columns)
        programs = blocks * (chunks if splits is None else splits)
        lanes = lanes_of(used, target)
        resident = gpu.programs(used, lanes)
        product = 2 * tile_rows * tile_columns * features / (rate / gpu.processors)
        issued, special = (
            n * lanes / (m * gpu.clock) for n, m in zip((code.epilogue, code.special), gpu.issue, strict=True)
        )
        alone = product + max(issued, special) + LATENCY
        waves = -(-programs // (gpu.processors * resident))
        compute = waves * per_program * max(resident * product, alone)
        logits = ROWS * columns
        operands = (2 * tile_rows * features, 2 * tile_columns * features)
        order = Order(blocks, chunks, splits or chunks, sizes["GROUP"], *operands)
        moved, _ = order_moved(order, target, resident)
        cached = blocks * chunks * sum(operands)
        moved += 2 * logits if launch.keywords.get("out") is not None else 0
        floor = 2 * logits * features / rate
        predicted = max(compute, moved / bandwidth)
        yield [
            name, f"{gpu.name} ({target})", f"{features}", f"{columns}", f"{tile_rows}x{tile_columns}x{sizes['DEPTH']}",
            f"{used['registers']}", f"{used['shared_bytes'] >> 10}", f"{resident}", f"{code.matrix}",
            f"{used['wide_loads']}",
            f"{code.epilogue * lanes / (tile_rows * tile_columns):.1f}", f"{moved / 2**30:.2f}",
            f"{cached / predicted / 1e12:.1f}",
            f"{2e-12 * logits * features:.3g}", f"{1e3 * floor:.2f}", f"**{1e3 * predicted:.2f}**",
            f"**{predicted / floor:.2f}**",
        ]  # fmt: skip


def _is_main(launch: Launch, vocabulary: int) -> bool:
    """Whether a launch does the work, and not the look ahead at the first columns."""
    return launch.keywords["columns"] != PROBE or vocabulary == PROBE


KERNELS = {
    "statistics (log-probs only)": cases.linear_statistics,
    "gradient of a slice of 8192": cases.linear_gradient,
    "exponentials (forward and Q at once)": cases.linear_exponentials,
}
HEADER = [
    "kernel", "GPU", "D", "columns", "tile", "registers", "shared KiB", "programs per processor",
    "matrix instructions", "wide loads",
    "epilogue instructions per logit", "GiB moved", "TB/s from the cache", "TFLOP", "floor, ms", "predicted, ms",
    "of the floor",
]  # fmt: skip


INTRODUCTION = f"""
N = {ROWS}, bf16.

The floor is cuBLAS's GEMM of the same size, alone. A tile is predicted to take its product at that rate, then
its epilogue (instructions counted in the compiled code, and {LATENCY * 1e6:g} µs for the first loads of the next tile),
which a second program on the processor hides if there is room for one; tiles come in whole waves. Bytes moved are those
of the simulation above. That the second-level cache keeps up is assumed: a column says what it would have to give, and
a cache that gives less is the bound instead.
"""


def page(targets: list[str]) -> str:
    """What is assumed, and the table."""
    rows = [cells for name, call in KERNELS.items() for target in targets for cells in rows_of(name, call, target)]
    return INTRODUCTION + "\n" + table(HEADER, rows)
