"""Options of the benchmarks, the stamp of the machine in their JSON, and a table at the end."""

from typing import Any

import pytest
import torch

from benchmarks.common import Batch, Shape, stamp
from benchmarks.implementations import OPERATIONS, implementations

SHAPES = {"cpu": "8x64x32768", "cuda": "16x512x128256"}
DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}
ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where and on what to measure."""
    group = parser.getgroup("fused_pref")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    group.addoption("--shape", help="SxTxV: sequences, positions, vocabulary")
    group.addoption("--dtypes", help="comma-separated, as float32,bfloat16")


def device_of(config: pytest.Config) -> str:
    """The device to measure on."""
    return str(config.getoption("--device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case per operation, dtype, pass and implementation; those that cannot run here show as skipped."""
    device = device_of(metafunc.config)
    dtypes = (metafunc.config.getoption("--dtypes") or DTYPES[device]).split(",")
    found = implementations(device)
    metafunc.parametrize("implementation", found, ids=[implementation.name for implementation in found])
    metafunc.parametrize("backward", [False, True], ids=["forward", "both"])
    metafunc.parametrize("dtype", dtypes, scope="session")
    metafunc.parametrize("operation", OPERATIONS)


@pytest.fixture(scope="session")
def batch(request: pytest.FixtureRequest, dtype: str) -> Batch:
    """The batch of a dtype, kept while that dtype is measured."""
    device = device_of(request.config)
    shape = Shape.parse(request.config.getoption("--shape") or SHAPES[device])
    return Batch.make(shape, getattr(torch, dtype), device)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Results, for the table."""
    return ROWS


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Device and software, beside what pytest-benchmark records."""
    machine_info.update(stamp(device_of(config)))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The stamp and the peers."""
    device = device_of(config)
    obstacles = [implementation.obstacle(device) for implementation in implementations(device)]
    return [f"measured on: {stamp(device)}", *(obstacle for obstacle in obstacles if obstacle)]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table: median time, bytes moved over the floor's, and time over that of a copy of the floor's bytes."""
    if ROWS:
        terminalreporter.section("bytes and copies")
        terminalreporter.write_line(f"{'':48}{'ms':>10}{'moved/floor':>13}{'time/copy':>11}")
    for row in ROWS:
        moved = "not seen" if row["moved_bytes"] is None else f"{row['moved_bytes'] / row['floor_bytes']:.2f}"
        name = f"{row['operation']} {row['dtype']} {row['pass']} {row['implementation']}"
        terminalreporter.write_line(
            f"{name:48}{row['seconds'] * 1e3:>10.2f}{moved:>13}{row['seconds'] / row['copy_seconds']:>11.2f}"
        )
