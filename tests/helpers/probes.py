"""What a step launches, and which memory its kernels touch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.traffic import computes
from fused_pref.ops.backend import interpreted
from fused_pref.ops.triton import configs, dlogits, logprob, objective, pairs, sequences

LAUNCHERS = [
    (sequences, "targets_of"),
    (logprob, "token_logps_fwd"),
    (dlogits, "token_logps_bwd"),
    (sequences, "sequence_scores"),
    (sequences, "expand"),
    (pairs, "pair_objective"),
    (objective, "unpaired_objective"),
]
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_unique2"}
# Kernels whose programs may write the same value to one place: rows beyond the valid ones under ``max_valid_tokens``
# all stand for one row that is not scored, whose gradient is 0.
ALIKE = {"_scatter_rows_kernel"}
# Warps of a program where a test chooses its blocks: an interpreter has none, compiled code has to share its values.
WARPS = 4
# Class of the kernels: compiled or interpreted functions.
KERNEL: Any = type(logprob._token_logps_fwd_kernel)


class Launches(TorchDispatchMode):
    """Kernels and PyTorch operations of a step, in order, those inside of custom operations included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.synchronising: list[str] = []
        self.interpreting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not self.interpreting:
            if computes(func):
                self.names.append(str(func))
            if func._schema.name.split("::")[1] in SYNCHRONISING:
                self.synchronising.append(str(func))
        return func(*args, **(kwargs or {}))


class Allocations(Launches):
    """Counts the operations that bring new memory; the ``fail``-th finds none, as on a full GPU.

    Attributes:
        number: of allocations so far.
        storages: all that were allocated, held weakly.
    """

    def __init__(self, fail: int | None = None) -> None:
        super().__init__()
        self.fail, self.number = fail, 0
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.interpreting or not any(r.alias_info is None for r in func._schema.returns):
            return func(*args, **(kwargs or {}))
        self.number += 1
        if self.number == self.fail:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.storages += [StorageWeakRef(leaf.untyped_storage()) for leaf in made]
        return result

    def alive(self) -> int:
        """Allocations that something still holds."""
        return sum(not storage.expired() for storage in self.storages)


Recorder = TypeVar("Recorder", bound=Launches)


@contextmanager
def launches(*, execute: bool = True) -> Iterator[Launches]:
    """Record what is launched in this context; without ``execute`` the kernels then do nothing."""
    with recording(Launches(), execute=execute) as recorder:
        yield recorder


