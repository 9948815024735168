"""Programs of a launch share nothing that one of them writes: every kernel, over several programs in each dimension.

The same is watched in all tests of the kernels that ask for :func:`probes.memory`.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from probes import Memory, memory, small_blocks, small_reductions
from sanitize import steps
from wrong_kernels import chase_kernel, overlap_kernel

import fused_pref
from fused_pref.ops.triton import chunk, configs, exponentials

ROOT = Path(__file__).parents[2]
SOURCES = list(Path(fused_pref.__file__).parent.glob("ops/triton/*.py"))
# One program walks all sequences.
ALONE = {"_pair_objective_kernel", "_unpaired_objective_kernel"}
PLANES = {"_token_logps_fwd_kernel", "_token_logps_bwd_kernel", "_add_target_rows_kernel"}


@pytest.fixture
def watch(kernel_device: str) -> Iterator[Memory]:
    if kernel_device != "cpu":
        pytest.skip("memory is watched by the interpreter")
    with memory() as watched:
        yield watched


@pytest.mark.slow
def test_programs_share_nothing_that_is_written(watch: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch, 8, 40)
    small_reductions(monkeypatch, 4)
    for name in ("ROWS", "SELECTED_BIAS"):
        monkeypatch.setattr(configs, name, configs.Config(16, 1))
    monkeypatch.setattr(exponentials, "PROBE", 16)
    for _, call in steps("cpu", 20, 16, 32):
        call()
    kernels = {name for path in SOURCES for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
    assert watch.grids.keys() == kernels
    for kernel, grid in watch.grids.items():
        assert (grid[0] > 1) == (kernel not in ALONE), kernel
        assert (grid[1] > 1) == (kernel in PLANES), kernel
        assert grid[2] == 1, kernel


def test_nothing_is_combined_by_atomics() -> None:
    """Whose order is not the same every time, and which the check above would not see."""
    assert len(SOURCES) > 10
    assert not [path.name for path in SOURCES if "atomic" in path.read_text()]


def test_two_writers_are_noticed(watch: Memory) -> None:
    out = torch.zeros(13)
    with pytest.raises(AssertionError, match="overlap_kernel: two programs write the same element"):
        overlap_kernel[3,](out, BLOCK=4)
    # They write the same value, which no comparison of results would show.
    assert out.tolist() == list(range(13))
    overlap_kernel[1,](out, BLOCK=4)


def test_readers_of_what_another_program_writes_are_noticed(watch: Memory) -> None:
    values = torch.zeros(5)
    with pytest.raises(AssertionError, match="chase_kernel: a program reads what another writes"):
        chase_kernel[1, 5](values, 5)
    chase_kernel[1, 1](values, 5)


def test_rows_of_padding_share_a_place(watch: Memory) -> None:
    """Where they write the same; other values are noticed."""
    out, indices = torch.zeros(4, 8), torch.tensor([0, 1, 3, 3])
    rows, factor = torch.ones(4, 8), torch.tensor([1.0, 1.0, 0.0, 0.0])
    chunk.scatter_rows(out, rows, factor, indices)
    factor[3] = 2.0
    with pytest.raises(AssertionError, match="_scatter_rows_kernel: two programs write the same element"):
        chunk.scatter_rows(out, rows, factor, indices)


def test_accesses_of_different_widths_are_compared(watch: Memory) -> None:
    """Halves of entries are entries of half the width."""
    storage = torch.zeros(4).untyped_storage()
    pointers = SimpleNamespace(data=np.array([storage.data_ptr()], np.uint64), get_element_ty=lambda: tl.float32)
    half = SimpleNamespace(data=pointers.data + np.uint64(2), get_element_ty=lambda: tl.float16)
    mask, value = SimpleNamespace(data=np.array([True])), SimpleNamespace(data=np.zeros(1, np.float32))
    watch.begin("some_kernel", (2,), [storage])
    watch.touch(0, pointers, mask, value)
    watch.touch(0, half, mask)
    watch.end("some_kernel")
    watch.touch(1, half, mask)
    with pytest.raises(AssertionError, match="some_kernel: a program reads what another writes"):
        watch.end("some_kernel")


@pytest.mark.slow
def test_sanitize_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "tests/helpers/sanitize.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "there is no GPU" in done.stderr
