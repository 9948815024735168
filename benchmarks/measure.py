"""What every benchmark shares: the machine's description, times, peak memory, and copies to hold times against."""

import functools
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from fused_pref.cli import files
from fused_pref.cli.usage import UsageError
from fused_pref.ops.backend import architecture

ROOT = Path(__file__).resolve().parent.parent
# The profiler announces on standard error that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# The least rounds that a median is taken of, however little time is left.
LEAST_ROUNDS = 3
T = TypeVar("T")


def environment(device: str) -> dict[str, Any]:
    """The machine and the software, for every file of results."""
    try:
        import triton

        version: str | None = triton.__version__
    except ImportError:
        version = None
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if commit and _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{_processor()} CPU",
        "architecture": architecture(torch.device(device)) if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader,nounits"),
        "torch": torch.__version__,
        "triton": version,
        "commit": commit,
    }


def describe(device: str) -> str:
    """The environment in a line."""
    return ", ".join(f"{name} {value}" for name, value in environment(device).items() if value is not None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """First line that a program prints; None where there is no such program, or where it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0] or None if done.returncode == 0 else None


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_rounds(rounds: int) -> None:
    """Refuse to measure nothing.

    Raises:
        UsageError: no rounds.
    """
    if rounds < 1:
        raise UsageError(f"--rounds must be at least 1; got {rounds}")


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a GPU; PyTorch finds none")


def folder(out: Path | None) -> None:
    """Make the folder of ``--out``, and see that it can be written before there is anything to write.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        if out is not None:
            files.make_folder(out)
    except OSError as error:
        raise UsageError(f"--out must be a directory that can be written; got {out} ({error})") from error


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    """A bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, leave=False, disable=None)


def write(path: Path, text: str) -> None:
    """Replace a file as a whole: what is there is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, text.encode())


def finish(device: str) -> None:
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], device: str) -> float:
    """Wall-clock time of a step, launches and the wait for the device included."""
    finish(device)
    start = time.perf_counter()
    step()
    finish(device)
    return time.perf_counter() - start


def alternate(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: str, description: str, deadline: float | None = None
) -> dict[str, list[float]]:
    """Seconds of each step in each round; the rounds alternate, so that what disturbs one disturbs all.

    Args:
        steps: by name; each has run before.
        rounds: how many.
        device: what to wait for.
        description: of the progress bar.
        deadline: of ``time.monotonic()``, after which no round begins but the first :data:`LEAST_ROUNDS`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in progress(range(rounds), description):
        if number >= LEAST_ROUNDS and deadline is not None and time.monotonic() > deadline:
            break
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device))
    return seconds


def quantile(values: list[float], share: float) -> float:
    """The value below which this share of them lies."""
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors alive at once that ``step`` allocated, as the allocator saw them."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@functools.cache
def copy_seconds(nbytes: int, device: str) -> float:
    """Median time of a plain copy that moves ``nbytes``, half of them read and half written."""
    source = torch.ones(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    times = [seconds_of(lambda: out.copy_(source), device) for _ in range(9)]
    return statistics.median(times[2:])
