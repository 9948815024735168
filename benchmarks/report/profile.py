"""The slowest kernels of a CPO step: ``python -m benchmarks.report.profile``, which the report runs."""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.compare.presets import PRESETS
from benchmarks.measure import default_device, finish, write
from fused_pref.cli.peers import PEERS
from fused_pref.testing.parity import evaluate
from fused_pref.testing.problems import WORKS, Problem

SIZES = {"cuda": "qwen3-8b", "cpu": "tiny"}
# Kernels that ncu looks at, of those that take the most time.
SLOWEST = 4


def main() -> int:
    """Exit status: that of ncu with ``--ncu``, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report.profile", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--ncu", action="store_true", help="run Nsight Compute on the kernels that were found slowest")
    parser.add_argument("--once", action="store_true", help="only run the step, as ncu needs it")
    args = parser.parse_args()
    if args.ncu:
        return nsight(args.out)
    sizes = PRESETS[SIZES[args.device]].sizes[0]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    work = WORKS["cpo"]
    problem = Problem.make(sizes, dtype, args.device).of(work.gradients)
    step = partial(evaluate, PEERS["fused_pref"].load(work.objective), problem)
    step()
    finish(args.device)
    if args.once:
        return 0
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        finish(args.device)
    key = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    averages = profile.key_averages()
    text = averages.table(sort_by=key, row_limit=20, max_name_column_width=80)
    print(text)
    write(args.out / "profile.txt", f"linear_cpo_loss, {sizes}\n{text}\n")
    kernels = [event for event in averages if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    write(args.out / "slowest.txt", "".join(f"{event.key}\n" for event in kernels[:SLOWEST]))
    profile.export_chrome_trace(str(args.out / "trace.json"))
    return 0


def nsight(out: Path) -> int:
    """Nsight Compute's report of the kernels in ``slowest.txt``, one launch of each."""
    status = 0
    for number, name in enumerate((out / "slowest.txt").read_text().splitlines()):
        command = ["ncu", "--set", "full", "--kernel-name-base", "demangled", "--kernel-name", name]
        command += ["--launch-count", "1", "--force-overwrite", "--export", str(out / f"ncu-{number}")]
        step = [sys.executable, "-m", "benchmarks.report.profile", "--once", "--device", "cuda", "--out", str(out)]
        status = max(status, subprocess.run([*command, *step], check=False).returncode)
    return status


if __name__ == "__main__":
    sys.exit(main())
