"""``python -m benchmarks compare``: the linear head beside its peers, all of them in one run."""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import tables
from benchmarks.compare.plots import draw
from benchmarks.compare.presets import DEFAULT, DTYPES, PRESETS, Preset
from benchmarks.compare.run import FAILS, GATES, RAISED, measure
from benchmarks.measure import check_device, check_rounds, default_device, describe, environment, folder
from fused_pref.cli.peers import PEERS
from fused_pref.cli.usage import UsageError
from fused_pref.testing.problems import LOGITS, WORKS, Sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    names = " ".join(PRESETS)
    parser.add_argument("--preset", nargs="+", metavar="NAME", help=f"sizes by name (default: by device), of {names}")
    parser.add_argument("--shape", metavar="SxTxDxV", help="a size of your own in place of a preset")
    parser.add_argument("--masked", type=float, default=0.0, help="with --shape: share of positions not scored")
    parser.add_argument("--logits", choices=LOGITS, default="random", help="with --shape (default: %(default)s)")
    parser.add_argument("--works", nargs="+", choices=WORKS, metavar="WORK", help=f"of {' '.join(WORKS)}")
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER", help=f"of {' '.join(PEERS)}")
    parser.add_argument("--dtypes", nargs="+", choices=[_name(dtype) for dtype in GATES], help="default: by device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device(), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="begin no table after this time, and cut rounds short")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write CSV, JSON, Markdown and plots, table by table")
    parser.add_argument("--list", action="store_true", help="list presets, works and implementations, and stop")


def run(args: argparse.Namespace) -> int:
    """Print the tables; 1 if this library fails a gate or does not run."""
    if args.list:
        print("\n".join(listing(args.device)))
        return 0
    presets = chosen_presets(args)
    if args.seconds is not None and not args.seconds > 0:
        raise UsageError(f"--seconds must be above 0; got {args.seconds:g}")
    folder(args.out)
    start, machine, rows = time.monotonic(), environment(args.device), []
    deadline = None if args.seconds is None else start + args.seconds
    print(describe(args.device))
    works = {work for *_, work, _ in tables_of(presets, args)}
    for peer in args.peers or ():
        if not any(PEERS[peer].does(work, args.device) for work in works):
            why = PEERS[peer].obstacle(args.device) or f"it does not compute {', '.join(sorted(works))}"
            raise UsageError(f"--peers {peer} has no row here: {why}")
    skipped = 0
    for name, sizes, dtype, work, preset in tables_of(presets, args):
        if deadline is not None and time.monotonic() > deadline:
            skipped += 1
            continue
        peers = [PEERS[peer] for peer in args.peers or preset.peers or PEERS]
        found = measure(
            sizes, getattr(torch, dtype), work, peers, device=args.device, rounds=args.rounds, deadline=deadline
        )
        rows += [{"preset": name, **row} for row in found]
        print("\n".join(tables.section(rows[-len(found) :])), flush=True)
        if args.out is not None:
            tables.save(rows, machine, args.out)
    if skipped:
        print(f"\n{skipped} tables left out: {args.seconds:g} s are over")
    if args.out is not None:
        try:
            draw(rows, args.out / "plots")
        except ImportError as error:
            print(f"no plots: {error}")
    own = {peer.name for peer in PEERS.values() if peer.own}
    ours = [row for row in rows if row["implementation"] in own]
    return int(any(row["status"] in (FAILS, RAISED) for row in ours))


def chosen_presets(args: argparse.Namespace) -> dict[str, Preset]:
    """What is to be measured, by name.

    Raises:
        UsageError: a preset that is not there, or options that exclude each other.
    """
    check_device(args.device)
    check_rounds(args.rounds)
    if args.shape is None:
        if args.masked or args.logits != "random":
            raise UsageError("--masked and --logits need --shape; presets say theirs")
        names = args.preset or [DEFAULT[args.device]]
        unknown = [name for name in names if name not in PRESETS]
        if unknown:
            raise UsageError(f"--preset must be of {', '.join(PRESETS)}; got {unknown[0]!r}")
        large = [name for name in names if PRESETS[name].device == "cuda" != args.device]
        if large:
            raise UsageError(f"--preset {large[0]} is for a GPU, not for --device {args.device}")
        return {name: PRESETS[name] for name in names}
    if args.preset:
        raise UsageError("--shape is in place of --preset; give one of them")
    if not 0 <= args.masked < 1:
        raise UsageError(f"--masked must be at least 0 and below 1; got {args.masked:g}")
    try:
        sizes = replace(Sizes.parse(args.shape), masked=args.masked, logits=args.logits)
    except ValueError as error:
        raise UsageError(error) from error
    return {"own": Preset(args.device, "", (sizes,))}


def tables_of(presets: dict[str, Preset], args: argparse.Namespace) -> list[tuple[str, Sizes, str, str, Preset]]:
    """(preset's name, sizes, dtype, work, preset) of each table, in order."""
    return [
        (name, sizes, dtype, work, preset)
        for name, preset in presets.items()
        for sizes in preset.sizes
        for dtype in args.dtypes or preset.dtypes or DTYPES[args.device]
        for work in args.works or preset.works
    ]


def listing(device: str) -> list[str]:
    """Lines about everything that can be chosen."""
    lines: list[Any] = [describe(device), "", "presets:"]
    lines += [f"  {name:12} {preset.device:5} {preset.summary}" for name, preset in PRESETS.items()]
    lines += ["", "works:", *(f"  {name:14} {work.summary}" for name, work in WORKS.items()), "", "implementations:"]
    for peer in PEERS.values():
        obstacle = peer.obstacle(device)
        lines.append(f"  {peer.name:14} {'here' if obstacle is None else f'absent: {obstacle}'}")
    return lines


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
