"""A machine with GPUs that are not there.

Their tensors are meta tensors that say they are on ``cuda:N``: the library takes the way that it takes on a GPU. Memory
is counted, kernels are recorded in place of being launched, and what would wait for a GPU is noted. The driver is a
stub: a kernel goes to whichever GPU is the current one, as in Triton.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.traffic import computes
from fused_pref.ops import devices

META = torch.device("meta")
# What makes a tensor of host values; and operations of tensors that copy an operand of the host.
MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)
COPYING = {"_to_copy", "copy_", "copy", "where", "index_put_", "index_put", "cat", "stack"}
READING = {"item", "__bool__", "__float__", "__int__", "__index__"}


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel gets, without its memory: whoever records a launch must not keep that alive.

    Attributes:
        shape, strides: of the tensor.
        dtype: of its entries.
        offset: of its first byte in its allocation, which begins on a multiple of 512.
        gpu: number of the GPU that it is on; None: of none.
        block: rows and columns that a tensor descriptor reads at a time; None of a plain tensor.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    gpu: int | None
    block: tuple[int, ...] | None = None

    def tensor(self) -> Any:
        """A meta tensor, or the descriptor of one, like it."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=META)
        if self.offset % 16:
            made = torch.empty(made.numel() + 1, dtype=self.dtype, device=META)[1:].as_strided(self.shape, self.strides)
        if self.block is None:
            return made
        return TensorDescriptor(made, list(self.shape), list(self.strides), list(self.block))


@dataclass(frozen=True)
class Launched:
    """A launch as the driver gets it: ``gpu`` is the number of the current GPU."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    gpu: int

    @property
    def name(self) -> str:
        """The kernel's name, as in the tables."""
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    @property
    def launch(self) -> Any:
        """What can be compiled, with meta tensors."""
        from fused_pref.cli.kernels.compile import Launch

        def given(value: Any) -> Any:
            return value.tensor() if isinstance(value, Operand) else value

        return Launch(self.kernel, tuple(map(given, self.arguments)), {k: given(v) for k, v in self.keywords.items()})

    @property
    def bound(self) -> dict[str, Any]:
        """The arguments by name."""
        signature = inspect.signature(self.kernel.fn)
        given = {name: value for name, value in self.keywords.items() if name in signature.parameters}
        return dict(signature.bind(*self.arguments, **given).arguments)


