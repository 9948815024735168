"""Roofline of the fused products of the linear head, on four GPUs, from compiled code alone.

``python -m benchmarks.static_head > benchmarks/static_head.md``.

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

from fused_pref.head import plan
from fused_pref.kernels import cases, compile
from fused_pref.kernels.compile import Launch

ROWS = 8192
SHAPES = ((4096, 128256), (2304, 256000), (1024, 128256))


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do.

    Attributes:
        name: of the GPU.
        processors: its multiprocessors or compute units.
        clock: cycles per second.
        shared: bytes of shared memory of a processor.
        registers: per processor.
        issue: lanes that issue an instruction in a cycle, and those that evaluate exponentials.
    """

    name: str
    processors: int
    clock: float
    shared: int
    registers: int
    issue: tuple[int, int]


LATENCY = 0.8e-6
GPUS = {
    "sm_80": Gpu("A100", 108, 1.41e9, 163 << 10, 65536, (128, 16)),
    "sm_90": Gpu("H200", 132, 1.7e9, 227 << 10, 65536, (128, 16)),
    "sm_100": Gpu("B200", 148, 1.85e9, 227 << 10, 65536, (128, 16)),
    "gfx942": Gpu("MI300X", 304, 2.1e9, 64 << 10, 131072, (64, 16)),
}
SPECIAL = r"MUFU|v_exp_f32|v_rcp_f32|v_log_f32"
MATRIX = r"MMA|mfma"


@dataclass(frozen=True)
class Code:
    """Instructions of a program: those of its loop over the depth, and the rest of a tile."""

    epilogue: int
    special: int
    matrix: int


def code_of(launch: Launch, compiled: triton.compiler.CompiledKernel) -> Code:
    """Count a tile: a loop that multiplies inside of one that holds it, or of the whole program."""
    if "cubin" in compiled.asm:
        text = compile.disassemble(compiled.asm["cubin"], "-sass")
        found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)
        places = {f"{int(address, 16):x}": i for i, (address, _) in enumerate(found)}
        code = [operation for _, operation in found]
        jumps = ((i, re.search(r"BRA.*?0x(\w+)", operation)) for i, operation in enumerate(code))
    else:
        lines = [line.strip() for line in compiled.asm["amdgcn"].splitlines()]
        code = [line for line in lines if re.match(r"(v|s|ds|buffer|global)_|\.LBB", line)]
        places = {match[1]: i for i, line in enumerate(code) if (match := re.match(r"(\.LBB\w+):", line))}
        jumps = ((i, re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)) for i, line in enumerate(code))
    loops = [(places[jump[1]], i + 1) for i, jump in jumps if jump and places.get(jump[1], i) < i]
    multiplying = [loop for loop in loops if _count(code, MATRIX, *loop)]
    first, last = min(multiplying, key=lambda loop: loop[1] - loop[0])
    # Beyond the last return stand the slow paths of waits.
    whole = (0, max(i for i, operation in enumerate(code) if re.search("EXIT|s_endpgm", operation)) + 1)
    around = [(a, b) for a, b in multiplying if a < first and last < b <= whole[1]]
    over_tiles = "STATISTICS" if "statistics" in launch.kernel.__name__ else ""
    start, end = min(around, key=lambda loop: loop[1] - loop[0]) if over_tiles and around else whole
    special = _count(code, SPECIAL, start, end) - _count(code, SPECIAL, first, last)
    return Code(end - start - (last - first), special, _count(code, MATRIX, first, last))


def _count(code: list[str], pattern: str, start: int, end: int) -> int:
    return sum(bool(re.search(pattern, operation)) for operation in code[start:end])


