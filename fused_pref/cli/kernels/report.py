"""``python -m fused_pref kernels``: what every kernel compiles to, for GPUs that need not be there."""

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import fused_pref.ops.triton
from fused_pref.cli.usage import UsageError
from fused_pref.ops import backend
from fused_pref.ops.devices import GPUS

TARGETS = ",".join(GPUS)
COLUMNS = {
    "kernel": "kernel",
    "case": "case",
    "target": "target",
    "dtype": "dtype",
    "config": "config",
    "num_warps": "warps",
    "registers": "regs",
    "stack_bytes": "stack",
    "spills": "spills",
    "shared_bytes": "shared",
    "matrix_instructions": "matrix",
    "wide_loads": "wide ld",
    "wide_stores": "wide st",
    "read_per_entry": "read",
    "written_per_entry": "written",
}
DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

EPILOG = """\
One row for each kernel, case, dtype and target: registers, bytes on the stack, spills, shared memory,
matrix instructions, and wide loads and stores. The exit status is 1 if a kernel spills registers.

examples:
  %(prog)s --targets sm_90 --cases "by index"
  %(prog)s --json > kernels.json

Without --cases this takes minutes. See benchmarks/static.md for what the results mean.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--targets", default=TARGETS, help=f"GPU architectures, separated by commas (default: {TARGETS})"
    )
    parser.add_argument(
        "--cases", default="", metavar="TEXT", help="only cases whose name contains TEXT (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array, not a table")


def run(args: argparse.Namespace) -> int:
    """Print a row per kernel, case, dtype and target; 1 if one spills or a kernel has no case."""
    targets = args.targets.split(",")
    unknown = sorted(set(targets) - set(TARGETS.split(",")))
    if unknown:
        raise UsageError(f"argument --targets: must be of {TARGETS}; got {', '.join(map(repr, unknown))}")
    obstacle = compile_obstacle()
    if obstacle:
        raise UsageError(f"kernels cannot be compiled: {obstacle}")
    rows = compile_all(targets, args.cases)
    if not rows:
        raise UsageError(f"argument --cases: no case has {args.cases!r} in its name")
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(table(rows))
    missing = [] if args.cases else sorted(kernel_names() - {row["kernel"] for row in rows})
    spilling = [row for row in rows if row["stack_bytes"] or row["spills"]]
    for kernel in missing:
        print(f"kernels: {kernel} has no case in fused_pref/cli/kernels/cases.py", file=sys.stderr)
    for row in spilling:
        print(f"kernels: {row['kernel']} ({row['case']}, {row['dtype']}) spills on {row['target']}", file=sys.stderr)
    return 1 if missing or spilling else 0


def kernel_names() -> set[str]:
    """Every kernel of the package, by the name that ends in ``_kernel``."""
    from triton.runtime.jit import JITFunction

    names = set()
    for module in pkgutil.walk_packages(fused_pref.ops.triton.__path__, "fused_pref.ops.triton."):
        members = vars(importlib.import_module(module.name)).items()
        names |= {name for name, value in members if name.endswith("_kernel") and isinstance(value, JITFunction)}
    return names


def compile_all(targets: list[str], names: str = "") -> list[dict[str, Any]]:
    """The rows of all cases on these targets, or of those with ``names`` in their name, compiled on all processors."""
    from fused_pref.cli.kernels.cases import CASES

    tasks = [
        (i, dtype, target)
        for i, case in enumerate(CASES)
        if names in case.name
        for dtype in case.dtypes
        for target in targets
    ]
    if not tasks:
        return []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")) as pool:
        return [row for rows in pool.map(_compile_case, *zip(*tasks, strict=True)) for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned text: numbers to the right."""
    cells = [list(COLUMNS.values()), *([_cell(row[key]) for key in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [not isinstance(rows[0][key], str) for key in COLUMNS]
    lines = [
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(*line, strict=True))
        for line in ((row, widths, right) for row in cells)
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _compile_case(index: int, dtype: torch.dtype, target: str) -> list[dict[str, Any]]:
    from fused_pref.cli.kernels import cases, compile

    case = cases.CASES[index]
    rows = []
    launches = {(x.kernel.__name__, x.flags): x for x in compile.record(lambda: case.launch(dtype), target)}
    for (kernel, flags), launch in launches.items():
        row = {"kernel": kernel, "case": case.name, "target": target, "config": flags}
        row["dtype"] = DTYPES[str(dtype).removeprefix("torch.")]
        try:
            rows.append(row | compile.resources(launch, compile.compile_launch(launch, target), target))
        except Exception as error:
            raise RuntimeError(f"{' '.join(row.values())} does not compile") from error
    return rows


def compile_obstacle() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    obstacle = backend.triton_obstacle(torch.device("cuda"))
    if obstacle is None:
        from triton import knobs

        if knobs.runtime.interpret:
            return "TRITON_INTERPRET is set, and an interpreted function cannot be compiled: run this without it"
    return obstacle
