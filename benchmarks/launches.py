"""What a step launches on a GPU; counted without one, too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.traffic import computes


def on_gpu(step: Callable[[], object]) -> int:
    """Kernels and copies of a step that has run before, as the profiler sees them."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())


class Operations(TorchDispatchMode):
    """Counts the PyTorch operations that compute: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and computes(func)
        return func(*args, **(kwargs or {}))


def without_gpu(step: Callable[[], object]) -> int:
    """Operations and kernels that a step on CPU tensors with ``backend="triton"`` would launch on an H200.

    The plan and the blocks of rows are those of that GPU, and kernels are counted in place of being run. Needs
    Triton's interpreter: ``TRITON_INTERPRET=1`` before Triton is imported.
    """
    with _counting() as operations:
        step()
    return operations.count


@contextmanager
def _counting() -> Iterator[Operations]:
    from fused_pref.head import budget, engine
    from fused_pref.ops import devices
    from fused_pref.ops.torch import chunk
    from fused_pref.ops.triton import logprob

    operations = Operations()

    def run(kernel: Any, *args: Any, **keywords: Any) -> None:
        operations.count += 1

    kind = type(logprob._token_logps_fwd_kernel)
    gpu = devices.GPUS["sm_90"]
    planned = mock.patch.object(engine, "device_at", return_value=gpu)
    memory = mock.patch.object(budget, "memory_of", return_value=gpu.memory)
    blocks = mock.patch.object(chunk, "CPU_BLOCK", chunk.DEVICE_BLOCK)
    with planned, memory, blocks, mock.patch.object(kind, "run", run), operations:
        yield operations
