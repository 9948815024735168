"""The GPUs of a prediction, and compiled code as a list of instructions."""

import re
from dataclasses import dataclass
from typing import Any

import triton

from fused_pref.cli.kernels import compile
from fused_pref.ops import devices

# Seconds of latency of memory under load, typical.
LATENCY = 0.8e-6
SPECIAL = r"MUFU|v_exp_f32|v_rcp_f32|v_log_f32"
MATRIX = r"MMA|mfma"
LOAD = r"LDG|(global|buffer)_load"


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do; rates of products and of memory are those of :data:`fused_pref.ops.devices.GPUS`.

    Attributes:
        name: of the GPU.
        processors: its multiprocessors or compute units.
        clock: cycles per second.
        shared: bytes of shared memory of a processor.
        registers: per processor.
        issue: lanes that issue an instruction in a cycle, and those that evaluate exponentials.
        dies: to which programs go in turn, each with a cache of its own before the last one.
        die_cache: bytes of each of those caches.
        threads: that a processor holds.
    """

    name: str
    processors: int
    clock: float
    shared: int
    registers: int
    issue: tuple[int, int]
    dies: int = 1
    die_cache: int = 0
    threads: int = 2048

    def programs(self, used: dict[str, Any], lanes: int) -> int:
        """Programs of ``lanes`` threads that a processor holds, by what :func:`compile.resources` found."""
        by_registers = self.registers // (-(-used["registers"] // 8) * 8 * lanes)
        by_memory = self.shared // used["shared_bytes"] if used["shared_bytes"] else self.threads
        return max(1, min(by_registers, by_memory, self.threads // lanes))


GPUS = {
    "sm_80": Gpu("A100", 108, 1.41e9, 163 << 10, 65536, (128, 16)),
    "sm_90": Gpu("H200", 132, 1.7e9, 227 << 10, 65536, (128, 16)),
    "sm_100": Gpu("B200", 148, 1.85e9, 227 << 10, 65536, (128, 16)),
    "gfx942": Gpu("MI300X", 304, 2.1e9, 64 << 10, 131072, (64, 16), 8, 4 << 20),
}


def assumptions() -> str:
    """What is assumed of each GPU, a line each."""
    return "\n".join(
        f"- {gpu.name} ({target}): {devices.GPUS[target].rates[2] / 1e12:g} TFLOP/s, "
        f"{devices.GPUS[target].bandwidth / 1e12:g} TB/s, figures of {devices.GPUS[target].measured}; "
        f"{gpu.processors} processors at {gpu.clock / 1e9:g} GHz that issue to {gpu.issue[0]} lanes a cycle, "
        f"{gpu.issue[1]} of which evaluate exponentials"
        for target, gpu in GPUS.items()
    )


def lanes_of(used: dict[str, Any], target: str) -> int:
    """Threads of a program."""
    return used["num_warps"] * compile.TARGETS[target].warp_size


@dataclass(frozen=True)
class Listing:
    """Instructions in order, and where each branch stands and leads to."""

    code: list[str]
    branches: list[tuple[int, int]]

    @classmethod
    def of(cls, compiled: triton.compiler.CompiledKernel) -> "Listing":
        """SASS, or AMD's assembly with its labels."""
        if "cubin" in compiled.asm:
            text = compile.disassemble(compiled.asm["cubin"], "-sass")
            found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)
            indices = {f"{int(address, 16):x}": i for i, (address, _) in enumerate(found)}
            code = [operation for _, operation in found]
            jumps = ((i, re.search(r"BRA.*?0x(\w+)", operation)) for i, operation in enumerate(code))
        else:
            lines = [line.strip() for line in compiled.asm["amdgcn"].splitlines()]
            code = [line for line in lines if re.match(r"(v|s|ds|buffer|global)_|\.LBB", line)]
            indices = {match[1]: i for i, line in enumerate(code) if (match := re.match(r"(\.LBB\w+):", line))}
            jumps = ((i, re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)) for i, line in enumerate(code))
        return cls(code, [(i, indices.get(jump[1], i)) for i, jump in jumps if jump])

    @property
    def loops(self) -> list[tuple[int, int]]:
        """First instruction of each loop, and the one behind its last."""
        return [(target, i + 1) for i, target in self.branches if target < i]

    def count(self, pattern: str, start: int, end: int) -> int:
        """Instructions of a range that match."""
        return sum(bool(re.search(pattern, operation)) for operation in self.code[start:end])


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