@dataclass
class Machine:
    """What happens on it, in order.

    Attributes:
        target: architecture of its GPUs, of :data:`fused_pref.ops.devices.GPUS`.
        processors: of each of them.
        counts: what the host reads where it asks for the scored tokens of each sequence.
        current: number of the current GPU.
        operations: PyTorch operations that compute.
        launches: kernels.
        waits: reads of a value by the host.
        copies: copies from the host to a GPU.
        allocated: bytes of all allocations.
        peak: the most bytes that were allocated at once.
    """

    target: str
    processors: int
    counts: list[int] = field(default_factory=list)
    current: int = 0
    operations: list[str] = field(default_factory=list)
    launches: list[Launched] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    allocated: int = 0
    peak: int = 0
    # By address: the storage, its bytes, and the number of the GPU.
    storages: dict[int, tuple[StorageWeakRef, int, int]] = field(default_factory=dict)
    # Where an operation without operands allocates.
    chosen: int = 0

    def tensor(self, *shape: int, gpu: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """An argument of a call; its memory is not counted."""
        made = torch.empty(shape, dtype=dtype, device=META)
        self._place(made, gpu, counted=False)
        return made

    def adopt(self, module: torch.nn.Module, gpu: int = 0) -> Any:
        """A module whose buffers are on a GPU."""
        module = module.to(META)
        for buffer in module.buffers():
            self._place(buffer, gpu, counted=False)
        return module

    def gpu_of(self, tensor: Tensor) -> int | None:
        """Number of the GPU that a tensor is on; None of the host's."""
        with torch._C.DisableTorchFunction():
            return self.storages[tensor.untyped_storage()._cdata][2] if tensor.device == META else None

    def counted(self, tensor: Tensor) -> int:
        """Bytes of a tensor's allocation, 0 of an argument."""
        return self.storages[tensor.untyped_storage()._cdata][1]

    def _place(self, tensor: Tensor, gpu: int, *, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages:
            return
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        size = storage.nbytes() if counted else 0
        self.storages[storage._cdata] = (StorageWeakRef(storage), size, gpu)
        self.allocated += size
        self.peak = max(self.peak, sum(nbytes for _, nbytes, _ in self.storages.values()))

    def add(self, operands: list[Tensor], results: list[Tensor], name: str) -> None:
        """An operation is over.

        Raises:
            RuntimeError: its operands are on several GPUs, as PyTorch says.
        """
        gpus = {self.gpu_of(operand) for operand in operands}
        on_gpu = gpus - {None}
        if len(on_gpu) > 1:
            raise RuntimeError(f"{name}: operands on several GPUs, {sorted(map(str, gpus))}")
        if on_gpu and None in gpus and name in COPYING:
            self.copies.append(name)
        place = next((gpu for gpu in on_gpu if gpu is not None), self.chosen)
        for result in results:
            if result.device == META:
                self._place(result, place)

    @staticmethod
    def backward(loss: Tensor) -> None:
        """``loss.backward()``, inside of which a mode of Python's functions would be off."""
        run = torch.autograd.graph._engine_run_backward
        run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        """Stands for ``torch.cuda.device``."""
        before, self.current = self.current, torch.device(device).index
        yield
        self.current = before

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within this context GPUs are this machine's."""
        from fused_pref.head import budget, engine
        from fused_pref.ops.triton import configs, scale

        machine = self

        def operand(value: Any) -> Any:
            if isinstance(value, Tensor):
                return Operand(tuple(value.shape), value.stride(), value.dtype, value.data_ptr(), machine.gpu_of(value))
            if hasattr(value, "block_shape"):
                return replace(operand(value.base), block=tuple(value.block_shape))
            return value

        def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
            given = {name: operand(value) for name, value in keywords.items()}
            launched = Launched(kernel, tuple(grid), tuple(map(operand, arguments)), given, machine.current)
            machine.launches.append(launched)

        gpu = devices.GPUS[self.target]
        with contextlib.ExitStack() as stack:
            for owner, name, value in (
                (torch.cuda, "device", self.device),
                (torch.cuda, "current_device", lambda: self.current),
                (torch, "get_autocast_dtype", lambda kind: torch.bfloat16),
                (engine, "device_at", lambda device: gpu),
                (budget, "memory_of", lambda device: gpu.memory),
                (configs, "architecture", lambda device: self.target),
                (configs, "processors", lambda device: self.processors),
                (type(scale._scale_kernel), "run", run),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            stack.enter_context(_Python(self))
            stack.enter_context(_Dispatch(self))
            yield


class _Python(TorchFunctionMode):
    """What Python asks: tensors are on GPUs, and values are read by waiting."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        machine, kwargs, name = self.machine, dict(kwargs or {}), getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        gpu = None if tensor is None else machine.gpu_of(tensor)
        if gpu is not None:
            asked = getattr(func, "__self__", None)
            if asked is Tensor.device:
                return torch.device("cuda", gpu)
            if asked in (Tensor.is_meta, Tensor.is_cuda):
                return asked is Tensor.is_cuda
        sizes = name == "repeat_interleave" and kwargs.get("output_size") is None
        sizes = sizes and any(isinstance(value, Tensor) for value in (*args[1:], kwargs.get("repeats")))
        if gpu is not None and (sizes or name in READING | {"tolist"}):
            machine.waits.append(name)
            if name == "tolist":
                return list(machine.counts)
            raise AssertionError(f"{name} reads a value that the host does not have")
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.to:
            args = self.moved(*args) if len(args) > 1 else args
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.device)]
        given += [torch.device(kwargs["device"])] if isinstance(kwargs.get("device"), str) else []
        wanted = [device for device in given if device.type == "cuda"]
        if wanted and gpu is None and (func is Tensor.to or (func in MAKERS and tensor is None)):
            machine.copies.append(name)
        place = wanted[0].index or 0 if wanted else gpu
        if wanted:
            args = tuple(META if value in wanted else value for value in args)
            kwargs = {key: META if value in wanted or key == "device" else value for key, value in kwargs.items()}
        before, machine.chosen = machine.chosen, machine.chosen if place is None else place
        try:
            if func is Tensor.to and tensor is not None and gpu not in (None, place):
                return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)  # a copy on the other GPU
            return func(*args, **kwargs)
        finally:
            machine.chosen = before

    def moved(self, tensor: Tensor, target: Any, *others: Any) -> tuple[Any, ...]:
        """Arguments of ``Tensor.to`` with a device in place of its name, or of a tensor that is on it."""
        gpu = self.machine.gpu_of(target) if isinstance(target, Tensor) else None
        if gpu is not None:
            return tensor, torch.device("cuda", gpu), target.dtype, *others
        return tensor, torch.device(target) if isinstance(target, str) else target, *others


class _Dispatch(TorchDispatchMode):
    """What PyTorch does: operations, and the memory of their results."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        machine, kwargs = self.machine, kwargs or {}
        name = func._schema.name.split("::")[1]
        if computes(func):
            machine.operations.append(name)
        with torch._C.DisableTorchFunction():  # here tensors say where they really are
            result = _instead(func, args, kwargs)
            operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            machine.add(operands, [value for value in tree_leaves(result) if isinstance(value, Tensor)], name)
        return result


def _instead(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation, also of those that PyTorch does not know on meta tensors."""
    name, overload = func._schema.name.split("::")[1], func._schema.overload_name
    if name in ("mm", "addmm") and "dtype" in overload:
        if "out" in kwargs:
            return kwargs["out"]
        a, b = args[-3:-1] if not isinstance(args[-1], Tensor) else args[-2:]
        return a.new_empty((a.shape[0], b.shape[1]), dtype=kwargs.get("out_dtype", args[-1]))
    if name == "nonzero_static" and args[0].device == META:
        return torch.empty((kwargs["size"], args[0].dim()), dtype=torch.int64, device=META)
    if name == "segment_reduce" and args[0].device == META:
        return args[0].new_empty(kwargs["offsets"].shape[0] - 1)
    return func(*args, **kwargs)
