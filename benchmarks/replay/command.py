"""``python -m benchmarks replay``: what every plan and loss launches and allocates on GPUs that need not be there."""

import argparse

from benchmarks.replay.calls import CALLS, FEATURES, PROCESSORS, SCORED, SEQUENCES, VOCABULARY, Replayed, replay
from benchmarks.static.gpus import GPUS, table
from fused_pref.cli.kernels import compile
from fused_pref.cli.kernels.report import compile_obstacle
from fused_pref.cli.usage import UsageError

HEADER = ["call", "plan", "operations", "kernels", "waits", "allocated, MiB", "peak, MiB", "workspace, MiB"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--target", choices=PROCESSORS, default="sm_90", help="default: %(default)s")
    parser.add_argument("--calls", default="", metavar="TEXT", help="only calls whose name contains this")
    parser.add_argument("--compile", action="store_true", help="compile every launch, and show its shared memory")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a launch needs more shared memory than there is.

    Raises:
        UsageError: no call of that name, or nothing can be compiled here.
    """
    calls = [call for call in CALLS if args.calls in call.name]
    if not calls:
        raise UsageError(f"--calls must be part of a name; got {args.calls!r}")
    obstacle = compile_obstacle() if args.compile else None
    if obstacle:
        raise UsageError(obstacle)
    gpu = GPUS[args.target]
    print(f"{gpu.name} ({args.target}); N = {SEQUENCES * SCORED} in {SEQUENCES} sequences, D = {FEATURES}, "
          f"V = {VOCABULARY}, bf16; forward and backward")  # fmt: skip
    replayed = [replay(call, args.target) for call in calls]
    shared = [[shared_bytes(one, args.target)] if args.compile else [] for one in replayed]
    header = [*HEADER, "shared, KiB"] if args.compile else HEADER
    rows = [[*row(one), *(f"{size >> 10}" for size in sizes)] for one, sizes in zip(replayed, shared, strict=True)]
    print(table(header, rows))
    return int(any(size > gpu.shared for sizes in shared for size in sizes))


def row(replayed: Replayed) -> list[str]:
    """A row of the table."""
    machine, plan = replayed.machine, replayed.plan
    name = "" if plan is None else f"{plan.name}, fused" if plan.fused else plan.name
    workspace = "" if plan is None else f"{plan.workspace / 2**20:.0f}"
    counts = [len(machine.operations), len(machine.launches), len(machine.waits)]
    peak = (machine.peak - replayed.returned) / 2**20
    return [replayed.call.name, name, *map(str, counts), f"{machine.allocated / 2**20:.0f}", f"{peak:.0f}", workspace]


def shared_bytes(replayed: Replayed, target: str) -> int:
    """The most shared memory that a program of a call's launches has, once they are compiled."""
    return max(
        (compile.compile_launch(one.launch, target).metadata.shared for one in replayed.machine.launches), default=0
    )
