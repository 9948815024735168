"""What the emulator has to find: one kernel for each finding, wrong as written or made wrong in its assembly."""

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(os.environ.get("FUSED_PREF_EMULATE") != "gfx942", reason="needs FUSED_PREF_EMULATE=gfx942"),
]
Findings = Callable[[], dict[str, int]]
# Releases of Triton differ in whether products and sums are fused unless told.
ONE, EIGHT = ({"num_warps": warps, "enable_fp_fusion": True} for warps in (1, 8))


@triton.jit
def copy_kernel(x, out, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + shift))


@triton.jit
def number_kernel(out, BLOCK: tl.constexpr):
    """Every program writes its number to the same entries."""
    tl.store(out + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int32) + tl.program_id(0))


@triton.jit
def reverse_kernel(values, BLOCK: tl.constexpr):
    """The barrier does not wait for the loads before it."""
    i = tl.arange(0, BLOCK)
    x = tl.load(values + i)
    tl.debug_barrier()
    tl.store(values + (BLOCK - 1 - i), x)


@triton.jit
def sum_kernel(x, out, BLOCK: tl.constexpr):
    """Warps exchange their sums in LDS."""
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


def sum_of(edit: Callable[[str], str]) -> None:
    """Sum 512 values, then again by the edited assembly."""
    from gfx942 import emulator

    x, out = torch.arange(1.0, 513.0), torch.zeros(1)
    kernel: Any = sum_kernel[1,](x, out, BLOCK=512, **EIGHT)
    assert out.item() == 512 * 513 / 2
    assert not emulator.LAUNCHES[-1].found
    edited = edit(kernel.asm["amdgcn"])
    assert edited != kernel.asm["amdgcn"]
    emulator.launch(edited, (1, 1, 1), dict(kernel.src.signature), (x, out, 512), kernel.metadata)


def without(pattern: str) -> Callable[[str], str]:
    """Remove the instructions that match, all of them."""
    return lambda assembly: re.sub(rf"^\t{pattern}[^\n]*\n", "", assembly, flags=re.M)


@pytest.mark.parametrize("store", [False, True])
def test_an_access_out_of_bounds(store: bool, emulated: Findings) -> None:
    """The tensor is a part of an array, so that a miss reaches memory that is there."""
    array = np.zeros(256, np.float32)
    part, whole = torch.from_numpy(array[:64]), torch.ones(256)
    copy_kernel[1,](part, whole, 0, BLOCK=64, **ONE)
    assert not emulated()
    x, out, programs, shift = (whole, part, 2, 0) if store else (part, whole, 1, 64)
    with pytest.raises(IndexError, match=rf"copy_kernel: out of bounds: \w+_{'store' if store else 'load'}_"):
        copy_kernel[programs,](x, out, shift, BLOCK=64, **ONE)
    assert emulated()["out of bounds"] == 64
    assert (array[64:] == 0).all()


def test_an_access_beyond_the_lds(emulated: Findings) -> None:
    sum_of(lambda assembly: re.sub(r"(\tds_write_b32 v\d+, v\d+)\n", r"\1 offset:65532\n", assembly, count=1))
    assert emulated()["LDS out of bounds"]


def test_a_race_between_workgroups(emulated: Findings) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    number_kernel[1,](out, BLOCK=64, **ONE)
    assert not emulated()
    number_kernel[2,](out, BLOCK=64, **ONE)
    assert set(emulated()) == {"race between workgroups"}


def test_a_race_in_the_lds(emulated: Findings) -> None:
    sum_of(without("s_barrier"))
    assert "LDS race" in emulated()


@pytest.mark.parametrize("count", ["vmcnt", "lgkmcnt"])
def test_a_load_that_is_not_waited_for(count: str, emulated: Findings) -> None:
    """Of memory, and of the LDS."""
    after = "buffer_load_dword|global_load_dword" if count == "vmcnt" else "ds_read"

    def edit(assembly: str) -> str:
        head, load, rest = re.split(rf"(\t(?:{after})[^\n]*\n)", assembly, maxsplit=1)
        return head + load + without(rf"s_waitcnt {count}\(0\)")(rest)

    sum_of(edit)
    assert set(emulated()) == {"register read before its load was waited for"}


def test_lds_that_is_not_waited_for_before_the_barrier(emulated: Findings) -> None:
    sum_of(lambda assembly: re.sub(r"\ts_waitcnt lgkmcnt\(0\)\n(\ts_barrier\n)", r"\1", assembly, count=1))
    assert "LDS not waited for before the barrier" in emulated()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_memory_that_is_not_waited_for_before_the_barrier(order: int, emulated: Findings) -> None:
    from gfx942 import emulator

    emulator.OPTIONS["order"] = order
    reverse_kernel[1,](torch.randn(512), BLOCK=512, **EIGHT)
    assert set(emulated()) == {"not waited for before the barrier"}


def test_an_endless_kernel(emulated: Findings) -> None:
    sum_of(lambda assembly: assembly.replace("\ts_barrier\n", ".Lagain:\n\ts_branch .Lagain\n", 1))
    assert set(emulated()) == {"endless"}
