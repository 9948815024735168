"""What the code of every kernel uses, over all the cases in which it is compiled."""

from itertools import groupby
from typing import Any

from benchmarks.static.gpus import GPUS, lanes_of, table
from fused_pref.cli.kernels.report import compile_all

HEADER = [
    "kernel", "GPU", "cases", "registers", "shared KiB", "programs per processor", "of threads", "matrix instructions",
    "wide loads", "spills",
]  # fmt: skip
INTRODUCTION = """
Over all cases and dtypes of `python -m fused_pref kernels`, which lists each: the most registers of a thread and bytes
of shared memory, the fewest programs that a processor holds and their share of the threads that it could hold, the
fewest and most matrix instructions and 128-bit loads in the code, and what is spilled.
"""


def page(targets: list[str]) -> str:
    """What is counted, and the table."""

    def place(row: dict[str, Any]) -> tuple[str, int]:
        return row["kernel"], targets.index(row["target"])

    rows = sorted(compile_all(targets), key=place)
    return INTRODUCTION + "\n" + table(HEADER, [_row(list(group)) for _, group in groupby(rows, key=place)])


def _row(rows: list[dict[str, Any]]) -> list[str]:
    target = rows[0]["target"]
    gpu = GPUS[target]
    held = [(gpu.programs(row, lanes_of(row, target)), lanes_of(row, target)) for row in rows]
    programs, lanes = min(held, key=lambda pair: pair[0] * pair[1])
    spans = [
        f"{low}" if low == high else f"{low}-{high}"
        for low, high in (
            (min(row[key] for row in rows), max(row[key] for row in rows))
            for key in ("matrix_instructions", "wide_loads")
        )
    ]
    most = {key: max(row[key] for row in rows) for key in ("registers", "shared_bytes", "spills")}
    name = rows[0]["kernel"].strip("_").removesuffix("_kernel")
    sizes = [f"{most['registers']}", f"{most['shared_bytes'] / 2**10:.0f}", f"{programs}"]
    return [name, f"{gpu.name} ({target})", f"{len(rows)}", *sizes, f"{programs * lanes / gpu.threads:.0%}", *spans,
            f"{most['spills']}"]  # fmt: skip
