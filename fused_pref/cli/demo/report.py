"""What the demo shows: progress and a table on the console, curves in a PNG."""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fused_pref.cli.demo.history import Check, History, Point


def make_console() -> Console:
    """A console that prints text as it is; without a terminal, plain lines."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def make_progress(console: Console, name: str, steps: int) -> Progress:
    """A bar for one training; shown only where there is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    progress.add_task(name, total=steps)
    return progress


def check_line(check: Check) -> str:
    """Result of the check of the first step."""
    dtype, (loss, gradient) = str(check.dtype).removeprefix("torch."), check.bounds
    return (
        f"  first step in {dtype} against fused_pref.reference in float64, 2 sequences: "
        f"loss off by {check.loss_error:.1e} (at most {loss:.0e}), gradient by {check.gradient_error:.1e} "
        f"(at most {gradient:.0e}): {'ok' if check.holds else 'BAD'}"
    )


def point_line(history: History, point: Point) -> str:
    """Result of one evaluation."""
    loss = f"loss {history.losses[-1]:.3f}, " if history.losses else ""
    heldout = f"held-out accuracy {point.accuracy:.0%}, reward margin {_signed(point.margin)}"
    return f"  step {point.step:>3}: {loss}{heldout}"


def print_results(console: Console, histories: list[History]) -> None:
    """Held-out measures before and after each objective, what they mean, and what was stopped."""
    table = Table("objective", "held-out", "before", "after", box=SIMPLE_HEAD)
    for history in histories:
        first, last = history.points[0], history.points[-1]
        table.add_row(history.objective.name, "accuracy", f"{first.accuracy:.1%}", f"{last.accuracy:.1%}")
        table.add_row("", "reward accuracy", f"{first.reward_accuracy:.1%}", f"{last.reward_accuracy:.1%}")
        table.add_row("", "reward margin", _signed(first.margin), _signed(last.margin), end_section=True)
    console.print(table)
    console.print("accuracy: share of held-out pairs whose chosen completion has the higher log-prob per token.")
    console.print("reward accuracy: share whose chosen completion has the higher reward; ties count half.")
    for history in histories:
        console.print(f"{history.objective.name} reward: {history.objective.reward}; the margin is chosen - rejected.")
    for history in histories:
        if history.stopped:
            console.print(
                f"{history.objective.name} was stopped after {len(history.losses)} of {history.planned} steps "
                "by the wall-clock cap."
            )


def peak_memory(device: torch.device) -> str:
    """Peak memory: of tensors on a CUDA device, else resident memory of the process, where the system tells."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of device memory"
    if sys.platform == "win32":
        return "not measured on Windows"
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**20:,.0f} MiB resident in the process"


def plot(histories: list[History], path: Path) -> None:
    """Training loss, held-out accuracy and held-out reward margin over the steps, one row for each objective."""
    figure = Figure(figsize=(12, 3.4 * len(histories)), layout="constrained")
    rows = figure.subplots(len(histories), 3, squeeze=False)
    for (loss, accuracy, margin), history in zip(rows, histories, strict=True):
        name, points = history.objective.name, history.points
        steps = [point.step for point in points]
        loss.plot(range(1, len(history.losses) + 1), history.losses, color="tab:gray")
        loss.set_title(f"{name}: training loss")
        accuracy.plot(steps, [point.accuracy for point in points], "o-", label="by log-prob per token")
        accuracy.plot(steps, [point.reward_accuracy for point in points], "s--", label="by reward")
        accuracy.axhline(0.5, color="tab:gray", linewidth=0.8, linestyle=":")
        accuracy.set_ylim(0, 1)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
        accuracy.legend(loc="lower right")
        accuracy.set_title(f"{name}: held-out accuracy")
        margin.plot(steps, [point.margin for point in points], "o-", color="tab:green")
        margin.axhline(0.0, color="tab:gray", linewidth=0.8, linestyle=":")
        margin.set_title(f"{name}: held-out reward margin")
        for axes in (loss, accuracy, margin):
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _signed(value: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:+.3f}"
