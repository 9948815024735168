"""The two forms of the loop over vocabulary tiles: the same numbers, and what each compiles to, without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from probes import watching
from shared import once

from fused_pref.ops.interface import Operands, Transform

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks.static.loops import BARRIER, INIT, LOAD, Code
from fused_pref.ops.triton import configs, gemm, statistics

# The same numbers


# Rows, D and V: one of each, none a multiple of its block, and whole blocks.
SHAPES = [(1, 1, 1), (1, 31, 2), (2, 257, 33), (17, 16, 67), (40, 8, 129), (33, 48, 64)]
PLAIN, SOFTCAP = Transform(), Transform("tanh", -0.6, 3.0)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"bias": False},
    "bias, by index, softcap": {"by_index": True, "transform": SOFTCAP},
    "bias, metrics": {"metrics": True},
    "metrics, softcap": {"bias": False, "metrics": True, "transform": SOFTCAP},
}


@pytest.fixture
def tile(kernel_device: str) -> Iterator[configs.Tile]:
    """One that fits into any device's shared memory; interpreted kernels touch nothing but their tensors."""
    with watching(kernel_device):
        interpreted = configs.interpreted(torch.device(kernel_device))
        yield configs.INTERPRETER_TILE if interpreted else configs.Tile(64, 64, 32, 16, 4, 2, False)


def partials(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, tile: configs.Tile, *, bias: bool = True,
    by_index: bool = False, metrics: bool = False, transform: Transform = PLAIN,
) -> torch.Tensor:  # fmt: skip
    """What the splits of rows leave, with Σ z and perhaps the metrics."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    indices = torch.randperm(2 * rows + 1, generator=generator)[:rows].to(device) if by_index else None
    hidden, weight = drawn(2 * rows + 1 if by_index else rows, depth), drawn(columns, depth)
    operands = Operands(hidden, weight, drawn(columns) if bias else None, indices)
    targets = torch.randint(0, columns, (rows,), generator=generator).to(device)
    return statistics.statistics_partials(operands, targets, 0, transform, True, metrics, tile)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("options", "dtype", "processors"),
    [
        ("plain", torch.float32, 1),
        ("plain", torch.bfloat16, 50),
        ("bias, by index, softcap", torch.bfloat16, 1),
        ("bias, by index, softcap", torch.float32, 50),
        ("bias, metrics", torch.float32, 1),
        ("metrics, softcap", torch.bfloat16, 50),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_forms_agree(
    shape: tuple[int, int, int], options: str, dtype: torch.dtype, processors: int, kernel_device: str,
    tile: configs.Tile, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bitwise where they are interpreted; compilers may order the sums within a block as they like."""
    monkeypatch.setattr(configs, "processors", lambda device: processors)
    nested = partials(shape, dtype, kernel_device, tile, **OPTIONS[options])
    flattened = partials(shape, dtype, kernel_device, replace(tile, flattened=True), **OPTIONS[options])
    assert nested[:, 1].isfinite().all()
    bitwise = configs.interpreted(torch.device(kernel_device))
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 0} if bitwise else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(flattened, nested, **tolerance)


# Which is taken


def test_the_nested_form_is_the_default() -> None:
    for own in configs.DEFAULTS.values():
        assert not any(tile.flattened for tile in (own.statistics, own.high_pressure, own.exact))
    assert not configs.UNALIGNED_TILE.flattened
    assert not configs.INTERPRETER_TILE.flattened


@pytest.mark.parametrize("architecture", configs.DEFAULTS)
def test_a_search_times_both_forms_where_descriptors_load(architecture: str) -> None:
    default = configs.DEFAULTS[architecture].statistics
    found = list(configs.tile_candidates(default, torch.bfloat16, flattened=True))
    assert (replace(default, flattened=True) in found) == default.descriptors
    assert not any(tile.flattened for tile in configs.tile_candidates(default, torch.bfloat16))
    assert len(set(found)) == len(found)


