"""The same inputs give the same bits: call after call, in every process, with one thread as with two."""

import json
import os
import subprocess
import sys

import pytest
import repeated
from repeated import FUNCTIONS, RUNS, everything
from shared import once

Digests = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def runs() -> list[Digests]:
    return once("repeated", run_again)


def run_again() -> list[Digests]:
    """Of a fresh process, and two of this one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, repeated.__file__]
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as fresh:
        own = [everything(), everything()]
        output, _ = fresh.communicate()
    assert fresh.returncode == 0
    return [json.loads(output), *own]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "threads"), RUNS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_bits(name: str, backend: str, threads: int, runs: list[Digests]) -> None:
    own = [run[f"{backend} {threads}"] for run in runs]
    for key in (name, f"linear_{name}, None", f"linear_{name}, 1"):
        assert len({run[key] for run in own}) == 1, key


def test_other_inputs_have_other_hashes(runs: list[Digests]) -> None:
    """A hash of nothing would be the same for all functions."""
    assert len({*runs[0]["torch 1"].values()}) == len(runs[0]["torch 1"])