def rows_of(name: str, launcher: Callable[..., object], target: str) -> Iterator[list[str]]:
    """Rows of the table."""
    gpu, rate, bandwidth = GPUS[target], plan.GPUS[target].rates[2], plan.GPUS[target].bandwidth
    for features, vocabulary in SHAPES:
        launches = compile.record(
            partial(launcher, torch.bfloat16, features=features, vocabulary=vocabulary), target, gpu.processors
        )
        launch = next(x for x in launches if "label" not in x.kernel.__name__ and _is_main(x, vocabulary))
        compiled = compile.compile_launch(launch, target)
        used, code, sizes = compile.resources(launch, compiled, target), code_of(launch, compiled), launch.constants
        tile_rows, tile_columns = sizes["ROWS"], sizes["COLUMNS"]
        columns, splits = launch.keywords["columns"], launch.keywords.get("splits")
        blocks, chunks = -(-ROWS // tile_rows), -(-columns // tile_columns)
        per_program = 1 if splits is None else -(-launch.keywords["split_columns"] // tile_columns)
        programs = blocks * (chunks if splits is None else splits)
        lanes = used["num_warps"] * compile.TARGETS[target].warp_size
        resident = min(gpu.registers // (-(-used["registers"] // 8) * 8 * lanes), gpu.shared // used["shared_bytes"])
        resident = max(1, resident)
        product = 2 * tile_rows * tile_columns * features / (rate / gpu.processors)
        issued, special = (
            n * lanes / (m * gpu.clock) for n, m in zip((code.epilogue, code.special), gpu.issue, strict=True)
        )
        alone = product + max(issued, special) + LATENCY
        waves = -(-programs // (gpu.processors * resident))
        compute = waves * per_program * max(resident * product, alone)
        logits = ROWS * columns
        moved = (columns * features * -(-blocks // sizes["GROUP"]) + ROWS * features) * 2
        moved += 2 * logits if launch.keywords.get("sink") is not None else 0
        cached = blocks * chunks * (tile_rows + tile_columns) * features * 2
        floor = 2 * logits * features / rate
        predicted = max(compute, moved / bandwidth)
        yield [
            name, f"{gpu.name} ({target})", f"{features}", f"{columns}", f"{tile_rows}x{tile_columns}x{sizes['DEPTH']}",
            f"{used['registers']}", f"{used['shared_bytes'] >> 10}", f"{resident}", f"{code.matrix}",
            f"{code.epilogue * lanes / (tile_rows * tile_columns):.1f}", f"{moved / 2**30:.2f}",
            f"{cached / predicted / 1e12:.1f}",
            f"{2e-12 * logits * features:.3g}", f"{1e3 * floor:.2f}", f"**{1e3 * predicted:.2f}**",
            f"**{predicted / floor:.2f}**",
        ]  # fmt: skip


def _is_main(launch: Launch, vocabulary: int) -> bool:
    """Whether a launch does the work, and not the look ahead at the first columns."""
    return launch.keywords["columns"] != cases.linear.PROBE or vocabulary == cases.linear.PROBE


KERNELS = {
    "statistics (log-probs only)": cases.linear_statistics,
    "gradient of a slice of 8192": cases.linear_gradient,
    "exponentials (forward and Q at once)": cases.linear_exponentials,
}
HEADER = [
    "kernel", "GPU", "D", "columns", "tile", "registers", "shared KiB", "programs per processor", "matrix instructions",
    "epilogue instructions per logit", "GiB moved", "TB/s from the cache", "TFLOP", "floor, ms", "predicted, ms",
    "of the floor",
]  # fmt: skip


def main() -> None:
    """Print the page."""
    gpus = "\n".join(
        f"- {GPUS[target].name}: {device.rates[2] / 1e12:g} TFLOP/s, {device.bandwidth / 1e12:g} TB/s, figures of "
        f"{device.measured}"
        for target, device in plan.GPUS.items()
    )
    print(f"""# Fused products of the linear head: prediction, not measured

N = {ROWS}, bf16, compiled by Triton {triton.__version__}. Written by `python -m benchmarks.static_head`.

The floor is the vendor's product of the same size, alone. A tile is predicted to take its product at that rate, then
its epilogue (instructions counted in the compiled code, and {LATENCY * 1e6:g} µs for the first loads of the next tile),
which a second program on the processor hides if there is room for one; tiles come in whole waves. That the second-level
cache keeps up is assumed: a column says what it would have to give, and a cache that gives less is the bound instead.

{gpus}
""")
    for cells in (HEADER, ["---"] * len(HEADER)):
        print(f"| {' | '.join(cells)} |")
    for name, launcher in KERNELS.items():
        for target in GPUS:
            for cells in rows_of(name, launcher, target):
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
