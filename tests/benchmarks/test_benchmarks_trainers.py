"""A training step against TRL's: the command and its table."""

import re

import pytest

from benchmarks.__main__ import main

# Libraries warn of what is not ours to change.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.slow
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainers", "--small", "--rounds", "1", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "float32, D=32, V=2000, 4 sequences of 16 tokens, half of them scored" in text
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if re.match(r"\| [DK]", line)]
    assert [row[0] for row in rows] == ["DPO", "KTO"]
    for _, theirs, ours, time, stock, mine, memory, difference in rows:
        assert min(map(float, (theirs, ours, time, stock, mine))) > 0
        assert float(memory) < 0.5
        assert float(difference) < 1e-5


@pytest.mark.parametrize("options", [["--sequences", "3"], ["--vocabulary", "1000"], ["--rounds", "0"]], ids=str)
def test_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trainers", "--device", "cpu", *options]) == 2
    assert options[0] in capsys.readouterr().err
