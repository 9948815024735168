"""The two forms of the loop over vocabulary tiles, by their PTX: what is set up how often, and its predicted cost."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.static.gpus import GPUS, LATENCY, lanes_of, table
from benchmarks.static.head import SHAPES, code_of
from fused_pref.cli.kernels import cases, compile
from fused_pref.ops import devices

# Whose loads have a pipeline that is set up; columns of their tensor memory.
TARGETS, TENSOR_MEMORY = ("sm_90", "sm_100"), 512
INIT, BARRIER = r"\bmbarrier\.init\b", r"\bbar\.sync\b"
MULTIPLY = r"\bwgmma\.mma_async|\btcgen05\.mma\b"
LOAD = r"\bcp\.async\.bulk\.tensor|\bcp\.async\.c[ag]\b"


@dataclass(frozen=True)
class Code:
    """Lines of PTX, and first and last line of every loop."""

    lines: list[str]
    loops: list[tuple[int, int]]

    @classmethod
    def of(cls, ptx: str) -> "Code":
        """A loop is a jump back to a label."""
        lines = ptx.splitlines()
        labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\$L\w+):", line))}
        jumps = ((i, re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)) for i, line in enumerate(lines))
        return cls(lines, [(labels[jump[1]], i) for i, jump in jumps if jump and labels.get(jump[1], i) < i])

    @property
    def step(self) -> tuple[int, int]:
        """The innermost loop that multiplies; of a flattened one with what the end of a tile adds."""
        multiplying = [loop for loop in self.loops if self.count(MULTIPLY, loop)]
        start = max(start for start, _ in multiplying)
        return start, max(end for first, end in multiplying if first == start)

    def count(self, pattern: str, lines: tuple[int, int] | None = None) -> int:
        """Lines that match, of all or from one to another."""
        first, last = lines or (0, len(self.lines))
        return sum(bool(re.search(pattern, line)) for line in self.lines[first : last + 1])

    def in_loops(self, pattern: str) -> int:
        """Lines that match in any loop."""
        inside = {i for first, last in self.loops for i in range(first, last + 1)}
        return sum(i in inside and bool(re.search(pattern, line)) for i, line in enumerate(self.lines))


HEADER = [
    "GPU", "D", "form", "registers", "spills", "tensor memory", "programs per processor", "set-ups in a loop",
    "barriers of a step", "beside them, of a tile", "predicted, of the product",
]  # fmt: skip
INTRODUCTION = f"""
The statistics of bf16 rows read by descriptor. *nested* sets up its pipeline for every tile, *flattened* once
(`fused_pref/ops/triton/mainloop.py`). A tile is predicted as above; *flattened* waits for no first loads of a tile
({LATENCY * 1e6:g} µs), and its epilogue is taken to be that of *nested*, whose arithmetic is the same.

*nested* is the default. On sm_90 the model prefers *flattened* by less than 2% at D=4096, which is less than it can
tell; on sm_100 it prefers *nested*, because Triton gives *flattened* two accumulators, with which one program fills the
tensor memory. `python -m fused_pref tune` measures both.
"""


def rows_of(target: str) -> Iterator[list[str]]:
    """Rows of the table."""
    gpu, rate = GPUS[target], devices.GPUS[target].rates[2]
    for features, vocabulary in SHAPES:
        call = partial(cases.linear_statistics, features=features, vocabulary=vocabulary, by_index=False)
        epilogue = 0
        for form, launcher in (("nested", call), ("flattened", partial(cases.in_one_loop, call))):
            launches = compile.record(partial(launcher, torch.bfloat16), target, gpu.processors)
            launch = next(x for x in launches if x.kernel.__name__ == "_linear_statistics_kernel")
            compiled = compile.compile_launch(launch, target)
            used, code = compile.resources(launch, compiled, target), Code.of(compiled.asm["ptx"])
            columns = getattr(compiled.metadata, "tmem_size", 0) or 0
            lanes = lanes_of(used, target)
            resident = min(gpu.programs(used, lanes), TENSOR_MEMORY // columns if columns else TENSOR_MEMORY)
            epilogue = epilogue or code_of(launch, compiled).epilogue
            sizes = launch.constants
            product = 2 * sizes["ROWS"] * sizes["COLUMNS"] * features / (rate / gpu.processors)
            alone = product + epilogue * lanes / (gpu.issue[0] * gpu.clock) + (LATENCY if form == "nested" else 0)
            barriers = code.count(BARRIER, code.step)
            beside = code.in_loops(BARRIER) - barriers
            yield [
                f"{gpu.name} ({target})", f"{features}", form, f"{used['registers']}", f"{used['spills']}",
                f"{columns}", f"{resident}", f"{code.in_loops(INIT)}", f"{barriers}", f"{beside}",
                f"**{max(resident * product, alone) / (resident * product):.3f}**",
            ]  # fmt: skip


def page(targets: list[str]) -> str:
    """What is assumed, and the table."""
    rows = [cells for target in targets if target in TARGETS for cells in rows_of(target)]
    return INTRODUCTION + "\n" + table(HEADER, rows)
