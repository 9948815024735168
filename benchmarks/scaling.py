"""``python -m benchmarks scaling``: how the linear head grows with N, V and D, and what a call launches.

One pair of sequences, so that one plan serves every N.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fused_pref as fp
from benchmarks import launches
from benchmarks.compare.tables import line
from benchmarks.measure import (
    alternate,
    check_device,
    check_rounds,
    default_device,
    describe,
    environment,
    folder,
    quantile,
    write,
)
from fused_pref.cli.peers import bare_products
from fused_pref.testing.problems import BETA, WORKS, Problem, Sizes

MEASURED = ("cpo", "frozen", "logps")
# (N, D, V) of each axis: by device, and small ones to see that it runs.
AXES: dict[str, dict[str, list[tuple[int, int, int]]]] = {
    "cpu": {
        "N": [(n, 1024, 16384) for n in (512, 1024, 2048, 4096, 8192, 16384)],
        "V": [(1024, 512, v) for v in (8192, 16384, 32768, 65536)],
        "D": [(1024, d, 8192) for d in (512, 1024, 2048, 4096)],
    },
    "cuda": {
        "N": [(n, 4096, 131072) for n in (512, 1024, 2048, 4096, 8192, 16384)],
        "V": [(8192, 4096, v) for v in (32768, 65536, 131072, 262144)],
        "D": [(8192, d, 131072) for d in (1024, 2048, 4096, 8192)],
    },
    "small": {
        "N": [(n, 16, 512) for n in (64, 128, 256)],
        "V": [(64, 16, v) for v in (512, 1024)],
        "D": [(64, d, 512) for d in (16, 32)],
    },
}
PLACE = {"N": 0, "D": 1, "V": 2}
# More than the logits of any of the sizes.
BUDGET = 2**36
HEADER = ("N", "D", "V", "ms", "p10-p90", "of the floor", "ns per unit", "of the last", "launches")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--works", nargs="+", choices=MEASURED, default=list(MEASURED), help="default: all of them")
    parser.add_argument("--axes", nargs="+", choices=PLACE, default=list(PLACE), help="default: all of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write scaling.md and scaling.json, axis by axis")


def run(args: argparse.Namespace) -> int:
    """Print a table for each kind of work and axis."""
    check_device(args.device)
    check_rounds(args.rounds)
    folder(args.out)
    if args.device == "cpu":
        # For the launches, which are counted and not run.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    page, rows = [f"{describe(args.device)}; {dtype}"], []
    print(page[0])
    for work in args.works:
        for axis in args.axes:
            found = measure(work, axis, AXES["small" if args.small else args.device][axis], dtype, args)
            rows += found
            lines = ["", f"{work}, per {axis}:", "", line(HEADER), line(["---"] * len(HEADER)), *map(cells, found)]
            print("\n".join(lines), flush=True)
            page += lines
            if args.out is not None:
                write(args.out / "scaling.md", "\n".join(page) + "\n")
                results = {"machine": environment(args.device), "rows": rows}
                write(args.out / "scaling.json", json.dumps(results, indent=1) + "\n")
    return 0


def measure(
    work: str, axis: str, sizes: list[tuple[int, int, int]], dtype: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each size, in alternating rounds."""
    problems = {f"{n}": problem_of(each, work, dtype, args.device) for n, each in enumerate(sizes)}
    steps: dict[str, Callable[[], object]] = {name: step_of(problem) for name, problem in problems.items()}
    floors = {f"{name}, bare": bare_products(problem) for name, problem in problems.items()}
    for step in (*steps.values(), *floors.values()):
        step()
    times = alternate({**steps, **floors}, args.rounds, args.device, f"{work}, {axis}")
    units = [each[PLACE[axis]] for each in sizes]
    per_unit = [statistics.median(times[name]) / unit for name, unit in zip(steps, units, strict=True)]
    rows = []
    for name, each, unit_seconds in zip(steps, sizes, per_unit, strict=True):
        row: dict[str, Any] = {"work": work, "axis": axis, **dict(zip(("N", "D", "V"), each, strict=True))}
        row |= {"ms": [1e3 * second for second in times[name]], "ns_per_unit": 1e9 * unit_seconds}
        row["of_floor"] = statistics.median(times[name]) / statistics.median(times[f"{name}, bare"])
        rows.append(row | {"of_last": unit_seconds / per_unit[-1], "launches": launches_of(problems[name])})
    return rows


def problem_of(sizes: tuple[int, int, int], work: str, dtype: str, device: str) -> Problem:
    """One pair of sequences, every position scored."""
    tokens, features, vocabulary = sizes
    problem = Problem.make(Sizes(2, tokens // 2, features, vocabulary), getattr(torch, dtype), device)
    return problem.of(WORKS[work].gradients)


def step_of(p: Problem, **keywords: Any) -> Callable[[], None]:
    """A forward, and a backward where gradients are wanted."""
    common: dict[str, Any] = {"shift": False, "memory_budget": BUDGET, **keywords}
    tensors, leaves = (p.hidden, p.weight, p.labels), tuple(p.leaves.values())

    def evaluation() -> None:
        with torch.no_grad():
            fp.linear_sequence_logps(*tensors, **common)

    def training() -> None:
        torch.autograd.grad(fp.linear_cpo_loss(*tensors, beta=BETA, logits_mean=None, **common).loss, leaves)

    return training if leaves else evaluation


def launches_of(problem: Problem) -> int | None:
    """What a call launches; without a GPU, what it would on an H200, None where Triton is not installed."""
    if problem.hidden.is_cuda:
        return launches.on_gpu(step_of(problem))
    try:
        return launches.without_gpu(step_of(problem, backend="triton"))
    except (ImportError, ValueError):
        return None


def cells(row: dict[str, Any]) -> str:
    """A line of the table."""
    least, most = (quantile(row["ms"], share) for share in (0.1, 0.9))
    numbers = [f"{statistics.median(row['ms']):.1f}", f"{least:.1f}-{most:.1f}", f"{row['of_floor']:.2f}"]
    numbers.append(f"{row['ns_per_unit']:.4g}")
    launched = "" if row["launches"] is None else f"{row['launches']}"
    return line([f"{row['N']}", f"{row['D']}", f"{row['V']}", *numbers, f"{row['of_last']:.2f}", launched])
