"""What every benchmark shares: shapes, batches, the machine's stamp, and the bytes and copies to hold times against."""

import functools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Of their largest operand they touch as many entries as their index has.
SPARSE = {"gather", "scatter_add_", "scatter_add", "index_select", "embedding"}


@dataclass(frozen=True)
class Shape:
    """S sequences of T positions over V entries."""

    sequences: int
    length: int
    columns: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From ``"SxTxV"``."""
        sequences, length, columns = (int(number) for number in text.split("x"))
        return cls(sequences, length, columns)

    def __str__(self) -> str:
        return f"{self.sequences}x{self.length}x{self.columns}"


@dataclass(frozen=True)
class Batch:
    """Arguments of every operation. Every position scores its own label, so that nobody pays for slicing."""

    logits: Tensor  # (S, T, V), a leaf
    labels: Tensor  # (S, T)
    ref_logps: Tensor  # (S,)
    desirable: Tensor  # (S,) bool

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: str) -> "Batch":
        """Random logits, always the same."""
        generator = torch.Generator(device).manual_seed(0)
        size = (shape.sequences, shape.length, shape.columns)
        logits = torch.empty(size, dtype=dtype, device=device).normal_(0, 3, generator=generator)
        labels = torch.randint(0, shape.columns, size[:2], generator=generator, device=device)
        desirable = torch.arange(shape.sequences, device=device) % 2 == 0
        ref_logps = torch.full((shape.sequences,), -16.0 * shape.length, device=device)
        return cls(logits.requires_grad_(), labels, ref_logps, desirable)

    @property
    def nbytes(self) -> int:
        """Bytes of the logits."""
        return self.logits.numel() * self.logits.element_size()


def stamp(device: str) -> dict[str, Any]:
    """The machine and the software; pytest-benchmark adds the commit."""
    try:
        import triton

        version: str | None = triton.__version__
    except ImportError:
        version = None
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": version}


def finish(device: str) -> None:
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(step: Callable[[], Any], device: str = "cpu") -> int:
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
def copy_seconds(nbytes: int, device: str, rounds: int = 7) -> float:
    """Median time of a plain copy that moves ``nbytes``, half of them read and half written."""
    source = torch.ones(max(nbytes // 2, 1), dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    times = []
    for _ in range(rounds + 2):
        finish(device)
        start = time.perf_counter()
        sink.copy_(source)
        finish(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


class Traffic(TorchDispatchMode):
    """Bytes of the operands of every operation that PyTorch dispatches, results included, each counted once.

    A custom operation counts as one: what it keeps in registers or cache is not traffic. Kernels that are launched
    outside of an operation are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and name not in ALLOCATIONS:
            read = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
            written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            if name in SPARSE:
                index = args[2] if len(args) > 2 else args[1]
                self.nbytes += sum(min(occupied(x), index.numel() * x.element_size()) for x in (*read, *written))
            else:
                # A tensor is overwritten without being read by these.
                fills = name.endswith("_like") or name in ("copy_", "fill_", "zero_", "zeros", "ones", "new_zeros")
                self.nbytes += sum(map(occupied, read[1:] if fills else read)) + sum(map(occupied, written))
        return result


def occupied(tensor: Tensor) -> int:
    """Bytes of the distinct entries of a tensor that may be expanded."""
    counts = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return functools.reduce(lambda total, size: total * size, counts, tensor.element_size())


def traffic(step: Callable[[], Any]) -> int:
    """Bytes that one call moves; see :class:`Traffic`."""
    with Traffic() as counted:
        step()
    return counted.nbytes
