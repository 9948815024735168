"""Options of the benchmarks, the stamp of the machine in their JSON, and tables at the end."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.logits import OPERATIONS, Batch, Shape, implementations
from benchmarks.measure import check_device, default_device, describe, environment
from fused_pref.cli.parity import DTYPES
from fused_pref.cli.usage import UsageError
from fused_pref.testing.problems import Problem, Sizes

SHAPES = {"cpu": "8x64x32768", "cuda": "16x512x128256"}
FEATURES = {"cpu": 256, "cuda": 4096}
DEFAULT_DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}
ROWS: list[dict[str, Any]] = []
LINEAR_ROWS: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Chosen:
    """Where and on what to measure."""

    device: str
    shape: Shape
    features: int
    dtypes: list[str]

    @classmethod
    def of(cls, config: pytest.Config) -> "Chosen":
        """What the options say, or the defaults of the device.

        Raises:
            UsageError, ValueError: an option that nothing can be measured with.
        """
        device = str(config.getoption("--device"))
        check_device(device)
        defaults: dict[str, dict[str, Any]] = {"--shape": SHAPES, "--features": FEATURES, "--dtypes": DEFAULT_DTYPES}
        given: dict[str, Any] = {name: config.getoption(name) for name in defaults}
        shape, features, dtypes = (
            each[device] if given[name] is None else given[name] for name, each in defaults.items()
        )
        if features < 1:
            raise UsageError(f"--features must be at least 1; got {features}")
        kinds = dtypes.split(",")
        unknown = [kind for kind in kinds if kind not in DTYPES]
        if unknown:
            raise UsageError(f"--dtypes must be of {', '.join(DTYPES)}; got {unknown[0]!r}")
        return cls(device, Shape.parse(shape), features, kinds)


CHOSEN = pytest.StashKey[Chosen]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where and on what to measure."""
    group = parser.getgroup("fused_pref")
    group.addoption("--device", default=default_device(), choices=["cpu", "cuda"])
    group.addoption("--shape", help="SxTxV: sequences, positions, vocabulary")
    group.addoption("--features", type=int, help="D, of the linear head")
    group.addoption("--dtypes", help="comma-separated, as float32,bfloat16")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options once, before anything is collected."""
    try:
        config.stash[CHOSEN] = Chosen.of(config)
    except (UsageError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case per dtype, and of the operations on logits per operation, pass and implementation.

    Implementations that cannot run here show as skipped.
    """
    chosen = metafunc.config.stash[CHOSEN]
    if "implementation" in metafunc.fixturenames:
        found = implementations(chosen.device)
        metafunc.parametrize("implementation", found, ids=[implementation.name for implementation in found])
        metafunc.parametrize("backward", [False, True], ids=["forward", "both"])
        metafunc.parametrize("operation", OPERATIONS)
    metafunc.parametrize("dtype", chosen.dtypes, scope="session")


@pytest.fixture(scope="session")
def batch(request: pytest.FixtureRequest, dtype: str) -> Batch:
    """The batch of a dtype, kept while that dtype is measured."""
    chosen = request.config.stash[CHOSEN]
    return Batch.make(chosen.shape, getattr(torch, dtype), chosen.device)


@pytest.fixture(scope="session")
def problem(request: pytest.FixtureRequest, dtype: str) -> Problem:
    """The hidden states and the head of a dtype, kept while that dtype is measured."""
    chosen = request.config.stash[CHOSEN]
    sizes = Sizes(chosen.shape.sequences, chosen.shape.length, chosen.features, chosen.shape.columns)
    return Problem.make(sizes, getattr(torch, dtype), chosen.device)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Results of the operations on logits, for the table."""
    return ROWS


@pytest.fixture
def linear_rows() -> list[dict[str, Any]]:
    """Results of the linear head, for the table."""
    return LINEAR_ROWS


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Device and software, beside what pytest-benchmark records."""
    machine_info.update(environment(config.stash[CHOSEN].device))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The machine and the peers."""
    device = config.stash[CHOSEN].device
    obstacles = [implementation.obstacle(device) for implementation in implementations(device)]
    return [f"measured on: {describe(device)}", *(obstacle for obstacle in obstacles if obstacle)]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Median time over what it is held against: bytes and a copy of them, or the bare products."""
    write = terminalreporter.write_line
    if ROWS:
        terminalreporter.section("bytes and copies")
        write(f"{'':48}{'ms':>10}{'moved/floor':>13}{'time/copy':>11}")
    for row in ROWS:
        moved = "not seen" if row["moved_bytes"] is None else f"{row['moved_bytes'] / row['floor_bytes']:.2f}"
        name = f"{row['operation']} {row['dtype']} {row['pass']} {row['implementation']}"
        write(f"{name:48}{row['seconds'] * 1e3:>10.2f}{moved:>13}{row['seconds'] / row['copy_seconds']:>11.2f}")
    if LINEAR_ROWS:
        terminalreporter.section("bare products")
        write(f"{'':60}{'ms':>10}{'time/products':>15}")
    for row in LINEAR_ROWS:
        write(f"{row['name']:60}{row['seconds'] * 1e3:>10.2f}{row['seconds'] / row['floor']:>15.2f}")
