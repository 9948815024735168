"""The benchmarks run, on a tiny shape and untimed, and count bytes as they say."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import torch
from harness import make_batch

import fused_pref as fp
from benchmarks import linear_head
from benchmarks.common import Shape, occupied, traffic
from benchmarks.implementations import OPERATIONS, implementations

ROOT = Path(__file__).resolve().parent.parent


def test_suite_runs() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_logits.py", "--shape", "2x3x17", "--device", "cpu"]
    command += ["--benchmark-disable", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    absent = [found.name for found in implementations("cpu") if found.obstacle("cpu")]
    assert "liger" in absent
    # Four operations, two passes, two dtypes: of each implementation all of them run or all of them show as skipped.
    cases = len(OPERATIONS) * 2 * 2
    assert f"{cases * (4 - len(absent))} passed, {cases * len(absent)} skipped" in result.stdout
    assert all(f"{name} is absent: " in result.stdout for name in absent)


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
    logits, size = batch.logits.requires_grad_(), 2 * 3 * 5000 * 4

    def eager() -> None:
        logps = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])
        torch.autograd.grad(logps.sum(), logits)

    assert round(traffic(eager) / size, 2) == 6.0
    ours = traffic(lambda: torch.autograd.grad(fp.token_logps(logits, batch.labels).sum(), logits))
    assert round(ours / size, 2) == 3.0


def test_shape() -> None:
    assert Shape.parse("8x64x32768") == Shape(8, 64, 32_768)
    assert str(Shape(8, 64, 32_768)) == "8x64x32768"


def test_linear_head() -> None:
    command = [sys.executable, "-m", "benchmarks.linear_head", "--shape", "4x6x8x33", "--rounds", "1"]
    done = subprocess.run([*command, "--dtypes", "bfloat16"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stamp, _, _, *rows = done.stdout.splitlines()
    assert "torch 2" in stamp
    assert [row.split(" | ")[1] for row in rows] == [
        "bare products", "eager", "linear_cpo_loss", "frozen head", "linear_bco_loss, δ of the batch"
    ]  # fmt: skip
    assert rows[0].split(" | ")[3] == rows[1].split(" | ")[4] == "1.00"


def test_linear_head_works_as_eager_does() -> None:
    """The peer computes what is compared: the same loss."""
    problem = linear_head.Problem.make((4, 6, 8, 33), torch.float32, "cpu")
    ours = fp.linear_cpo_loss(problem.hidden, problem.weight, problem.labels, beta=linear_head.BETA).loss
    torch.testing.assert_close(linear_head.eager_cpo(problem), ours)


def test_static_head() -> None:
    """One kernel on every GPU: what is predicted is above the floor, and not far above it at the largest depth."""
    code = "from benchmarks import static_head as s; name = next(iter(s.KERNELS));" + (
        "print([(row[1], *(float(row[i].strip('*')) for i in (9, 13, 14, 15))) for target in s.GPUS"
        " for row in s.rows_of(name, s.KERNELS[name], target)])"
    )
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=clean
    )
    assert done.returncode == 0, done.stderr
    rows = ast.literal_eval(done.stdout)
    assert len(rows) == 12
    for _, epilogue, floor, predicted, ratio in rows:
        assert epilogue > 5
        assert predicted >= floor
        assert 1 <= ratio < 1.5
    assert {gpu for gpu, *_, ratio in rows if ratio <= 1.15} == {gpu for gpu, *_ in rows}
