"""What a launch costs the host: the benchmark runs. Its figures are not looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.host import HEADER

ROOT = Path(__file__).parents[2]


def test_the_tables() -> None:
    """Of compiled code, which the interpreter is not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "host", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert {len(row) for row in rows} == {len(HEADER)}
    assert [row[1] for row in rows if row[0] == "all"] == ["9", "9"]
    assert {"chunk.exponentials", "exponentials.exponentials", "per launch"} <= {row[0] for row in rows}


def test_it_says_what_is_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["host"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