@contextmanager
def recording(recorder: Recorder, *, execute: bool = True) -> Iterator[Recorder]:
    """Let a recorder see what is launched in this context, by the launchers inside of custom operations too."""
    run = KERNEL.run

    def launch(kernel: Any, *args: Any, **keywords: Any) -> Any:
        recorder.names.append(kernel.fn.__name__)
        recorder.interpreting = True
        try:
            return run(kernel, *args, **keywords) if execute else None
        finally:
            recorder.interpreting = False

    def inside(launcher: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            with recorder:
                return launcher(*args, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch, recorder:
        patch.setattr(KERNEL, "run", launch)
        for module, name in LAUNCHERS:
            patch.setattr(module, name, inside(getattr(module, name)))
        yield recorder


class Memory:
    """Addresses that interpreted kernels have read and written; each must lie in a tensor passed to its launch.

    Programs of a launch run in any order and at once: what one of them writes no other may read, nor write unless
    :data:`ALIKE` says that it is the same value.
    """

    def __init__(self) -> None:
        self.allowed: list[tuple[int, int]] = []
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        # The most programs of each kernel along each dimension of its grid.
        self.grids: dict[str, tuple[int, ...]] = {}
        # Of the launch under way: program, addresses, bytes at each, and what is written there.
        self.accesses: list[tuple[int, np.ndarray, int, np.ndarray | None]] = []

    def begin(self, kernel: str, grid: tuple[int, ...], storages: list[Any]) -> None:
        """A launch of programs that may touch these storages."""
        grid = (*grid, 1, 1)[:3]
        self.grids[kernel] = tuple(map(max, grid, self.grids.get(kernel, grid)))
        self.allowed = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        self.accesses = []

    def touch(self, program: int, pointers: Any, mask: Any, value: Any = None) -> None:
        """Check and record the unmasked addresses of one load, or of one store of a value."""
        addresses = pointers.data[mask.data]
        if addresses.size:
            low, high = int(addresses.min()), int(addresses.max())
            width = pointers.get_element_ty().primitive_bitwidth // 8
            assert any(start <= low and high + width <= end for start, end in self.allowed), "out of bounds"
            (self.read if value is None else self.written).append(addresses)
            self.accesses.append((program, addresses, width, None if value is None else value.data[mask.data]))

    def end(self, kernel: str) -> None:
        """Compare what the programs of the launch have touched, in pieces as wide as the narrowest access."""
        unit = min((width for _, _, width, _ in self.accesses), default=1)
        read, readers, _ = self._pieces(unit, [access for access in self.accesses if access[3] is None])
        written, writers, values = self._pieces(unit, [access for access in self.accesses if access[3] is not None])
        order = np.argsort(written, kind="stable")
        written, writers, values = written[order], writers[order], values[order]
        clash = (written[1:] == written[:-1]) & (writers[1:] != writers[:-1])
        if kernel in ALIKE:
            clash &= (values[1:] != values[:-1]).any(1)
        assert not clash.any(), f"{kernel}: two programs write the same element"
        place = np.searchsorted(written, read)
        there = place < len(written)
        place, read, readers = place[there], read[there], readers[there]
        clash = (written[place] == read) & (writers[place] != readers)
        assert not clash.any(), f"{kernel}: a program reads what another writes"

    @staticmethod
    def _pieces(unit: int, accesses: list[Any]) -> tuple[np.ndarray, ...]:
        """Address, program and bytes of every piece."""
        indices, programs, values = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros((0, unit), np.uint8)]
        for program, addresses, width, value in accesses:
            indices.append(np.add.outer(addresses, np.arange(0, width, unit, dtype=np.uint64)).ravel())
            programs.append(np.full(indices[-1].shape, program))
            if value is not None:
                values.append(np.ascontiguousarray(value).view(np.uint8).reshape(-1, unit))
        return tuple(map(np.concatenate, (indices, programs, values)))

    @staticmethod
    def within(tensor: Tensor, seen: list[np.ndarray]) -> np.ndarray:
        """The addresses seen that lie in the storage of a tensor, in order."""
        storage = tensor.untyped_storage()
        addresses = np.concatenate([np.zeros(0, np.uint64), *seen])
        return addresses[(addresses >= storage.data_ptr()) & (addresses < storage.data_ptr() + storage.nbytes())]


@contextmanager
def memory() -> Iterator[Memory]:
    """Watch the memory of interpreted kernels in this context."""
    from triton.runtime.interpreter import interpreter_builder as builder

    watch, run = Memory(), KERNEL.run
    load, store = builder.create_masked_load, builder.create_masked_store

    def launch(kernel: Any, *args: Any, grid: Any, **keywords: Any) -> Any:
        given = [getattr(value, "base", value) for value in (*args, *keywords.values())]  # descriptors have a base
        storages = [value.untyped_storage() for value in given if isinstance(value, Tensor)]
        watch.begin(kernel.fn.__name__, grid, storages)
        result = run(kernel, *args, grid=grid, **keywords)
        watch.end(kernel.fn.__name__)
        return result

    def program() -> int:
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        return (x * height + y) * depth + z

    def watched_load(pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        watch.touch(program(), pointers, mask)
        return load(pointers, mask, *rest, **keywords)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        watch.touch(program(), pointers, mask, value)
        return store(pointers, value, mask, *rest, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KERNEL, "run", launch)
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        yield watch


def watching(device: str) -> AbstractContextManager[Memory | None]:
    """Watch the kernels on ``device`` where they are interpreted; None where they are compiled."""
    return memory() if interpreted(torch.device(device)) else nullcontext()


def small_blocks(patch: pytest.MonkeyPatch, block: int, processors: int) -> None:
    """Blocks of this many entries, and a device with this many processors: 0 never splits a row."""
    patch.setattr(configs, "choose", lambda table, device, dtype, columns: configs.Config(block, WARPS))
    patch.setattr(configs, "processors", lambda device: processors)


def small_reductions(patch: pytest.MonkeyPatch, block: int) -> None:
    """Reductions that take this many tokens or sequences at a time."""
    patch.setattr(configs, "REDUCTION", configs.Config(block, WARPS))


def poisoned(tensor: Tensor) -> bool:
    """Whether nothing has been written to a tensor that was allocated on poisoned memory."""
    if tensor.dtype.is_floating_point:
        return bool(tensor.isnan().all())
    return bool((tensor == torch.iinfo(tensor.dtype).max).all())
