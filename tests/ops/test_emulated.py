"""Compiled code, executed: tests of the kernels again, by an emulator of an MI300X (``tests/gfx942``), without a GPU.

Each runs in a process of its own, because one that interprets kernels cannot compile them. Findings fail a test there:
accesses out of bounds, races, registers and memory that are used before they were waited for.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gfx942.build import compiler

ROOT = Path(__file__).parents[2]
HEAD = (
    "test_layouts or test_hard_logits and risen or test_strides and grouped or test_exponentials and 257 "
    "or test_statistics_and_gradient and 257 and True or test_plans and vocab_major and cpo and True-16 "
    "or test_both_forms_agree and 257"
)
# Tests, and the fewest launches of compiled code that they make.
PARTS = {
    "the emulator itself, shifts, random cases": (
        [
            *("tests/gfx942", "tests/benchmarks/test_static_counts.py", "tests/ops/test_kernels.py"),
            *("tests/ops/test_in_place.py", "tests/interface/test_properties.py", "--hypothesis-seed=0"),
            *("-k", "gfx942 or test_static_counts or test_shift or test_in_place or test_properties and kernels"),
        ],
        130,
    ),
    "kernels": (["tests/ops/test_kernels.py", "tests/ops/test_scatter_rows.py", "-m", "not slow"], 200),
    "fused head": (["tests/head/test_fused.py", "tests/ops/test_mainloop.py", "-k", HEAD], 200),
}

NONE = f"CXX must be a C++ compiler; got {os.environ['CXX']}" if "CXX" in os.environ else "no C++ compiler here"
pytestmark = [pytest.mark.emulated, pytest.mark.skipif(compiler() is None, reason=NONE)]


def emulate(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run tests on the emulator."""
    environment = {**os.environ, "FUSED_PREF_EMULATE": "gfx942", "FUSED_PREF_PROPERTIES": "16", **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("compiler", ["/nonexistent", "false"])
def test_a_compiler_that_fails_is_one_error(compiler: str) -> None:
    done = emulate("tests/gfx942", CXX=compiler)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.startswith("ERROR: CXX must be a C++20 compiler that builds ")
    assert compiler in done.stderr
    assert "test_" not in done.stdout


@pytest.mark.parametrize("part", PARTS)
def test_compiled_code(part: str) -> None:
    arguments, least = PARTS[part]
    done = emulate(*arguments)
    assert done.returncode == 0, done.stdout[-4000:]
    (line,) = re.findall(r"^emulated: .*", done.stdout, re.M)
    print(line)
    launches, instructions, findings = map(int, re.findall(r"\d+", line))
    assert launches >= least
    assert instructions > 1000 * launches
    assert findings == 0
