"""The sections of the report: each is a list of commands, or the reason why there is nothing to run."""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fused_pref.ops import backend

# Presets of a GPU, what matters most first; where there is none, small ones.
PRESETS = {
    "cuda": ("qwen3-8b", "llama-3-8b", "masked", "small-head", "gemma-2-2b", "peaked", "long", "liger", "n", "v", "d"),
    "cpu": ("tiny",),
}
# On a CPU the report is there to see that it runs: little, and nothing that is compiled first.
SMALL = ("--peers", "fused_pref", "eager", "cce", "--works", "cpo", "logps", "--dtypes", "float32", "--rounds", "3")
# On a GPU the kinds of work that differ most, so that there is time for more sizes.
OPTIONS = {"cuda": ("--works", "cpo", "frozen", "logps", "cross_entropy"), "cpu": SMALL}


@dataclass(frozen=True)
class Context:
    """Where the report is made."""

    device: str
    out: Path

    @property
    def measured(self) -> list[Path]:
        """What ``compare`` has written so far."""
        return sorted(self.out.glob("compare-*/compare.json"))


@dataclass(frozen=True)
class Command:
    """Something to run in a process of its own, so that nothing it does can harm the rest.

    Attributes:
        name: of its log.
        argv: what to run; ``{seconds}`` stands for the time it has.
        least: seconds below which it is not begun.
    """

    name: str
    argv: tuple[str, ...]
    least: float = 5.0


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        summary: in words.
        commands: by context, what to run; a string says why something is not.
        share: of the time that is left, against the shares of the sections that follow.
    """

    summary: str
    commands: Callable[[Context], Iterator[Command | str]] = field(repr=False)
    share: float


def python(name: str, *argv: str, least: float = 5.0) -> Command:
    """A command of this interpreter."""
    return Command(name, (sys.executable, *argv), least)


def environment(context: Context) -> Iterator[Command | str]:
    """Hardware, driver and packages."""
    yield python("machine", "-m", "benchmarks", "compare", "--list", "--device", context.device)
    yield python("packages", "-m", "torch.utils.collect_env")
    if shutil.which("nvidia-smi"):
        yield Command("nvidia-smi", ("nvidia-smi", "-q"))


def parity(context: Context) -> Iterator[Command | str]:
    """Every objective against the reference."""
    yield python("doctor", "-m", "fused_pref", "doctor")


def tests(context: Context) -> Iterator[Command | str]:
    """The tests that need a GPU."""
    if context.device != "cuda":
        yield "there is no GPU"
    elif importlib.util.find_spec("pytest") is None:
        yield "pytest is not installed"
    else:
        yield python("pytest", "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--no-header", least=30)


def compare(context: Context) -> Iterator[Command | str]:
    """Tables beside the peers, a preset at a time."""
    for preset in PRESETS[context.device]:
        where = ["--device", context.device, "--out", str(context.out / f"compare-{preset}")]
        options = ["--preset", preset, *where, *OPTIONS[context.device]]
        least = 20 if context.device == "cuda" else 5
        yield python(
            f"compare-{preset}", "-m", "benchmarks", "compare", *options, "--seconds", "{seconds}", least=least
        )


def scaling(context: Context) -> Iterator[Command | str]:
    """Time against N, V and D."""
    options = ["--small", "--rounds", "3", "--axes", "N"] if context.device == "cpu" else []
    argv = ["--device", context.device, *options, "--out", str(context.out / "scaling")]
    yield python("scaling", "-m", "benchmarks", "scaling", *argv)


def tune(context: Context) -> Iterator[Command | str]:
    """The search for launch configurations."""
    if backend.triton_obstacle(torch.device("cuda")) is not None:
        yield "Triton is not installed"
    elif context.device != "cuda":
        yield "there is no GPU"
    else:
        yield python("tune", "-m", "benchmarks.report.tune", least=20)


def predictions(context: Context) -> Iterator[Command | str]:
    """Plans as predicted, beside what has been measured."""
    if backend.triton_obstacle(torch.device("cuda")) is not None:
        yield "Triton is not installed"
        return
    measured = [str(path) for path in context.measured]
    options = ["--measured", *measured] if measured else []
    yield python("static", "-m", "benchmarks", "static", "--parts", "plans", *options)


def profile(context: Context) -> Iterator[Command | str]:
    """The slowest kernels of a step, and Nsight Compute's view of them."""
    argv = ["--device", context.device, "--out", str(context.out / "profile")]
    yield python("profile", "-m", "benchmarks.report.profile", *argv, least=15 if context.device == "cuda" else 5)
    if context.device != "cuda":
        yield "ncu: there is no GPU"
    elif shutil.which("ncu") is None:
        yield "ncu is not installed"
    else:
        yield python("ncu", "-m", "benchmarks.report.profile", *argv, "--ncu", least=30)


SECTIONS = {
    "environment": Section("machine, packages and peers", environment, 0.05),
    "parity": Section("every objective against the reference, on every device", parity, 0.1),
    "tests": Section("pytest -m gpu", tests, 0.25),
    "compare": Section("beside the peers and the bare products", compare, 0.4),
    "scaling": Section("time against N, V and D, launches per call", scaling, 0.08),
    "tune": Section("search of configurations", tune, 0.15),
    "profile": Section("the slowest kernels of a step", profile, 0.1),
    "predictions": Section("plans as predicted, beside what was measured", predictions, 0.05),
}
