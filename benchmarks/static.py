"""Roofline of the logits kernels on an H200 from compiled code alone.

``python benchmarks/static.py > benchmarks/static.md``.

A kernel takes at least as long as each of: moving its bytes, keeping enough of them in flight to cover the latency of
memory, issuing its instructions, and evaluating its special functions. The longest of these is the prediction.
"""

import re
from functools import partial
from typing import NamedTuple

import torch
import triton

from fused_pref.head.spec import Transform
from fused_pref.kernels import cases, compile

ROWS = 8192
# H200. The bandwidth is a measured copy; latency under load and clock are typical. An SM issues to 128 lanes a cycle,
# 16 of which evaluate exponentials and reciprocals.
BANDWIDTH, LATENCY, CLOCK, PROCESSORS = 4.3e12, 0.8e-6, 1.7e9, 132
LANES, SPECIAL_LANES, THREADS, REGISTERS = 128, 16, 2048, 65536

SOFTCAP = Transform(softcap=30.0)
LAUNCHES = {
    "forward, `logits_mean=None`": partial(cases.forward, rows=ROWS),
    'forward, `logits_mean="all"`': partial(cases.forward, rows=ROWS, mean="all"),
    "forward, softcap": partial(cases.forward, rows=ROWS, transform=SOFTCAP),
    "forward, V = 151937": partial(cases.forward, rows=ROWS, columns=151937),
    "backward": partial(cases.backward, rows=ROWS),
    "backward, softcap": partial(cases.backward, rows=ROWS, transform=SOFTCAP),
    "backward, V = 151937": partial(cases.backward, rows=ROWS, columns=151937),
}


class Work(NamedTuple):
    """Instructions of one thread for a row (forward) or a block (backward), and those for the special lanes."""

    instructions: float
    special: float


def work_of(sass: str, passes: float) -> Work:
    """Count a program whose loop over the logits, if it has one, runs ``passes`` times, skipping what it may."""
    code = re.findall(r"/\*([0-9a-f]{4})\*/\s+(.*?);", sass)
    places = {int(address, 16): i for i, (address, _) in enumerate(code)}
    branches = [
        (i, places.get(int(t[1], 16), 0)) for i, (_, op) in enumerate(code) if (t := re.search(r"BRA.*0x(\w+)", op))
    ]
    loads = [i for i, (_, op) in enumerate(code) if "LDG" in op]
    loops = [(start, end) for end, start in branches if start < end and any(start <= i <= end for i in loads)]
    times = [1.0] * len(code)
    for start, end in loops:
        times[start : end + 1] = [passes] * (end + 1 - start)
        for place, target in branches:
            if start < place < target <= end:
                times[place + 1 : target] = [0.0] * (target - place - 1)
    special = sum(n for n, (_, op) in zip(times, code, strict=True) if "MUFU" in op)
    return Work(sum(times), special)


def predict(name: str) -> list[str]:
    """A row of the table."""
    (launch,) = compile.record(lambda: LAUNCHES[name](torch.bfloat16), "sm_90")
    compiled = compile.compile_launch(launch, "sm_90")
    used = compile.resources(launch, compiled, "sm_90")
    columns, block = launch.keywords["columns"], launch.constants["BLOCK"]
    threads = 32 * used["num_warps"]
    backward = "bwd" in launch.kernel.__name__
    work = work_of(compile.disassemble(compiled.asm["cubin"], "-sass"), -(-columns // block))
    entries = block / threads if backward else columns / threads
    logits = ROWS * columns
    programs = min(THREADS // threads, REGISTERS // (-(-used["registers"] // 8) * 8 * threads))
    in_flight = programs * block * 2
    cycles = PROCESSORS * CLOCK
    seconds = {
        "bytes": logits * (4 if backward else 2) / BANDWIDTH,
        "latency": logits * 2 * LATENCY / (in_flight * PROCESSORS),
        "instructions": logits * work.instructions / entries / (LANES * cycles),
        "special": logits * work.special / entries / (SPECIAL_LANES * cycles),
    }
    bound = max(seconds, key=lambda key: seconds[key])
    times = [f"{1e3 * second:.2f}" for second in seconds.values()]
    share = f"{seconds['bytes'] / seconds[bound]:.0%}"
    counts = [str(used["registers"]), str(programs), f"{in_flight >> 10}", f"{work.instructions / entries:.1f}"]
    return [name, *counts, *times, f"**{1e3 * seconds[bound]:.2f}**", bound, share]


PAGE = f"""# Logits kernels on an H200: prediction, not measured

({ROWS}, {cases.VOCABULARY}) bf16 unless a row says otherwise, compiled for sm_90 by Triton {triton.__version__}.
Written by `python benchmarks/static.py`.

Assumed: {BANDWIDTH / 1e12:g} TB/s (a measured copy), {LATENCY * 1e6:g} µs of latency under load, {CLOCK / 1e9:g} GHz,
{PROCESSORS} SMs that issue to {LANES} lanes a cycle, {SPECIAL_LANES} of which evaluate exponentials and reciprocals.
The prediction is the longest of four times that a kernel cannot beat: moving its bytes, keeping enough of them in
flight, issuing its instructions, evaluating its special functions. What does not overlap perfectly adds to it, so the
share of the copy bandwidth is an upper bound.
"""
HEADER = [
    "kernel", "registers", "programs per SM", "KiB in flight per SM", "instructions per logit",
    "bytes, ms", "latency, ms", "instructions, ms", "special, ms", "predicted, ms", "bound by", "of copy bandwidth",
]  # fmt: skip


def main() -> None:
    """Print the page."""
    print(PAGE)
    for cells in (HEADER, ["---"] * len(HEADER), *map(predict, LAUNCHES)):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