def test_a_search_asks_for_both_forms_of_the_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, bool] = {}

    def chooser(kernel: str, device: Any, dtype: Any, size: int, default: Any, candidates: Any, run: Any) -> Any:
        asked[kernel] = any(tile.flattened for tile in candidates)
        return default

    monkeypatch.setattr(configs, "chooser", chooser)
    operands = Operands(torch.randn(3, 16), torch.randn(32, 16), None, None)
    targets, seen = torch.zeros(3, dtype=torch.int64), torch.zeros(4, 3)
    statistics.update_statistics(seen, operands, targets, 0, PLAIN, logit_sum=False)
    gemm.tuned_tile("linear_gradient", operands, configs.INTERPRETER_TILE, PLAIN, lambda tile: None)
    assert asked == {"linear_statistics": True, "linear_gradient": False}


# What they compile to

TARGETS = ("sm_90", "sm_100")
# PTX of the log-probs' launch at D=4096 in each form, rows read by descriptor or by index; a process of its own,
# because one that interprets kernels cannot compile them.
COMPILE = """
import json, sys
from functools import partial
import torch
from fused_pref.cli.kernels import cases, compile
found = []
for target in sys.argv[1:]:
    for by_index in (False, True):
        for flattened in (False, True):
            call = partial(cases.linear_statistics, by_index=by_index)
            call = partial(cases.in_one_loop, call) if flattened else call
            launches = compile.record(partial(call, torch.bfloat16), target)
            launch = next(x for x in launches if x.kernel.__name__ == "_linear_statistics_kernel")
            assert bool(launch.constants["FLATTENED"]) == flattened
            compiled = compile.compile_launch(launch, target)
            used = compile.resources(launch, compiled, target)
            found.append({"target": target, "by_index": by_index, "flattened": flattened,
                          "ptx": compiled.asm["ptx"], **used})
print(json.dumps(found))
"""


def compiled_forms() -> list[dict[str, Any]]:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    call = [sys.executable, "-c", COMPILE, *TARGETS]
    done = subprocess.run(call, env=clean, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def forms() -> dict[tuple[str, bool], tuple[dict[str, Any], dict[str, Any]]]:
    """Nested and flattened by target and by whether rows are read by index."""
    rows = once("mainloops", compiled_forms)
    pairs: dict[tuple[str, bool], Any] = {}
    for row in rows:
        pairs.setdefault((row["target"], row["by_index"]), []).append(row | {"code": Code.of(row["ptx"])})
    assert {(a["flattened"], b["flattened"]) for a, b in pairs.values()} == {(False, True)}
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_the_pipeline_is_set_up_once(target: str, by_index: bool, forms: Any) -> None:
    nested, flattened = forms[target, by_index]
    for row, in_loops in ((nested, True), (flattened, False)):
        assert row["code"].count(INIT) >= 3
        assert bool(row["code"].in_loops(r"\bmbarrier\.(init|inval)\b")) == in_loops


@pytest.mark.slow
@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_barriers_of_a_step(target: str, by_index: bool, forms: Any) -> None:
    """No more in a step and the end of a tile together than in a step before, where rows come by descriptor.

    One more, by index, with some releases of Triton.
    """
    nested, flattened = (row["code"] for row in forms[target, by_index])
    assert 0 < flattened.count(BARRIER, flattened.step) <= nested.count(BARRIER, nested.step) + by_index
    # Nothing else is in a loop: a nested loop over tiles has more barriers around its steps.
    assert flattened.in_loops(BARRIER) == flattened.count(BARRIER, flattened.step)
    assert nested.in_loops(BARRIER) > nested.count(BARRIER, nested.step)


@pytest.mark.slow
@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_loads_run_ahead(target: str, by_index: bool, forms: Any) -> None:
    """All stages but one are loaded before the loop, so that none waits for what it has just asked for.

    A flattened loop whose addresses depend on the end of a tile is not pipelined, and nothing else shows it.
    """
    for row in forms[target, by_index]:
        code = row["code"]
        ahead = code.count(LOAD) - code.count(LOAD, code.step)
        assert ahead >= code.count(LOAD, code.step) > 0, row["flattened"]


@pytest.mark.slow
@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_neither_form_spills(target: str, by_index: bool, forms: Any) -> None:
    for row in forms[target, by_index]:
        assert (row["spills"], row["stack_bytes"]) == (0, 0), row["flattened"]
        assert row["matrix_instructions"] > 0
