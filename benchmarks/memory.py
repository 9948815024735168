"""``python -m benchmarks memory``: workspace against tokens, of the linear head and its peers; nothing is timed.

Every implementation is held against float64 first, as in ``compare``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.run import GATES, OK, admitted
from benchmarks.compare.tables import line
from benchmarks.measure import check_device, default_device, describe, folder, write
from fused_pref.cli import figures
from fused_pref.cli.explanation import MODELS
from fused_pref.cli.peers import PEERS
from fused_pref.cli.usage import UsageError
from fused_pref.testing.problems import WORKS, Problem, Sizes

WORK, SEQUENCES, TOKENS = "cpo", 8, (256, 512, 1024, 2048, 4096)
# (D, V), N: to see that it runs.
SMALL = (16, 1000), (16, 32, 64)
# The name in the plot, colour and marker of each that can be drawn.
LINES = {
    "eager": ("eager PyTorch", figures.RED, "s"),
    "liger_pairs": ("Liger, a pair at a time", figures.GREEN, "^"),
    "fused_pref": ("fused_pref", figures.BLUE, "o"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m", help="D and V; default: %(default)s")
    many = " ".join(map(str, TOKENS))
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N", help=f"default: {many}")
    dtypes = [str(dtype).removeprefix("torch.") for dtype in GATES]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device(), help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write memory.md and memory.svg")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if this library fails its gate or does not run."""
    check_device(args.device)
    shape, tokens = SMALL if args.small else (MODELS[args.model], args.tokens)
    wrong = [number for number in tokens if number < SEQUENCES or number % SEQUENCES]
    if wrong:
        raise UsageError(f"--tokens must be multiples of {SEQUENCES}, which are that many sequences; got {wrong[0]}")
    folder(args.out)
    sizes = f"{args.dtype}, D={shape[0]}, V={shape[1]}"
    page = [
        f"# Workspace against tokens\n\nWritten by `python -m benchmarks memory`: {describe(args.device)}.",
        f"{WORKS[WORK].summary}; {sizes}, {SEQUENCES} sequences, every position scored. Peak of what a forward and",
        "backward allocate, less the gradients that they return, in MiB.\n",
        line(["N", *LINES, ""]),
        line(["---"] * (len(LINES) + 2)),
    ]
    print("\n".join(page), flush=True)
    rows: list[dict[str, Any]] = []
    for number in sorted(set(tokens)):
        found = measure(Sizes(SEQUENCES, number // SEQUENCES, *shape), getattr(torch, args.dtype), args.device)
        rows += found
        page.append(cells(found))
        print(page[-1], flush=True)
    if args.out is not None:
        write(args.out / "memory.md", "\n".join(page) + "\n")
        try:
            draw(rows, sizes, args.out / "memory.svg")
        except ImportError as error:
            print(f"no plot: {error}")
    return int(any(row["status"] != OK for row in rows if row["implementation"] == "fused_pref"))


def measure(sizes: Sizes, dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """A row for each implementation: tokens, status, note, and where it ran ``workspace_bytes``."""
    problem = Problem.make(sizes, dtype, device)
    found = admitted(WORKS[WORK], WORK, problem, [PEERS[name] for name in LINES])
    return [{"tokens": sizes.tokens, "implementation": name, **found[name].row} for name in LINES]


def cells(rows: list[dict[str, Any]]) -> str:
    """A line of the table: a size."""
    numbers = [f"{row['workspace_bytes'] / 2**20:.0f}" if "workspace_bytes" in row else row["status"] for row in rows]
    notes = [f"{row['implementation']} {row['status']}: {row['note']}" for row in rows if row["status"] != OK]
    return line([f"{rows[0]['tokens']}", *numbers, "; ".join(notes).replace("|", "\\|")])


def draw(rows: list[dict[str, Any]], sizes: str, path: Path) -> None:
    """Write the plot: a line for each implementation that ran.

    Raises:
        ImportError: without matplotlib.
    """
    ran = [row for row in rows if "workspace_bytes" in row]
    with figures.figure(path, 7.6, 4.0) as figure:
        panel = figure.subplots()
        ends = {}
        for name, (_, colour, marker) in LINES.items():
            points = [(row["tokens"], row["workspace_bytes"] / 2**20) for row in ran if row["implementation"] == name]
            if points:
                panel.plot(*zip(*points, strict=True), marker=marker, color=colour, linewidth=2)
                ends[name] = points[-1]
        panel.set(xlim=(0, None), ylim=(0, None), xlabel="scored tokens N", ylabel="peak workspace, MiB")
        # Names at the ends of their lines, moved up where they would touch.
        height, free = 0.11 * panel.get_ylim()[1], 0.0
        for name, (tokens, size) in sorted(ends.items(), key=lambda end: end[1][1]):
            place = max(size, free + height / 2)
            free = place + height / 2
            label, colour, _ = LINES[name]
            panel.annotate(
                f"{label}\n{size:,.0f} MiB", (tokens, place), (8, 0), textcoords="offset points", va="center",
                color=colour, fontweight="bold", annotation_clip=False,
            )  # fmt: skip
        ticks = sorted({row["tokens"] for row in rows})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.set_title(f"CPO, forward and backward; {sizes}", loc="left", fontsize=10)
        panel.grid(alpha=0.25)
