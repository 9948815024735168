"""Launches of Triton on CPU tensors by code for gfx942: :func:`install` makes the emulator Triton's device.

Of every launch :data:`LAUNCHES` keeps what was executed and what was found. Accesses are compared within a launch:
those of waves between barriers, and those of workgroups, which may run in any order.
"""

import ctypes
import functools
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fused_pref.cli.kernels.compile import TARGETS, AbsentDevice
from gfx942.build import KINDS, library, structure
from gfx942.program import Program

POISON = 0x7FA5C3E1
Finding, Start = structure("Finding"), structure("Launch")
# Values that are stored twice are the same. That lanes which hold nothing are moved about is common, and harmless.
HARMLESS = {"same value stored twice", "dpp of an inactive lane", "LDS read before written"}
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
           "fp16": "e", "fp32": "f", "fp64": "d"}  # fmt: skip
# Tensors up to this size are watched for races.
WATCHED = 2**24


@dataclass
class Launched:
    """A launch: wave-instructions by place in the program, and findings by kind with examples."""

    kernel: str
    program: Program
    count: np.ndarray
    found: Counter[str]
    examples: list[str]


LAUNCHES: list[Launched] = []
program_of = functools.cache(lambda assembly: Program(assembly, library().operation_number))
# The order of waves: rising (0), falling, one instruction of each in turn.
OPTIONS = {"order": 0}


def flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Arguments as the code takes them: tuples one by one, none that are constants."""
    if isinstance(kind, tuple):
        for part in zip(kind, value, strict=True):
            yield from flat(*part)
    elif kind != "constexpr":
        yield kind, value


def launch(assembly: str, grid: tuple[int, ...], signature: dict[str, Any], arguments: Any, metadata: Any) -> None:
    """Run a grid, and note what it did."""
    program = program_of(assembly)
    settings, size = program.settings, program.settings["kernarg_size"]
    given = [pair for kind, value in zip(signature.values(), arguments, strict=True) for pair in flat(kind, value)]
    given += [("*", None)] * 2  # scratch memory, global and for profiles, which no kernel asks for
    memory = np.zeros(size + 128, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :]
    base = memory.ctypes.data
    regions = {base: base + size}
    for (kind, value), (offset, width) in zip(given, program.arguments, strict=True):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            regions[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
            value = value.data_ptr()
        data = struct.pack("Q" if kind.startswith("*") else FORMATS[kind], 0 if value is None else value)
        memory[offset : offset + width] = np.frombuffer(data, np.uint8)
    touched = np.array([*regions.items()], np.uint64)
    watched = np.array([x for x in regions.items() if x[0] != base and x[1] - x[0] <= WATCHED], np.uint64)
    user = np.full(settings["user_sgpr_count"], POISON, np.uint32)
    first, offset = 2 * settings["user_sgpr_kernarg_segment_ptr"], settings.get("user_sgpr_kernarg_preload_offset", 0)
    user[:first] = [base & 0xFFFFFFFF, base >> 32][:first]
    user[first : first + program.preload] = memory[4 * offset :][: 4 * program.preload].view(np.uint32)
    count, found, findings = np.zeros(len(program.text), np.uint64), np.zeros(len(KINDS), np.uint64), (Finding * 64)()
    start = Start(
        code=ctypes.addressof(program.code), regions=touched.ctypes.data, watched=watched.ctypes.data,
        user=user.ctypes.data, count=count.ctypes.data, found=found.ctypes.data, most_steps=20_000_000,
        findings=ctypes.addressof(findings), entry=program.entry, regions_size=len(touched),
        watched_size=len(watched), user_size=len(user), findings_size=len(findings),
        identity=tuple(settings[f"system_sgpr_workgroup_id_{axis}"] for axis in "xyz"), grid=grid,
        threads=64 * metadata.num_warps, lds=max(metadata.shared, settings["group_segment_fixed_size"]), **OPTIONS,
    )  # fmt: skip
    number = library().run(ctypes.byref(start))
    harmful = Counter({kind: int(n) for kind, n in zip(KINDS, found, strict=True) if n and kind not in HARMLESS})
    examples = [
        f"{KINDS[x.kind]}: {program.text[x.instruction]} ({':'.join(map(str, program.sources[x.instruction]))}), "
        f"workgroup {x.workgroup}, wave {x.wave}, lane {x.lane}"
        for x in findings[:number]
        if KINDS[x.kind] in harmful
    ]
    LAUNCHES.append(Launched(metadata.name, program, count, harmful, examples))
    if harmful["out of bounds"]:
        raise IndexError(f"{metadata.name}: {examples[0]}")


class Launcher:
    """What Triton makes for a kernel, and calls with the arguments of a launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = dict(source.signature), metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        launch(function, (x, y, z), self.signature, rest[4:], self.metadata)


class Driver(AbsentDevice):
    """Triton's view of the emulator."""

    def __init__(self) -> None:
        super().__init__(TARGETS["gfx942"])
        properties = {"max_shared_mem": 65536, "warpSize": 64, "multiprocessor_count": 304, "arch": "gfx942"}
        loaded, self.launcher_cls = (None, None, 0, 0, 1024), Launcher
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties, load_binary=lambda *_: loaded)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def install() -> None:
    """Make the emulator Triton's device; the function that a kernel's launcher gets is its assembly."""
    driver.set_active(Driver())
    load = CompiledKernel._init_handles

    def loaded(kernel: CompiledKernel) -> None:
        if kernel.module is None:
            load(kernel)
            kernel.module, kernel.function = True, kernel.asm["amdgcn"]

    CompiledKernel._init_handles = loaded
