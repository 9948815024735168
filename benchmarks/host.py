"""``python -m benchmarks host``: what a launch costs the host, in parts, without a GPU.

A step of ``linear_cpo_loss`` runs on CPU tensors that stand for an H200. Each call that it makes of the Triton backend
is then repeated, whole and in parts. Triton binds, specialises and looks up a launch as on a GPU, and its launcher
makes the arguments. Nothing is compiled, no descriptor is encoded, and the function of the GPU's driver is not called.
"""

import argparse
import contextlib
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton.compiler
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

import fused_pref as fp
from benchmarks.replay.calls import forced
from benchmarks.static.gpus import table
from fused_pref.cli.kernels.compile import TARGETS, AbsentDevice
from fused_pref.cli.kernels.report import compile_obstacle
from fused_pref.cli.usage import UsageError
from fused_pref.head import budget, engine
from fused_pref.head.plans import planner
from fused_pref.ops import backend, devices
from fused_pref.ops.triton import configs
from fused_pref.ops.triton.launch import on

TARGET, PROCESSORS = "sm_90", 132
GPU = torch.device("cuda", 0)
# Sequences, positions, D and V: so few that a step is bound by the host.
SIZES = (8, 16, 64, 512)
PLANS = (("grouped", False), ("grouped", True))
HEADER = ["call", "launches", "own Python", "PyTorch", "device", "Triton's run", "Triton's launcher", "all"]
BACKEND = "fused_pref.ops.triton"


@dataclass
class Called:
    """A call of the Triton backend: its launches, and its PyTorch operations, views too."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    operations: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def again(self) -> None:
        """Repeat the call."""
        self.function(*self.arguments, **self.keywords)

    def compute(self) -> None:
        """Repeat the operations alone."""
        for function, arguments, keywords in self.operations:
            function(*arguments, **keywords)

    def run(self) -> None:
        """Repeat what Triton does alone."""
        for (kernel, grid, _, *arguments), keywords in self.launches:
            kernel[grid](*arguments, **keywords)

    def enter(self) -> None:
        """Make the GPU the current one for each launch."""
        for _ in self.launches:
            with on(GPU):
                pass


class Recorder(TorchDispatchMode):
    """The calls of the Triton backend, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Called] = []
        self.within: Called | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.within is not None:
            self.within.operations.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which notes the calls from outside of the backend."""

        def noted(*arguments: Any, **keywords: Any) -> Any:
            if self.within is not None:
                return function(*arguments, **keywords)
            self.within = Called(function, arguments, keywords)
            self.calls.append(self.within)
            try:
                return function(*arguments, **keywords)
            finally:
                self.within = None

        return noted

    def launch(self, *arguments: Any, **keywords: Any) -> None:
        """Stands for :func:`fused_pref.ops.triton.launch.launch`."""
        assert self.within is not None
        self.within.launches.append((arguments, keywords))


def nothing(*arguments: Any, **keywords: Any) -> None:
    """What a GPU's driver would do."""


def modules() -> list[ModuleType]:
    """Those of the Triton backend that launch."""
    paths = importlib.import_module(BACKEND).__path__
    found = [importlib.import_module(f"{BACKEND}.{info.name}") for info in pkgutil.iter_modules(paths)]
    return [module for module in found if hasattr(module, "launch") and not module.__name__.endswith(".launch")]


@contextlib.contextmanager
def patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Within this context attributes (owner, name) have these values."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


def launching(launch: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Within this context the backend launches in this way."""
    return patched(*((module, "launch", launch) for module in modules()))


def record(plan: tuple[str, bool]) -> list[Called]:
    """The calls of a step that launch."""
    recorder, (sequences, length, features, vocabulary) = Recorder(), SIZES
    hidden, weight = torch.zeros(sequences, length, features), torch.zeros(vocabulary, features)
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    labels = torch.zeros(sequences, length, dtype=torch.int64)
    called = [
        (module, name, recorder.noting(value))
        for module in modules()
        for name, value in vars(module).items()
        if type(value) is FunctionType and value.__module__.startswith(BACKEND) and name != "launch"
    ]
    with (
        planner.planning(lambda problem: forced(problem, *plan)),
        patched(*called),
        launching(recorder.launch),
        recorder,
    ):
        fp.linear_cpo_loss(hidden, weight, labels, backend="triton").loss.backward()
    return [call for call in recorder.calls if call.launches]


@contextlib.contextmanager
def standing_for_a_gpu() -> Iterator[None]:
    """Within this context CPU tensors stand for a GPU's, and PyTorch says of that what it says of one that is there."""
    said = SimpleNamespace(major=9, minor=0, multi_processor_count=PROCESSORS)
    architecture, processors, gpu = backend.architecture, configs.processors, devices.GPUS[TARGET]
    with patched(
        (torch.cuda, "_lazy_init", nothing),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "_get_device_properties", lambda index: said),
        (torch.cuda, "_exchange_device", int),
        (torch.cuda, "_maybe_exchange_device", int),
        (torch._C, "_cuda_getDevice", int),
        (backend, "EMULATED", TARGET),
        (configs, "architecture", lambda device: architecture(GPU)),
        (configs, "processors", lambda device: processors(GPU)),
        (engine, "device_at", lambda device: gpu),
        (budget, "memory_of", lambda device: gpu.memory),
    ):
        yield


