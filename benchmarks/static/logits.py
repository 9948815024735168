"""Roofline of the logits kernels.

A kernel takes at least as long as each of: moving its bytes, keeping enough of them in flight to cover the latency of
memory, issuing its instructions, and evaluating its special functions. The longest of these is the prediction.
"""

import re
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.static.gpus import GPUS, LATENCY, LOAD, SPECIAL, Listing, lanes_of, table
from fused_pref.cli.kernels import cases, compile
from fused_pref.ops import devices
from fused_pref.ops.interface import Transform

ROWS = 8192
SOFTCAP = Transform("tanh", 1 / 30, 30.0)
LAUNCHES = {
    "forward, `logits_mean=None`": partial(cases.forward, rows=ROWS),
    'forward, `logits_mean="all"`': partial(cases.forward, rows=ROWS, mean="all"),
    "forward, softcap": partial(cases.forward, rows=ROWS, transform=SOFTCAP),
    "forward, V = 151937": partial(cases.forward, rows=ROWS, columns=151937),
    "backward": partial(cases.backward, rows=ROWS),
    "backward, softcap": partial(cases.backward, rows=ROWS, transform=SOFTCAP),
    "backward, V = 151937": partial(cases.backward, rows=ROWS, columns=151937),
}
HEADER = [
    "kernel", "GPU", "registers", "programs per processor", "wide loads", "KiB in flight per processor",
    "instructions per logit", "bytes, ms", "latency, ms", "instructions, ms", "special, ms", "predicted, ms",
    "bound by", "of copy bandwidth",
]  # fmt: skip
INTRODUCTION = f"""
({ROWS}, {cases.VOCABULARY}) bf16 unless a row says otherwise.

The prediction is the longest of four times that a kernel cannot beat: moving its bytes, keeping enough of them in
flight under {LATENCY * 1e6:g} µs of latency, issuing its instructions, evaluating its special functions. What does not
overlap perfectly adds to it, so the share of the copy bandwidth is an upper bound. On the MI300X scalar instructions
are counted as if they took the place of vector ones.
"""


class Work(NamedTuple):
    """Instructions of one thread for a row (forward) or a block (backward), and those for the special lanes."""

    instructions: float
    special: float


def work_of(listing: Listing, passes: float) -> Work:
    """Count a program whose loop over the logits, if it has one, runs ``passes`` times, skipping what it may."""
    code = listing.code
    times = [1.0] * len(code)
    for start, end in listing.loops:
        if not listing.count(LOAD, start, end):
            continue
        times[start:end] = [passes] * (end - start)
        for place, target in listing.branches:
            if start < place < target < end:
                times[place + 1 : target] = [0.0] * (target - place - 1)
    special = sum(n for n, operation in zip(times, code, strict=True) if re.search(SPECIAL, operation))
    return Work(sum(times), special)


def predict(name: str, target: str) -> list[str]:
    """A row of the table."""
    gpu, bandwidth = GPUS[target], devices.GPUS[target].bandwidth
    (launch,) = compile.record(lambda: LAUNCHES[name](torch.bfloat16), target)
    compiled = compile.compile_launch(launch, target)
    used = compile.resources(launch, compiled, target)
    columns, block = launch.keywords["columns"], launch.constants["BLOCK"]
    threads = lanes_of(used, target)
    backward = "bwd" in launch.kernel.__name__
    work = work_of(Listing.of(compiled), -(-columns // block))
    entries = block / threads if backward else columns / threads
    logits, programs = ROWS * columns, gpu.programs(used, threads)
    in_flight = programs * block * 2
    cycles, (lanes, special_lanes) = gpu.processors * gpu.clock, gpu.issue
    seconds = {
        "bytes": logits * (4 if backward else 2) / bandwidth,
        "latency": logits * 2 * LATENCY / (in_flight * gpu.processors),
        "instructions": logits * work.instructions / entries / (lanes * cycles),
        "special": logits * work.special / entries / (special_lanes * cycles),
    }
    bound = max(seconds, key=lambda key: seconds[key])
    counts = [f"{used['registers']}", f"{programs}", f"{used['wide_loads']}", f"{in_flight >> 10}"]
    times = [f"{1e3 * second:.2f}" for second in seconds.values()]
    share = f"{seconds['bytes'] / seconds[bound]:.0%}"
    named = [name, f"{gpu.name} ({target})", *counts, f"{work.instructions / entries:.1f}"]
    return [*named, *times, f"**{1e3 * seconds[bound]:.2f}**", bound, share]


def page(targets: list[str]) -> str:
    """What is assumed, and the table."""
    return INTRODUCTION + "\n" + table(HEADER, [predict(name, target) for target in targets for name in LAUNCHES])
