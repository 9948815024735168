"""What the kernels compile to, without a GPU: the command, in a process of its own.

For sm_90; with ``FUSED_PREF_COMPILE=all``, as in ``.ci/run``, for all architectures, which takes minutes.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shared import once

import fused_pref
from fused_pref.ops.devices import GPUS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

TARGETS = tuple(GPUS) if os.environ.get("FUSED_PREF_COMPILE") == "all" else ("sm_90",)
KEYS = {
    "kernel", "target", "config", "dtype", "num_warps", "registers", "stack_bytes", "shared_bytes",
    "matrix_instructions", "wide_loads",
}  # fmt: skip
COMMAND = "import sys; from fused_pref.__main__ import main; sys.exit(main(['kernels', *sys.argv[1:]]))"
FUSED = {f"_linear_{name}_kernel" for name in ("statistics", "exponentials", "exponentials_again", "gradient")}
STREAMING = {"_token_logps_fwd_kernel", "_token_logps_bwd_kernel"}
# Rows that cannot be accessed 16 bytes at a time.
NARROW = {"odd vocabulary", "any strides", "small vocabulary"}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Cases that take an unusual head or objective.
RARE = {"odd vocabulary", "exponentials, bias", "sigmoid, NLL, normalizers", "simpo, alpha", "ema, class mean"}
# Bytes a thread that they may spill, by Triton's minor version; with others none. Eight are a pair of registers that
# ptxas spills to fit one more program into a processor.
SPILLS = {"3.6": 48, "3.7": 8}
# Label, sequence boundaries, statistics, upstream gradient: what a program reads or writes once, whatever its block.
SCALARS = 8


def command(*arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command, after the statements of ``before``."""
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    call = [sys.executable, "-c", before + COMMAND, *arguments]
    return subprocess.run(call, env=clean | environment, capture_output=True, text=True, timeout=2400)


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """All rows."""
    return once("kernels", lambda: json.loads(command("--json", "--targets", ",".join(TARGETS)).stdout))


