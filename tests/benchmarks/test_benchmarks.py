"""The pytest-benchmark suites run, on a tiny shape and untimed, cover the interface, and count bytes as they say."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import make_batch

import fused_pref as fp
from benchmarks import bench_linear, conftest, logits, measure
from benchmarks.logits import Shape, implementations
from benchmarks.traffic import occupied, traffic

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("benchmarks/bench_logits.py", "benchmarks/bench_linear.py")


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *arguments, "--benchmark-disable", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_suites_run() -> None:
    """Both in one process, in the two dtypes that are the default on a CPU."""
    result = started(*SUITES, "--shape", "2x3x17", "--features", "8", "--device", "cpu")
    assert result.returncode == 0, result.stdout
    absent = [found.name for found in implementations("cpu") if found.obstacle("cpu")]
    assert "liger" in absent
    # Two passes, two dtypes: of each implementation all of them run or all of them show as skipped.
    cases, head = len(logits.OPERATIONS) * 2 * 2, len(bench_linear.OPERATIONS) * len(bench_linear.MODES) * 2
    assert f"{cases * (4 - len(absent)) + head} passed, {cases * len(absent)} skipped" in result.stdout
    assert all(f"{name} is absent: " in result.stdout for name in absent)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shape", "8x64", "--shape must be SxTxV with an even S, as 8x64x32768; got '8x64'"),
        ("--shape", "", "--shape must be SxTxV"),
        ("--dtypes", "float32,floatx", "--dtypes must be of float32, bfloat16, float16; got 'floatx'"),
        ("--features", 0, "--features must be at least 1; got 0"),
        pytest.param(
            "--device",
            "cuda",
            "--device cuda needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_are_refused(option: str, value: str | int, message: str) -> None:
    options = {"--device": "cpu", "--shape": None, "--features": None, "--dtypes": None, option: value}
    config: Any = SimpleNamespace(getoption=options.__getitem__, stash={})
    with pytest.raises(pytest.UsageError, match=f"^{re.escape(message)}"):
        conftest.pytest_configure(config)
    assert config.stash == {}


@pytest.mark.slow
def test_options_are_refused_once() -> None:
    """In a line, before anything is collected."""
    result = started(*SUITES, "--dtypes", "float32,floatx", "--device", "cpu")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.startswith("ERROR: --dtypes must be of float32, bfloat16, float16; got 'floatx'")
    assert result.stderr.count("--dtypes") == 1
    assert "Traceback" not in result.stdout + result.stderr


def test_suites_cover_every_function() -> None:
    functions = {name for name in fp.__all__ if name.endswith(("_loss", "_logps"))}
    covered = {name.split(",")[0] for name in (*logits.OPERATIONS, *bench_linear.OPERATIONS)}
    assert covered == functions
    kinds = {(kind, update) for kind in ("running_mean", "ema") for update in ("forward", "step")}
    assert {(s.kind, s.update) for s in (make() for make in bench_linear.DELTAS.values())} >= kinds


def test_traffic_of_plain_operations() -> None:
    x, y = torch.ones(3, 10), torch.ones(1, 10).expand(3, 10)
    assert occupied(y) == 40
    assert traffic(lambda: x + y) == 120 + 40 + 120
    assert traffic(lambda: x.mul_(2)) == 240
    assert traffic(lambda: x.copy_(y)) == 160
    assert traffic(lambda: torch.zeros_like(x)) == 120
    assert traffic(lambda: torch.empty_like(x)[1:].t()) == 0
    index = torch.zeros(3, 1, dtype=torch.int64)
    assert traffic(lambda: x.gather(1, index)) == 12 + 24 + 12


def test_traffic_of_eager_and_of_ours() -> None:
    """Log-softmax, its backward and the gather's zeros are six passes over the logits; ours are three."""
    batch = make_batch(2, 3, 5000)
    leaf, size = batch.logits.requires_grad_(), 2 * 3 * 5000 * 4

    def eager() -> None:
        logps = leaf.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])
        torch.autograd.grad(logps.sum(), leaf)

    assert round(traffic(eager) / size, 2) == 6.0
    ours = traffic(lambda: torch.autograd.grad(fp.token_logps(leaf, batch.labels).sum(), leaf))
    assert round(ours / size, 2) == 3.0


def test_shape() -> None:
    assert Shape.parse("8x64x32768") == Shape(8, 64, 32_768)


def test_rounds_alternate_and_stop_at_the_deadline() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.alternate(steps, 4, "cpu", "")
    assert order == list("abababab")
    assert all(len(times[name]) == 4 for name in "ab")
    late = measure.alternate(steps, 9, "cpu", "", deadline=0.0)
    assert len(late["a"]) == measure.LEAST_ROUNDS


def test_quantile_and_environment() -> None:
    assert measure.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert measure.quantile([1.0, 2.0], 0.9) == pytest.approx(1.9)
    machine = measure.environment("cpu")
    assert machine["torch"] == torch.__version__
    assert machine["device"].endswith(" CPU")
    assert set(machine) == {"device", "architecture", "threads", "driver", "torch", "triton", "commit"}


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure.write(tmp_path / "new" / "x.md", "first")

    def fail(self: Path, content: bytes) -> None:
        raise OSError("full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="full"):
        measure.write(tmp_path / "new" / "x.md", "second")
    assert (tmp_path / "new" / "x.md").read_text() == "first"