@contextlib.contextmanager
def stub_driver() -> Iterator[None]:
    """Within this context Triton's device is a GPU whose driver does nothing."""

    class Compiled(CompiledKernel):
        """A kernel of any source, without code."""

        def __init__(self, src: Any, **_: Any) -> None:
            meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, 64], "fp4_padded": False}
            described = [meta for kind in src.signature.values() if str(kind).startswith("tensordesc")]
            none = {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}
            flags = {"launch_cooperative_grid": False, "launch_pdl": False, "num_ctas": 1}
            metadata: Any = SimpleNamespace(tensordesc_meta=described, **none, **flags)
            self.src, self.metadata, self.name = src, metadata, src.fn.__name__
            self.module, self.function, self.packed_metadata = (), 0, (8, 1, 0)
            self._run = nvidia.CudaLauncher(src, metadata)

        def __del__(self) -> None:
            """There is nothing to unload."""

    device: Any = AbsentDevice(TARGETS[TARGET])
    device.get_current_device = lambda: "host"  # where kernels keep what they compiled
    device.utils = SimpleNamespace(launch=nothing, build_signature_metadata=nothing, fill_tma_descriptor_tiled=nothing)
    with patched(
        (driver, "_active", device),
        (nvidia, "PyKernelArg", nothing),
        (triton.compiler, "compile", Compiled),
    ):
        yield


@contextlib.contextmanager
def without_launcher(call: Called) -> Iterator[None]:
    """Within this context Triton's launcher does nothing, either."""
    kernels = {id(kernel): kernel for (kernel, *_), _ in call.launches}.values()
    compiled = [one for kernel in kernels for one in kernel.device_caches["host"][0].values()]
    with patched(*((one, "_run", nothing) for one in compiled)):
        yield


def microseconds(step: Callable[[], object], number: int = 10) -> float:
    """Mean of a step."""
    began = time.perf_counter_ns()
    for _ in range(number):
        step()
    return (time.perf_counter_ns() - began) / number / 1000


def round_of(call: Called) -> list[float]:
    """Microseconds of a call: whole, but without what Triton does; its operations; the device; Triton's run, less its
    launcher, and with it.
    """
    with launching(nothing):
        whole = microseconds(call.again)
    with without_launcher(call):
        run = microseconds(call.run)
    return [whole, microseconds(call.compute), microseconds(call.enter), run, microseconds(call.run)]


def parts(calls: list[Called], rounds: int) -> list[list[float]]:
    """Microseconds of each call, as in :data:`HEADER`: the least of all rounds, because other processes only add to it.

    The calls take turns, so that a slow phase of the machine is not one call's.
    """
    found = [[round_of(call) for call in calls] for _ in range(rounds)]
    least = [[min(part) for part in zip(*own, strict=True)] for own in zip(*found, strict=True)]
    return [
        [whole - operations, operations, device, run, launched - run, whole + device + launched]
        for whole, operations, device, run, launched in least
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--rounds", type=int, default=100, help="of 10 repetitions; default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Print a table for each plan.

    Raises:
        UsageError: Triton's compiler cannot be used here.
    """
    obstacle = compile_obstacle()
    if obstacle:
        raise UsageError(obstacle)
    sequences, length, features, vocabulary = SIZES
    print(f"Host µs of a step of linear_cpo_loss: {sequences} sequences of {length}, D={features}, V={vocabulary}, "
          f"bf16; Triton {triton.__version__}, PyTorch {torch.__version__}")  # fmt: skip
    for plan, fused in PLANS:
        with standing_for_a_gpu(), stub_driver():
            calls = record((plan, fused))
            rows = parts(calls, args.rounds)
        total, launches = [sum(column) for column in zip(*rows, strict=True)], [len(call.launches) for call in calls]
        names = [f"{call.function.__module__.split('.')[-1]}.{call.function.__name__}" for call in calls]
        every = [*zip(names, launches, rows, strict=True), ("all", sum(launches), total)]
        every.append(("per launch", 1, [part / sum(launches) for part in total]))
        print(f"\n{plan}{', fused' if fused else ''}\n")
        print(table(HEADER, [[name, str(count), *(f"{x:.1f}" for x in found)] for name, count, found in every]))
    return 0