def streaming(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kernel"] in STREAMING and row["case"] not in NARROW]


@pytest.mark.slow
def test_rows_have_the_keys(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        assert row.keys() >= KEYS
        assert row["registers"] > 0, row
        assert row["num_warps"] > 0, row


@pytest.mark.slow
def test_rows_are_distinct(rows: list[dict[str, Any]]) -> None:
    names = [(row["kernel"], row["case"], row["config"], row["dtype"], row["target"]) for row in rows]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_target(rows: list[dict[str, Any]]) -> None:
    sources = Path(fused_pref.__file__).parent.rglob("ops/triton/*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert kernels >= STREAMING
    compiled = {(row["kernel"], row["target"]) for row in rows}
    assert compiled == {(kernel, target) for kernel in kernels for target in TARGETS}


@pytest.mark.slow
def test_every_configuration_is_compiled(rows: list[dict[str, Any]]) -> None:
    from fused_pref.ops.triton import configs

    fields = {"_token_logps_fwd_kernel": "forward", "_token_logps_bwd_kernel": "backward"}
    for target, (kernel, field) in itertools.product(TARGETS, fields.items()):
        for size, config in getattr(configs.DEFAULTS[target], field).items():
            for dtype in (dtype for dtype in BYTES if BYTES[dtype] == size):
                assert any(
                    (row["kernel"], row["target"], row["dtype"], row["num_warps"])
                    == (kernel, target, dtype, config.num_warps)
                    and f"BLOCK={config.block}" in row["config"].split()
                    for row in rows
                ), (kernel, target, dtype, config)


@pytest.mark.slow
def test_every_tile_is_compiled(rows: list[dict[str, Any]]) -> None:
    from fused_pref.ops.triton import configs

    statistics, gradient = "_linear_statistics_kernel", "_linear_gradient_kernel"
    tiles = [
        (statistics, "by index", "statistics"),
        (statistics, "sums, softcap", "high_pressure"),
        ("_linear_exponentials_kernel", "exponentials", "exponentials"),
        (gradient, "plain", "statistics"),
        (gradient, "softcap", "high_pressure"),
        (gradient, "selected rows", "statistics"),
        ("_selected_weight_kernel", "plain", "selected"),
        ("_selected_hidden_kernel", "plain", "selected"),
    ]
    for kernel, case, field in tiles:
        for target, size in itertools.product(TARGETS, (2, 4)):
            own = configs.DEFAULTS[target]
            tile = own.exact if size == 4 else getattr(own, field)
            found = [
                row
                for row in rows
                if (row["kernel"], row["case"], row["target"], BYTES.get(row["dtype"])) == (kernel, case, target, size)
            ]
            expected = {f"ROWS={tile.rows}", f"COLUMNS={tile.columns}", f"DEPTH={tile.depth}"}
            assert any(expected <= set(row["config"].split()) for row in found), (kernel, case, target, tile)
            assert {row["num_warps"] for row in found} == {tile.num_warps}
    unaligned = {f"ROWS={configs.UNALIGNED_TILE.rows}", f"DEPTH={configs.UNALIGNED_TILE.depth}"}
    odd = [row for row in rows if row["case"] == "odd depth" and row["kernel"] in (statistics, gradient)]
    assert len(odd) == 2 * len(TARGETS)
    assert all(unaligned <= set(row["config"].split()) for row in odd)


@pytest.mark.slow
def test_products_use_matrix_instructions(rows: list[dict[str, Any]]) -> None:
    """16-bit products everywhere; exact ones of float32 on NVIDIA's only where they may be rounded."""
    kernels = {*FUSED, "_selected_weight_kernel", "_selected_hidden_kernel"}
    products = [row for row in rows if row["kernel"] in kernels]
    assert {(row["kernel"], row["target"]) for row in products} == set(itertools.product(kernels, TARGETS))
    for row in products:
        exact = row["dtype"] == "fp32" and "PRECISION=ieee" in row["config"] and row["target"] != "gfx942"
        assert (row["matrix_instructions"] > 0) != exact, row


@pytest.mark.slow
def test_weights_are_read_through_descriptors(rows: list[dict[str, Any]]) -> None:
    """On the architectures that have them, where rows are whole 16 bytes and in 16-bit dtypes."""
    for row in rows:
        if row["kernel"] in FUSED:
            expected = row["target"] in ("sm_90", "sm_100") and row["dtype"] != "fp32" and "depth" not in row["case"]
            assert ("WEIGHT_DESCRIPTOR" in row["config"].split()) == expected, row


def rare(row: dict[str, Any]) -> bool:
    """Whether hardly a call works by a row.

    Products of float32 are the vendor's, unless fused ones are forced; exponentials are repeated only where a row has
    risen far above its pivot.
    """
    again = row["kernel"] == "_linear_exponentials_again_kernel"
    return again or (row["kernel"] in FUSED and row["dtype"] == "fp32") or row["case"] in RARE


@pytest.mark.slow
def test_defaults_do_not_spill(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if (row["stack_bytes"] or row["spills"]) and not rare(row)] == []


@pytest.mark.slow
def test_rare_variants_spill_within_the_budget(rows: list[dict[str, Any]]) -> None:
    allowed = SPILLS.get(importlib.metadata.version("triton").rpartition(".")[0], 0)
    assert [row for row in rows if rare(row) and max(row["stack_bytes"], row["spills"]) > allowed] == []


@pytest.mark.slow
def test_streams_are_wide(rows: list[dict[str, Any]]) -> None:
    found = streaming(rows)
    assert {(row["kernel"], row["dtype"], row["target"]) for row in found} == {
        (kernel, dtype, target) for kernel in STREAMING for dtype in BYTES for target in TARGETS
    }
    for row in found:
        assert row["wide_loads"] > 0, row
        assert (row["wide_stores"] > 0) == (row["kernel"] == "_token_logps_bwd_kernel"), row


@pytest.mark.slow
def test_each_logit_is_read_once(rows: list[dict[str, Any]]) -> None:
    for row in streaming(rows):
        assert row["read_per_entry"] == BYTES[row["dtype"]], row
        assert row["loads"] - row["wide_loads"] <= SCALARS, row


@pytest.mark.slow
def test_each_gradient_is_written_once(rows: list[dict[str, Any]]) -> None:
    for row in streaming(rows):
        backward = row["kernel"] == "_token_logps_bwd_kernel"
        assert row["written_per_entry"] == (BYTES[row["dtype"]] if backward else 0), row
        assert row["stores"] - row["wide_stores"] <= (0 if backward else SCALARS), row


@pytest.mark.slow
def test_table_names_every_row(rows: list[dict[str, Any]]) -> None:
    done = command("--targets", "sm_90", "--cases", "packed")
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split()[:3] == ["kernel", "case", "target"]
    assert all(line.startswith("_") and " sm_90 " in line for line in lines)
    assert len(lines) == len([row for row in rows if row["target"] == "sm_90" and "packed" in row["case"]])


@pytest.mark.slow
def test_spills_and_missing_cases_fail() -> None:
    """Thirty float64 of a thread do not fit into 32 registers, whatever the compiler."""
    before = (
        "from fused_pref.cli.kernels import cases; from fused_pref.ops.triton import configs;"
        "configs.Config.options = property(lambda self: {'num_warps': self.num_warps, 'maxnreg': 32});"
        "cases.CASES[:] = [case for case in cases.CASES if case.name == 'simpo, alpha'];"
    )
    done = command("--json", "--targets", "sm_90", before=before)
    assert done.returncode == 1
    assert "_pair_objective_kernel (simpo, alpha, fp64) spills on sm_90" in done.stderr
    assert "_expand_kernel has no case" in done.stderr
    assert [row["stack_bytes"] > 0 for row in json.loads(done.stdout)] == [True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
        (("--cases", "nothing"), {}, "--cases: no case has 'nothing' in its name"),
        (("--targets", "sm_90,sm_12"), {}, f"--targets: must be of {','.join(GPUS)}; got 'sm_12'"),
    ],
)
def test_refusals(arguments: tuple[str, ...], environment: dict[str, str], message: str) -> None:
    done = command(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
