"""``python -m fused_pref tune``: measure what the planner assumes of this machine, and keep it."""

import argparse
import datetime
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from torch import Tensor

import fused_pref as fp
from fused_pref.cli import cache, constants, files
from fused_pref.cli.explanation import MODELS
from fused_pref.cli.usage import UsageError
from fused_pref.head.plans import planner
from fused_pref.head.plans.problem import Plan, Problem
from fused_pref.ops.backend import architecture, taken_by_auto, triton_obstacle
from fused_pref.ops.devices import Device, device_of
from fused_pref.ops.torch.matmul import arithmetic, project
from fused_pref.testing.parity import available

EPILOG = """\
Measured: the rate of products in each dtype, the bandwidth of memory, a step of linear_cpo_loss by the
fastest plan, and on a GPU fused against unfused plans and the two loops over vocabulary tiles. Takes
less than a minute. What is found is used only where FUSED_PREF_TUNE=1 is set before the import.

examples:
  %(prog)s --model llama-3-8b --tokens 8192
  %(prog)s --hidden 1024 --vocab 32768 --tokens 512 --dtype float32 --device cpu

See docs/plans.md#measured-figures for what changes.
"""
DTYPES = ("bfloat16", "float16", "float32")
# D, V and N where they are not given: what takes seconds.
SIZES = {"cpu": (1024, 32768, 512), "gpu": (4096, 128256, 8192)}
# Seconds that a measurement repeats for, and of a step that is not measured because it would take longer.
SPAN, LONGEST = 1.0, 8.0
# Bytes that are copied, by kind of device; rows of a product.
BYTES, ROWS = {"cpu": 2**28, "gpu": 2**30}, {"cpu": 2048, "gpu": 8192}
# A function to call → seconds of a call.
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Sizes:
    """N, D, V and the dtype of hidden states and weight."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"N={self.tokens}, D={self.hidden}, V={self.vocabulary}, {dtype}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), metavar="NAME", help="take D and V from a known model, as explain does")
    add("--hidden", type=int, metavar="D", help="hidden size (default: 4096; on a CPU 1024)")
    add("--vocabulary", "--vocab", type=int, metavar="V", help="vocabulary size (default: 128256; on a CPU 32768)")
    add("--tokens", type=int, metavar="N", help="scored tokens (default: 8192; on a CPU 512)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of hidden states and weight (default: %(default)s)")
    add("--device", help="device to measure (default: an accelerator if there is one)")


def run(args: argparse.Namespace) -> int:
    """Measure, print and keep."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = args.device if args.device is not None else "cpu" if accelerator is None else accelerator.type
    try:
        available("--device", name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    device = torch.device(name)
    if device.type not in ("cpu", "cuda", "xpu"):
        raise UsageError(f"--device must be a CPU, or a GPU that computes in float64; got {name!r}")
    sizes, path = sizes_of(args, device), constants.path()
    prepare(path)
    given, began = device_of(device.type, architecture(device)), time.perf_counter()
    try:
        entry = measured(device, sizes, given, timer_of(device))
    except torch.OutOfMemoryError as error:
        raise UsageError(f"the device has too little memory for {sizes}: {error}") from error
    print(f"{constants.key_of(device)}: measured in {time.perf_counter() - began:.0f} s")
    print("\n".join(report(entry, given)))
    cache.add(path, constants.key_of(device), entry)
    print(f"kept in {path}; the planner takes it with FUSED_PREF_TUNE=1")
    return 0


def sizes_of(args: argparse.Namespace, device: torch.device) -> Sizes:
    """Those of the options, else of the model, else of the device."""
    hidden, vocabulary, tokens = SIZES["cpu" if device.type == "cpu" else "gpu"]
    hidden, vocabulary = MODELS.get(args.model, (hidden, vocabulary))

    def size(option: str, default: int) -> int:
        given = getattr(args, option)
        if given is not None and given < 2:
            raise UsageError(f"argument --{option}: must be an integer >= 2; got {given}")
        return default if given is None else given

    sizes = size("tokens", tokens), size("hidden", hidden), size("vocabulary", vocabulary)
    return Sizes(*sizes, getattr(torch, args.dtype))


def prepare(path: Any) -> None:
    """Refuse a cache that could not be written afterwards."""
    try:
        files.make_folder(path.parent)
    except OSError as error:
        raise UsageError(f"cannot write to the folder {path.parent}: {error.strerror}") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cache.read(path) is None:
            raise UsageError(str(caught[0].message))


def timer_of(device: torch.device) -> Timer:
    """The least of several calls: other work on the machine only ever adds to one."""

    def finish() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def timed(function: Callable[[], object]) -> float:
        function()
        finish()
        times, end = [], time.perf_counter() + SPAN
        while not times or (time.perf_counter() < end and len(times) < 100):
            start = time.perf_counter()
            function()
            finish()
            times.append(time.perf_counter() - start)
        return min(times)

    return timed


class Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.done, self.total, self.stream = 0, total, stream

    def __call__(self, what: str) -> None:
        """Say what is measured next; all is done after the last."""
        if self.stream.isatty():
            line = f"[{'#' * self.done}{' ' * (self.total - self.done)}] {self.done}/{self.total} {what}"
            self.stream.write(f"\r\033[K{line}" if self.done < self.total else "\r\033[K")
            self.stream.flush()
        self.done += 1


def measured(device: torch.device, sizes: Sizes, given: Device, timer: Timer) -> dict[str, Any]:
    """The entry of a device: figures of :func:`fused_pref.cli.constants.with_figures`, and times in milliseconds."""
    kind = "cpu" if device.type == "cpu" else "gpu"
    dtypes = {4: torch.float32, 8: torch.float64, 2: torch.bfloat16, sizes.dtype.itemsize: sizes.dtype}
    kernels = taken_by_auto(device) and triton_obstacle(device) is None
    forms = ("unfused", "fused") if kernels else ("unfused",)
    bar = Bar(len(dtypes) + 1 + kernels + len(forms), sys.stderr)
    rates = {}
    for size, dtype in sorted(dtypes.items()):
        bar(f"products in {str(dtype).removeprefix('torch.')}")
        rates[size] = product_rate(device, sizes, dtype, ROWS[kind], given.columns, timer)
    bar("memory")
    bandwidth = copied(device, BYTES[kind], timer)
    entry: dict[str, Any] = {"rates": {str(size): rate for size, rate in rates.items()}, "bandwidth": bandwidth}
    entry |= {"date": datetime.date.today().isoformat(), "sizes": str(sizes), "milliseconds": {}, "predicted": {}}
    if kernels:
        bar("loops over vocabulary tiles")
        loops = loop_seconds(device, sizes, timer)
        entry["milliseconds"] |= {
            f"{name} loop": 1e3 * seconds for name, seconds in loops.items() if seconds < math.inf
        }
        entry["epilogue"] = epilogue_of(min(loops.values()), sizes, rates)
    figures = constants.with_figures(entry, given) or given
    for form in forms:
        bar(f"a step, {form}")
        seconds, predicted = step_seconds(device, sizes, figures, form == "fused", timer)
        if seconds is not None:
            entry["milliseconds"][form] = 1e3 * seconds
            entry["predicted"][form] = 1e3 * predicted
    bar("")
    return entry


def product_rate(
    device: torch.device, sizes: Sizes, dtype: torch.dtype, rows: int, columns: int, timer: Timer
) -> float:
    """Operations per second of a product of hidden states and a slice of the weight, as the head makes it."""
    rows, columns = min(max(sizes.tokens, 256), rows), min(sizes.vocabulary, columns)
    a = torch.randn(rows, sizes.hidden, device=device).to(dtype)
    b = torch.randn(columns, sizes.hidden, device=device).to(dtype)
    logits = torch.empty(rows, columns, dtype=arithmetic(dtype, device.type).logits, device=device)
    return 2 * rows * columns * sizes.hidden / timer(lambda: project(logits, a, b, None))


def copied(device: torch.device, size: int, timer: Timer) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(size // 4, device=device)
    out = torch.empty_like(source)
    return 2 * size / timer(lambda: out.copy_(source))


def epilogue_of(seconds: float, sizes: Sizes, rates: dict[int, float]) -> float:
    """Seconds that the fused product of the statistics spends on a logit beyond multiplying."""
    logits = sizes.tokens * sizes.vocabulary
    return max(seconds - 2 * logits * sizes.hidden / rates[sizes.dtype.itemsize], 1e-6 * seconds) / logits


def loop_seconds(device: torch.device, sizes: Sizes, timer: Timer) -> dict[str, float]:
    """Seconds of the statistics of all logits by each loop over tiles; the faster is kept for FUSED_PREF_TUNE=1."""
    from fused_pref.cli import tune
    from fused_pref.ops.interface import Operands, Transform
    from fused_pref.ops.torch.chunk import new_statistics
    from fused_pref.ops.triton import configs, linear

    rows, found = sizes.tokens, {}

    def choose(kernel: str, device: Any, dtype: Any, size: int, default: Any, candidates: Any, run: Any) -> Any:
        names = ("nested", "flattened") if default.descriptors else ("nested",)
        both = {name: replace(default, flattened=name == "flattened") for name in names}
        times = {name: tune.time_of(timer, run, tile) for name, tile in both.items()}
        key, best = tune.key_of(kernel, device, dtype, size), both[min(times, key=times.__getitem__)]
        if key not in tune.load():  # what a search found is the best of more
            tune.store(key, best)
        found.setdefault(kernel, times)
        return best

    hidden, weight, targets = tensors(device, sizes)
    before, configs.chooser = configs.chooser, choose
    try:
        for indices in (None, torch.arange(rows, device=device)):
            seen = new_statistics(rows, hidden, torch.float32)
            operands = Operands(hidden, weight, None, indices)
            linear.update_statistics(seen, operands, targets, 0, Transform(), logit_sum=False)
    finally:
        configs.chooser = before
    return found["linear_statistics"]


def tensors(device: torch.device, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D), weight (V, D) and labels (N,)."""
    options: dict[str, Any] = {"device": device, "dtype": sizes.dtype}
    hidden = torch.randn(sizes.tokens, sizes.hidden, **options)
    weight = torch.randn(sizes.vocabulary, sizes.hidden, **options) * sizes.hidden**-0.5
    return hidden, weight, torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)


def step_seconds(
    device: torch.device, sizes: Sizes, figures: Device, fused: bool, timer: Timer
) -> tuple[float | None, float]:
    """Seconds of a forward and backward of CPO by the fastest plan of a form, and what these figures predict.

    The first is None where it would take too long.
    """
    if 6 * sizes.tokens * sizes.hidden * sizes.vocabulary / figures.rates[sizes.dtype.itemsize] > LONGEST:
        return None, math.inf
    hidden, weight, labels = tensors(device, sizes)
    sequences = min(16, sizes.tokens // 2 * 2)
    ends = (torch.arange(sequences + 1, device=device) * sizes.tokens // sequences).int()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    backend, taken = "triton" if fused else "auto", []

    def choice(problem: Problem) -> Plan:
        """The fastest, by these figures, that fits; the smallest where none does."""
        problem = replace(problem, device=figures)
        plans = [plan for plan in planner.candidates(problem) if plan.fused == fused]
        fitting = [plan for plan in plans if plan.workspace <= problem.budget]
        fitting = fitting or [min(plans, key=lambda plan: plan.workspace)]
        taken.append(min(fitting, key=lambda plan: plan.seconds).fit(problem))
        return taken[-1]

    def step() -> None:
        loss = fp.linear_cpo_loss(*leaves, labels, shift=False, cu_seqlens=ends, backend=backend).loss
        torch.autograd.grad(loss, leaves)

    with planner.planning(choice):
        return timer(step), taken[-1].seconds


def report(entry: dict[str, Any], given: Device) -> Iterator[str]:
    """Lines: figures beside the constants, and times."""
    yield f"{'':26}{'measured':>12}{'constant':>12}   constants: {given.measured}"
    for size, rate in entry["rates"].items():
        yield f"{f'products, {8 * int(size)}-bit, TFLOP/s':26}{rate / 1e12:12.3g}{given.rates[int(size)] / 1e12:12.3g}"
    yield f"{'memory, GB/s':26}{entry['bandwidth'] / 1e9:12.3g}{given.bandwidth / 1e9:12.3g}"
    if "epilogue" in entry:
        yield f"{'epilogue of a logit, ps':26}{entry['epilogue'] * 1e12:12.3g}{given.epilogue * 1e12:12.3g}"
    yield f"linear_cpo_loss, forward and backward, at {entry['sizes']}:"
    for name, time_ in entry["milliseconds"].items():
        predicted = (
            f"   predicted by these figures: {entry['predicted'][name]:.3g}" if name in entry["predicted"] else ""
        )
        yield f"{f'  {name}, ms':26}{time_:12.3g}{predicted}"
    if not {"fused", "unfused"} & set(entry["milliseconds"]):
        yield "  a step would take too long: give it fewer --tokens"
