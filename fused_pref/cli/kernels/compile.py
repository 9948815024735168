"""Compile launches for a GPU that need not be there, and read from the code what it uses.

A launcher is called with meta tensors; its launches are recorded in place of being run, and go through Triton's own JIT
under a driver that only names the target. What is compiled is therefore what a launch would compile: the same
configuration, flags, and specialisation of pointers and integers.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fused_pref.ops.triton import configs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The matrix instructions of each; one of an elder architecture would be slow.
MATRIX = {
    "sm_80": re.compile(r"\bmma\.sync\b"),
    "sm_90": re.compile(r"\bwgmma\.mma_async\b"),
    "sm_100": re.compile(r"\btcgen05\.mma\b"),
    "gfx942": re.compile(r"\bv_s?mfma\w*\b"),
}
# Of the GPUs that the targets stand for, the fewest: rows are split among at least so many.
PROCESSORS = 108

# Vector accesses to global memory with their bits; AMD's scalar loads carry arguments, not data.
PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.(?!v\d|b\d)\w+(?:::\w+)*)*(?:\.v(\d))?\.[bsuf](\d+)")
AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)")
AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
# Bits of a wide access.
WIDE = 128


class AbsentDevice(DriverBase):
    """The driver of a device that can be compiled for but not used."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen by Triton itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Only needed to launch."""
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target

    def get_current_device(self) -> Any:
        """The key under which a kernel keeps what it compiled."""
        return str(self.target)

    def get_current_stream(self, device: Any) -> int:
        """None is used."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Tensors without memory."""
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        """Only needed to launch."""
        raise NotImplementedError


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments and options of one launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def bound(self) -> dict[str, Any]:
        """The arguments by name."""
        given = {name: value for name, value in self.keywords.items() if name in self.kernel.arg_names}
        bound = self.kernel.signature.bind(*self.arguments, **given)
        bound.apply_defaults()
        return dict(bound.arguments)

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments."""
        bound = self.bound
        return {p.name: bound[p.name] for p in self.kernel.params if p.is_constexpr}

    @property
    def flags(self) -> str:
        """What its code depends on, in a line: constexpr arguments, and tensors that are not given."""
        constants, absent = self.constants, [f"-{name}" for name, value in self.bound.items() if value is None]
        if "NAMES" in constants:
            constants["NAMES"] = "+".join(constants["NAMES"])
            del constants["TERMS"]
        return " ".join(
            [*(name if value is True else f"{name}={value}" for name, value in constants.items() if value), *absent]
        )


def record(launcher: Callable[[], object], target: str, processors: int = PROCESSORS) -> list[Launch]:
    """The launches that ``launcher`` makes on a device of this architecture and size; none is run."""
    launches: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(kernel, arguments, keywords))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "architecture", return_value=target),
        mock.patch.object(configs, "processors", return_value=processors),
    ):
        launcher()
    return launches


def compile_launch(launch: Launch, target: str) -> CompiledKernel:
    """What a launch on this target would run."""
    driver.set_active(AbsentDevice(TARGETS[target]))
    return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.keywords)


def resources(launch: Launch, compiled: CompiledKernel, target: str) -> dict[str, Any]:
    """What compiled code uses.

    Returns:
        registers per thread; stack_bytes per thread, in which spilled registers lie; spills, the registers or bytes
        among them; sgpr_spills, scalar registers kept in vector ones (AMD, harmless); shared_bytes per program;
        matrix_instructions; loads and stores of global memory as they stand in the code, and the wide ones among them;
        read_per_entry and written_per_entry, the bytes that the wide ones move per entry of a BLOCK, None without one.
    """
    if "ptx" in compiled.asm:
        code = compiled.asm["ptx"]
        usage = _nvidia_usage(compiled.asm["cubin"])
        accesses = [(kind, int(n or 1) * int(bits)) for kind, n, bits in PTX_ACCESS.findall(code)]
    else:
        code = compiled.asm["amdgcn"]
        usage = _amd_usage(code)
        accesses = [(kind, AMD_BITS[bits]) for kind, bits in AMD_ACCESS.findall(code)]
    loads = [bits for kind, bits in accesses if kind in ("ld", "load")]
    stores = [bits for kind, bits in accesses if kind in ("st", "store")]
    wide_loads, wide_stores = ([bits for bits in some if bits >= WIDE] for some in (loads, stores))
    warps = compiled.metadata.num_warps
    block = launch.constants.get("BLOCK")
    bytes_per_entry = warps * TARGETS[target].warp_size / block / 8 if block else None
    return {
        "num_warps": warps,
        **usage,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": len(MATRIX[target].findall(code)),
        "wide_loads": len(wide_loads),
        "wide_stores": len(wide_stores),
        "loads": len(loads),
        "stores": len(stores),
        "read_per_entry": bytes_per_entry and sum(wide_loads) * bytes_per_entry,
        "written_per_entry": bytes_per_entry and sum(wide_stores) * bytes_per_entry,
    }


def disassemble(cubin: bytes, *options: str) -> str:
    """What NVIDIA's cuobjdump, which comes with Triton, says of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _nvidia_usage(cubin: bytes) -> dict[str, int]:
    usage = disassemble(cubin, "--dump-resource-usage")
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "stack_bytes": stack + local, "spills": stack + local, "sgpr_spills": 0}


def _amd_usage(code: str) -> dict[str, int]:
    keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    registers, stack, spills, sgpr_spills = (int(re.findall(rf"\.{key}:\s*(\d+)", code)[0]) for key in keys)
    return {"registers": registers, "stack_bytes": stack, "spills": spills, "sgpr_spills": sgpr_spills}
